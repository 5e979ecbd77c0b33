"""The mirror and a database that is killed under load: the bot does not notice, and nothing is missing in the end."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage
from fsm_storage.mirror import repairing
from fsm_storage.mirror.worker import Mirror

KILLS = int(os.environ.get("FSM_TEST_KILLS", "2"))


@pytest.fixture
async def storage(own_database: str, redis_url: str) -> AsyncIterator[RedisStorage]:
    with redis.Redis.from_url(redis_url) as raw:
        raw.flushall()
    storage = RedisStorage.from_url(redis_url, alias="own", database=own_database, mirror="apart")
    yield storage
    await storage.close()


@pytest.mark.slow
@pytest.mark.loop_gap(3.0)  # it starts and kills servers
@pytest.mark.timeout(120 + 30 * KILLS)
async def test_a_database_that_is_killed_again_and_again(storage: RedisStorage, own_server: Any) -> None:
    written, longest = 0, 0.0

    async def talk(chat: int) -> None:
        nonlocal written, longest
        key, loop, n = StorageKey(bot_id=1, chat_id=chat, user_id=chat), asyncio.get_running_loop(), 0
        while True:
            began, n = loop.time(), n + 1
            await storage.set_state(key, f"s{n % 9}")
            await storage.update_data(key, {f"k{n % 4}": n})
            longest, written = max(longest, loop.time() - began), written + 2
            await asyncio.sleep(0.01)

    mirror = Mirror(storage)
    mirroring = asyncio.create_task(mirror.run())
    talks = [asyncio.create_task(talk(chat)) for chat in range(1, 17)]
    for _ in range(KILLS):
        await asyncio.sleep(random.uniform(0.5, 2.0))
        await asyncio.to_thread(own_server.kill)
        await asyncio.sleep(random.uniform(0.2, 1.0))
        await asyncio.to_thread(own_server.start)
    await asyncio.sleep(1)
    for task in talks:
        task.cancel()
    await asyncio.gather(*talks, return_exceptions=True)
    async with asyncio.timeout(90):
        while (await repairing.status(storage)).entries:
            await asyncio.sleep(0.1)
    mirror.stop()
    await mirroring
    found = await repairing.compare(storage)
    assert (found.differ, found.only_redis, found.only_database) == ([], [], [])
    assert found.same == 16
    assert mirror.progress.poison == 0
    assert longest < 5.0, "the bot waited for the database"
    assert written > 0
