"""Measures for how long an event loop did not come round."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from glob import glob
from pathlib import Path

_BEAT = 0.01


class LoopWatch:
    """The longest gap between two turns of a loop, without what a busy machine is to blame for.

    Time in which a thread of this process was ready to run but got no processor is taken off, also another one's
    than the loop's: it may have held the interpreter's lock. On a shared machine that is somebody else's work, and
    would make the figure a lottery.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._last_at, self._last_waits = time.perf_counter(), _waits()

    def note(self, expected: float = 0.0) -> None:
        """Note the time since the last note, less `expected`."""
        now, waits = time.perf_counter(), _waits()
        waited = sum(
            waits[thread] - self._last_waits[thread] for thread in waits.keys() & self._last_waits.keys()
        )
        self.longest = max(self.longest, now - self._last_at - waited - expected)
        self._last_at, self._last_waits = now, waits


def _waits() -> dict[str, float]:
    """Return for how long each thread has waited for a processor; empty where there is no Linux."""
    waits = {}
    for path in glob("/proc/self/task/*/schedstat"):
        with suppress(OSError):  # it has just ended
            waits[path] = int(Path(path).read_text().split()[1]) / 1e9
    return waits


@asynccontextmanager
async def watched_loop() -> AsyncIterator[LoopWatch]:
    """Watch the running loop; `longest` is the longest gap so far, in seconds."""
    watch = LoopWatch()

    async def beat() -> None:
        while True:
            await asyncio.sleep(_BEAT)
            watch.note(_BEAT)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    try:
        yield watch
    finally:
        watch.note(_BEAT)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
