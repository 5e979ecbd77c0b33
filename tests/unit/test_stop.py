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
    stops, heard, began = [Stop()], 0, time.monotonic()
    with interrupted(stops):
        # The signals come by the time that the process works, of which a busy machine may give it little.
        while (took := time.monotonic() - began) < 1.5 or (heard <= 10 and took < 30):
            stops[-1].wait(0)
            if stops[-1].is_set():
                heard += 1
                stops[-1] = Stop()
    assert heard > 10
