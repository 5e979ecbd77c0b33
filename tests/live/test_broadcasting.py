"""Hints on their way: in which messages, what a layer that is stuck or down does, and that no writer waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from channels.layers import channel_layers

from fsm_storage.live import GROUP, broadcasting
from fsm_storage.live.broadcasting import MAX_RECORDS, Broadcaster
from tests.servers import run_python


class Layer:
    """Notes what is sent, and when; fails or hangs when told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, Any]] = []
        self.error: Exception | None = None

    async def group_send(self, group: str, message: Any) -> None:
        assert group == GROUP
        if self.error:
            raise self.error
        self.sent.append((time.monotonic(), message))


@pytest.fixture
def layer(settings: Any) -> Iterator[Layer]:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.live.test_broadcasting.Layer"}}
    layer = Layer()
    channel_layers.set("default", layer)
    yield layer
    channel_layers.backends.clear()


@pytest.fixture
def sender(layer: Layer) -> Iterator[Broadcaster]:
    sender = Broadcaster()
    yield sender
    sender.finish()


def until(happened: Callable[[], Any], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_the_first_is_sent_at_once_and_what_follows_together(sender: Broadcaster, layer: Layer) -> None:
    sender.hint("default", [("a", 1)])
    until(lambda: layer.sent)
    for version in range(2, 50):
        sender.hint("default", [("a", version), ("b", None)])
    until(lambda: ["default", "a", 49] in layer.sent[-1][1]["records"])
    assert layer.sent[0][1] == {"type": "hint", "records": [["default", "a", 1]], "more": False}
    assert layer.sent[-1][1]["records"] == [["default", "a", 49], ["default", "b", None]]
    # One message, or some more if this thread stood still between two hints.
    times = [at for at, _message in layer.sent]
    assert all(later - earlier >= 0.24 for earlier, later in pairwise(times))


def test_a_flood_takes_no_memory(sender: Broadcaster, layer: Layer) -> None:
    layer.error = OSError("down")
    sender.hint("default", [("a", 1)])
    until(lambda: sender._more)
    for number in range(100 * MAX_RECORDS):
        sender.hint("default", [(f"k{number}", 1)])
        assert len(sender._records) <= MAX_RECORDS
    until(lambda: not sender._records)  # while it tries again, it notes a few
    layer.error = None
    until(lambda: layer.sent)
    assert layer.sent[0][1] == {"type": "hint", "records": [], "more": True}


def test_many_at_once_are_not_named(sender: Broadcaster, layer: Layer) -> None:
    sender.hint("default", [(f"k{number}", 1) for number in range(MAX_RECORDS + 1)])
    until(lambda: layer.sent)
    assert layer.sent[0][1] == {"type": "hint", "records": [], "more": True}


def test_a_layer_that_is_down_is_named_once(
    sender: Broadcaster, layer: Layer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcasting, "LONGEST_PAUSE", 0.3)
    layer.error = OSError("down")
    sender.hint("default", [("a", 1)])
    until(lambda: "OSError: down" in caplog.text)
    time.sleep(1.2)
    assert caplog.text.count("live pages are not told: OSError: down") == 1
    layer.error = None
    until(lambda: layer.sent)


def test_the_end_waits_for_what_was_not_sent(sender: Broadcaster, layer: Layer) -> None:
    sender.hint("default", [("a", 1)])
    sender.hint("default", [("b", 1)])
    sender.finish(30)
    keys = [key for _at, message in layer.sent for _alias, key, _version in message["records"]]
    assert keys == ["a", "b"]


FORKS = """
import os, threading, warnings
import django; django.setup()
from channels.layers import channel_layers
from fsm_storage.live.broadcasting import broadcaster

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork() in a process with threads
sent, parent = threading.Event(), os.getpid()

class Layer:
    async def group_send(self, group, message):
        print("parent" if os.getpid() == parent else "child", message["records"], flush=True)
        sent.set()

channel_layers.set("default", Layer())
broadcaster.hint("default", [("a", 1)])
assert sent.wait(30)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
broadcaster.hint("default", [("b", 1)])
broadcaster.finish(30)
"""


def test_the_child_of_a_fork_sends_too() -> None:
    """It has its parent's notes of a thread that sends, but not the thread."""
    said = run_python(FORKS).splitlines()
    assert said == [
        "parent [['default', 'a', 1]]",
        "child [['default', 'b', 1]]",
        "parent [['default', 'b', 1]]",
    ]


@pytest.mark.parametrize("layers", ["{}", "{'default': {'BACKEND': 'channels.layers.InMemoryChannelLayer'}}"])
def test_without_a_layer_nothing_listens_and_channels_is_not_loaded(layers: str) -> None:
    code = (
        "import sys, django; from django.conf import settings; import tests.settings as given; "
        "options = {name: getattr(given, name) for name in dir(given) if name.isupper()}; "
        f"settings.configure(**options, CHANNEL_LAYERS={layers}); django.setup(); "
        "from fsm_storage import signals; print(len(signals.hints), 'channels' in sys.modules)"
    )
    expected = "0 False" if layers == "{}" else "1 True"
    assert run_python(code).strip() == expected
