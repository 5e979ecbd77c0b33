"""Who may open a websocket, what is said over it, and how often. Without a server: Channels' own test client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session

from fsm_storage import signals
from fsm_storage.live import consumer
from tests.live.conftest import make_user

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("memory_layer")]

XSS = "<script>alert(1)</script>"


async def closed_with(browser: Any) -> int:
    message = await browser.receive_output(timeout=10)
    assert message["type"] == "websocket.close", message
    return int(message["code"])


@pytest.mark.parametrize("who", ["nobody", "without permission", "no staff", "inactive"])
async def test_whoever_may_not_view_is_refused_before_anything_is_accepted(dial: Any, who: str) -> None:
    user = None
    if who != "nobody":
        codenames = [] if who == "without permission" else ["view_fsmrecord"]
        user = await sync_to_async(make_user)("eve", *codenames, is_staff=who != "no staff")
    if who == "inactive":
        user.is_active = False
        await user.asave()
    assert (await dial(user))[1] is False


async def test_a_viewer_is_accepted(dial: Any) -> None:
    user = await sync_to_async(make_user)("ann", "view_fsmrecord")
    assert (await dial(user))[1] is True


@pytest.mark.parametrize("origin", ["https://evil.example", "http://testserver.evil.example", "null", ""])
async def test_pages_of_other_hosts_are_refused(dial: Any, settings: Any, origin: str) -> None:
    settings.ALLOWED_HOSTS = ["testserver"]
    user = await sync_to_async(make_user)("ann", "view_fsmrecord")
    assert (await dial(user))[1] is True
    assert (await dial(user, origin))[1] is False


async def lose_permission(user: User) -> None:
    await user.user_permissions.aclear()


async def lose_staff(user: User) -> None:
    await User.objects.aupdate(is_staff=False)


async def log_out(user: User) -> None:
    await Session.objects.all().adelete()


async def change_password(user: User) -> None:
    user.set_password("another")
    await user.asave()


@pytest.mark.parametrize("how", [lose_permission, lose_staff, log_out, change_password])
async def test_an_open_websocket_is_closed_when_the_right_is_gone(
    dial: Any, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    monkeypatch.setattr(consumer, "RECHECK", 0.05)
    user = await sync_to_async(make_user)("ann", "view_fsmrecord")
    browser, _ = await dial(user)
    assert await browser.receive_nothing(timeout=0.3)
    await how(user)
    assert await closed_with(browser) == consumer.FORBIDDEN


async def test_it_is_closed_when_nobody_can_say_whether_the_right_is_there(
    dial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "RECHECK", 0.05)
    browser, _ = await dial(await sync_to_async(make_user)("ann", "view_fsmrecord"))

    def broken(session_key: str) -> None:
        raise OSError("the database is away")

    monkeypatch.setattr(consumer, "_viewer", broken)
    assert await closed_with(browser) == 1011


def test_rights_are_looked_at_again_within_half_a_minute() -> None:
    assert consumer.RECHECK <= 20


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1, column 2"),
        ("[" * 4000, "no JSON"),
        ("5", "type"),
        ("[]", "type"),
        ('{"type": "edit", "state": "x"}', "type"),
        ('{"type": "watch", "alias": 5, "key": "x"}', "both text"),
        ('{"type": "watch", "alias": "default"}', "both text"),
        (json.dumps({"type": "watch", "alias": "a", "key": "x" * 5000}), "4096"),
        (b"{}", "bytes"),
    ],
)
async def test_what_is_no_message_gets_an_error_and_the_line_stays(
    connect: Any, text: Any, told: str
) -> None:
    browser = await connect()
    part = "bytes" if isinstance(text, bytes) else "text"
    await browser.send_input({"type": "websocket.receive", part: text})
    assert told in (await browser.heard("error"))["message"]
    signals.hint("default", [("42:1:1", 5)])
    assert (await browser.heard("changed"))["records"] == [["default", "42:1:1", 5]]


async def test_a_page_hears_only_of_its_own_conversation(connect: Any) -> None:
    everything, one = await connect(), await connect(alias="default", key=XSS)
    signals.hint("default", [("other", 1)])
    assert (await everything.heard("changed"))["records"] == [["default", "other", 1]]
    signals.hint("other", [(XSS, 2)])
    signals.hint("default", [(XSS, 3)])
    assert await one.heard("changed") == {"type": "changed", "records": [["default", XSS, 3]], "more": False}


async def test_who_watches_nothing_hears_nothing(dial: Any, connect: Any) -> None:
    silent, _ = await dial(await sync_to_async(make_user)("bob", "view_fsmrecord"))
    other = await connect()
    signals.hint("default", [("a", 1)])
    await other.heard("changed")
    assert await silent.receive_nothing(timeout=0.3)


@pytest.mark.slow
async def test_at_most_four_messages_a_second_and_none_of_the_changes_is_lost(connect: Any) -> None:
    browser = await connect(alias="default", key="k")
    loop = asyncio.get_running_loop()
    start, version, times = loop.time(), 0, []
    newest = None

    async def write() -> None:
        nonlocal version
        while loop.time() - start < 2.0 or version <= 100:  # also if the machine stood still for a while
            version += 1
            signals.hint("default", [("k", version)])
            await asyncio.sleep(0.002)

    writing = asyncio.create_task(write())
    while not writing.done() or newest != version:
        message = await browser.heard("changed")
        times.append(loop.time())
        newest = message["records"][0][2]
    assert version > 100
    assert len(times) <= 4 * (times[-1] - start) + 2


async def test_a_flood_becomes_a_message_that_names_nothing(connect: Any) -> None:
    browser, one = await connect(), await connect(alias="default", key="none of them")
    signals.hint("default", [(f"k{n}", n) for n in range(consumer.MAX_RECORDS + 1)])
    assert await browser.heard("changed") == {"type": "changed", "records": [], "more": True}
    signals.hint("default", [(f"k{n}", n) for n in range(10_000)])
    assert await browser.heard("changed") == {"type": "changed", "records": [], "more": True}
    assert (await one.heard("changed"))["more"]  # of so many, nobody knows which


async def test_people_who_look_at_one_conversation_see_each_other(connect: Any) -> None:
    place = {"alias": "default", "key": "k"}
    ann = await connect("ann", **place)
    await connect("cleo", alias="default", key="another")
    bob = await connect(f"bob{XSS}"[:20], **place)
    assert (await ann.heard("present"))["names"] == [f"bob{XSS}"[:20]]
    assert (await bob.heard("present"))["names"] == ["ann"]
    await bob.disconnect()
    assert (await ann.heard("present"))["names"] == []


@pytest.mark.parametrize("error", [OSError("the page has gone"), RuntimeError("something else")])
async def test_a_page_that_goes_while_it_is_told_something_is_gone(connect: Any, error: Exception) -> None:
    place = {"alias": "default", "key": "k"}
    ann, bob = await connect("ann", **place), await connect("bob", **place)
    assert (await ann.heard("present"))["names"] == ["bob"]
    assert (await bob.heard("present"))["names"] == ["ann"]
    bob.error = error
    await connect("cleo", **place)  # of whom bob is told
    assert (await ann.heard("present"))["names"] == ["bob", "cleo"]
    await bob.send_input({"type": "websocket.disconnect", "code": 1001})
    assert (await ann.heard("present"))["names"] == ["cleo"]


async def test_ones_own_other_tab_is_nobody_else(connect: Any) -> None:
    first = await connect("ann", alias="default", key="k")
    second = await connect("ann", alias="default", key="k")
    assert await first.receive_nothing(timeout=0.3)
    assert await second.receive_nothing(timeout=0.01)
