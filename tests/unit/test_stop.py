"""A signal that comes at any moment ends the wait of a sweep, and never locks it up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fsm_storage.management.commands.fsm_sweep import Stop


@contextmanager
def interrupted(stops: list[Stop]) -> Iterator[None]:
    """Let a signal's handler set the newest of `stops`, thousands of times in a second of work."""
    before = signal.signal(signal.SIGVTALRM, lambda *_: stops[-1].set())
    signal.setitimer(signal.ITIMER_VIRTUAL, 1e-5, 1e-5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_signal_is_heard_whenever_it_comes() -> None:
    """With an event of `threading`, whose lock the handler may find taken, this stands still for ever."""
    stops, heard, end = [Stop()], 0, time.monotonic() + 1.5
    with interrupted(stops):
        while time.monotonic() < end:
            stops[-1].wait(0)
            if stops[-1].is_set():
                heard += 1
                stops[-1] = Stop()
    assert heard > 10
