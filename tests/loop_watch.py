"""Measures for how long an event loop did not come round."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_BEAT = 0.01


class LoopWatch:
    """The longest gap between two turns of a loop, without what a busy machine is to blame for.

    Time in which the loop's thread was ready to run but got no processor is taken off: on a shared
    machine that is somebody else's work, and would make the figure a lottery.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._last = self._read()

    def note(self, expected: float = 0.0) -> None:
        """Note the time since the last note, less `expected`."""
        now = self._read()
        elapsed, waited = now[0] - self._last[0], now[1] - self._last[1]
        self.longest = max(self.longest, elapsed - waited - expected)
        self._last = now

    def _read(self) -> tuple[float, float]:
        try:
            waited = int(self._schedstat.read_text().split()[1]) / 1e9
        except OSError:  # no Linux: the figure then includes the machine's noise
            waited = 0.0
        return time.perf_counter(), waited


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
