"""Locks of an event isolation, C tasks at a time on one event loop: lock and unlock, how often a second."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import Any

from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey

from benchmarks.plan import WARM_UP_SECONDS
from benchmarks.workload import Reading

SHARED_KEYS = 8


class Handlers:
    """The tasks that take a lock and leave it, and the count of their turns."""

    def __init__(self, isolation: BaseEventIsolation, *, shared: bool) -> None:
        self.isolation, self.shared = isolation, shared
        self.done = 0
        self.stopping = False

    def read(self) -> Reading:
        return Reading(time.perf_counter(), time.process_time(), self.done, 0)

    async def work(self, number: int) -> None:
        """Lock a key that is new each time, as for updates of many people; or one of a few, in turn with others."""
        for step in count():
            if self.stopping:
                return
            chat = number % SHARED_KEYS if self.shared else 1_000_000 * (number + 1) + step
            async with self.isolation.lock(StorageKey(bot_id=42, chat_id=chat, user_id=chat)):
                await asyncio.sleep(0)  # a handler waits for something
            self.done += 1


async def measure(
    isolation: BaseEventIsolation, tasks: int, seconds: float, *, shared: bool
) -> dict[str, Any]:
    """Return locks a second, taken and left, and what one costs in processor time."""
    handlers = Handlers(isolation, shared=shared)
    running = [asyncio.create_task(handlers.work(number)) for number in range(tasks)]
    await asyncio.sleep(WARM_UP_SECONDS)
    before = handlers.read()
    await asyncio.sleep(seconds)
    after = handlers.read()
    handlers.stopping = True
    await asyncio.gather(*running)
    done = after.done - before.done
    return {
        "rate": done / (after.at - before.at),
        "cpu_us": (after.cpu - before.cpu) / max(done, 1) * 1e6,
        "error_share": 0.0,
        "errors": {},
        "wrong": 0,
    }
