"""For storages with a short timeout: what a machine that stands still makes late is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fsm_storage.exceptions import RedisUnavailable, StorageTimeout

T = TypeVar("T")
AWAY = (RedisUnavailable, StorageTimeout)


async def in_time(
    operation: Callable[[], Awaitable[T]], late: type[Exception] | tuple[type[Exception], ...] = AWAY
) -> T:
    """Do it again until its answer is none of `late`, for half a minute at the most."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await operation()
            except late:
                await asyncio.sleep(0.02)
