"""A mirror beside the storage of a test, and what waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage
from fsm_storage.backends import redis_editing
from fsm_storage.mirror import worker
from fsm_storage.mirror.worker import Mirror


async def mirror_all(storage: RedisStorage) -> Mirror:
    mirror = Mirror(storage)
    async with asyncio.timeout(60):
        await mirror.run(until_empty=True)
    return mirror


@asynccontextmanager
async def mirroring(storage: RedisStorage) -> AsyncIterator[Mirror]:
    """Mirror meanwhile, and to the end. Edits wait for it, and so does its end, also while the machine stands still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_editing, "PATIENCE", 30.0)
        patch.setattr(worker, "LAST_SECONDS", 30.0)
        mirror = Mirror(storage)
        task = asyncio.create_task(mirror.run())
        try:
            yield mirror
        finally:
            mirror.stop()
            await task


async def becomes(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def other(chat: int, **parts: Any) -> StorageKey:
    return StorageKey(bot_id=42, chat_id=chat, user_id=chat, **parts)
