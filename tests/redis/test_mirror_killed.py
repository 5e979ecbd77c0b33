"""The bot and the mirror are killed under load, again and again; in the end Redis and the database agree."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
import redis

from fsm_storage import RedisStorage
from fsm_storage.mirror import repairing
from fsm_storage.mirror.worker import Mirror
from fsm_storage.models import FSMRecord
from tests.conftest import POSTGRES, SQLITE
from tests.rows import in_thread
from tests.servers import finish_child, start_child

ROUNDS = int(os.environ.get("FSM_TEST_KILLS", "4"))


@pytest.mark.slow
@pytest.mark.loop_gap(30)  # it starts and ends processes itself
@pytest.mark.timeout(120 + 30 * ROUNDS)
@pytest.mark.parametrize("database", [SQLITE, POSTGRES])
async def test_after_kills_nothing_differs(
    database: str, redis_url: str, raw: redis.Redis, tmp_path: Path
) -> None:
    raw.flushall()
    notes = tmp_path / "notes"
    bot = start_child("tests.redis.writers", "write_and_be_killed", redis_url, str(notes), str(ROUNDS))
    kills = 0
    while bot.poll() is None or kills < ROUNDS:
        mirror = start_child("tests.redis.mirrors", redis_url, database)
        await asyncio.sleep(random.uniform(2.0, 4.0))
        mirror.kill()
        mirror.communicate()
        kills += 1
    finish_child(bot)
    storage = RedisStorage.from_url(redis_url, mirror="apart", database=database)
    began = time.monotonic()
    async with asyncio.timeout(60):  # the lease of the last one that was killed has to run out
        await Mirror(storage).run(until_empty=True)
    found = await repairing.compare(storage, bot_id=1)
    assert found.looked_both_ways
    assert (found.differ, found.only_redis, found.only_database) == ([], [], []), time.monotonic() - began
    assert found.same == await in_thread(lambda: FSMRecord.objects.using(database).live().count()) > 0
    await storage.close()
