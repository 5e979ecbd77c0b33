"""Batches, pressure, closing; any number of event loops and threads; after a fork."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import async_to_sync

from fsm_storage import RedisStorage, storages
from fsm_storage.exceptions import RedisUnavailable, StorageClosed, StorageTimeout
from tests.redis.conftest import Make
from tests.redis.patience import in_time
from tests.redis.proxy import Proxy
from tests.redis.writers import key_of
from tests.servers import RedisServer, finish_child, start_child


def calls(raw: redis.Redis) -> int:
    """Return how many commands Redis has carried out that the storage sends, those of scripts aside."""
    stats = raw.info("commandstats")
    return sum(
        stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha", "memory|usage")
    )


def clients(raw: redis.Redis) -> int:
    return len(raw.client_list()) - 1


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_thousand_at_once_share_a_few_round_trips(make: Make, own_redis: RedisServer) -> None:
    storage = make(own_redis.url)
    with redis.Redis(port=own_redis.port) as raw:
        await storage.get_state(key_of(0))
        await storage.set_state(key_of(0), "a")
        before = calls(raw)
        await asyncio.gather(*(storage.set_state(key_of(n), f"s{n}") for n in range(1000)))
        states = await asyncio.gather(*(storage.get_state(key_of(n)) for n in range(1000)))
        assert states == [f"s{n}" for n in range(1000)]
        assert 4 <= calls(raw) - before <= 8
        assert clients(raw) == 2


async def test_large_values_are_cut_into_batches(storage: RedisStorage) -> None:
    value = "x" * 1_000_000
    await asyncio.gather(*(storage.set_data(key_of(n), {"n": n, "v": value}) for n in range(12)))
    for n in range(12):
        assert await storage.get_data(key_of(n)) == {"n": n, "v": value}


async def test_pressure_waits_and_then_says_so(make: Make, proxy: Proxy) -> None:
    storage = make(proxy.url, max_pending=5, timeout=0.5)
    await in_time(lambda: storage.set_state(key_of(0), "a"))
    proxy.hold()
    replies = await asyncio.gather(
        *(storage.set_state(key_of(n), "b") for n in range(600)), return_exceptions=True
    )
    assert {type(reply) for reply in replies} == {StorageTimeout}
    assert any("5 operations are waiting" in str(reply) for reply in replies)
    proxy.mend()
    await asyncio.gather(*(in_time(lambda n=n: storage.set_state(key_of(n), "c")) for n in range(600)))
    assert await in_time(lambda: storage.get_state(key_of(599))) == "c"


async def test_cancelled_callers_in_line_pass_their_turn_on(make: Make, proxy: Proxy) -> None:
    storage = make(proxy.url, max_pending=2)
    await storage.set_state(key_of(0), "a")
    proxy.hold()
    writes = [asyncio.create_task(storage.set_state(key_of(n), "b")) for n in range(20)]
    await asyncio.sleep(0.05)
    for write in writes[5:15]:
        write.cancel()
    proxy.mend()
    replies = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(reply) for reply in replies].count(type(None)) == 10


async def test_closing_finishes_what_was_accepted(make: Make, raw: redis.Redis, key: StorageKey) -> None:
    storage = make()
    writes = [asyncio.create_task(storage.set_state(key_of(n), "a")) for n in range(50)]
    await asyncio.sleep(0)
    await asyncio.gather(storage.close(), storage.close())
    await asyncio.gather(*writes)
    assert len(raw.keys("fsm:*")) == 50
    await storage.close()
    for operation in (
        storage.get_state(key),
        storage.set_state(key, "a"),
        storage.update_data(key, {"a": 1}),
    ):
        with pytest.raises(StorageClosed, match="closed"):
            await operation
    await asyncio.to_thread(wait_until, lambda: clients(raw) == 0)


async def test_closing_while_redis_is_away_ends(make: Make, own_redis: RedisServer) -> None:
    storage = make(own_redis.url, timeout=0.5)
    await in_time(lambda: storage.set_state(key_of(0), "a"))
    own_redis.kill()
    writes = [asyncio.create_task(storage.set_state(key_of(n), "b")) for n in range(50)]
    await asyncio.sleep(0)
    started = time.monotonic()
    await storage.close()
    replies = await asyncio.gather(*writes, return_exceptions=True)
    assert time.monotonic() - started < 8
    assert all(isinstance(reply, RedisUnavailable | StorageTimeout) for reply in replies)


async def test_closing_takes_no_longer_than_the_timeout(make: Make, proxy: Proxy) -> None:
    """Also when first the writes wait for Redis, and then the mirror does."""
    end, given = threading.Event(), []

    class BusyMirror(threading.Thread):
        def run(self) -> None:
            end.wait()

        def stop(self) -> None:
            """Go on with what it is at."""

        def join(self, timeout: float | None = None) -> None:
            given.append(timeout)
            super().join(timeout)

    storage = make(proxy.url, timeout=2.0)
    await in_time(lambda: storage.set_state(key_of(0), "a"))
    storage._mirroring = BusyMirror()
    storage._mirroring.start()
    proxy.hold()
    write = asyncio.create_task(storage.set_state(key_of(1), "b"))
    await asyncio.sleep(0)
    started = time.monotonic()
    await storage.close()
    took = time.monotonic() - started
    end.set()
    proxy.mend()
    # Not by the clock alone, which goes on while the machine stands still: the mirror got what the writes had left.
    assert len(given) == 1
    assert given[0] < 1.0
    assert took < 10
    with pytest.raises(StorageTimeout):
        await write


def test_one_storage_in_many_loops_one_after_the_other(
    redis_url: str, raw: redis.Redis, key: StorageKey
) -> None:
    storage = RedisStorage.from_url(redis_url, mirror="apart")
    for n in range(5):
        asyncio.run(storage.set_state(key, f"s{n}"))
        assert asyncio.run(storage.get_state(key)) == f"s{n}"
        assert async_to_sync(storage.update_data)(key, {f"k{n}": n})[f"k{n}"] == n
    assert async_to_sync(storage.get_data)(key) == {f"k{n}": n for n in range(5)}
    wait_until(lambda: clients(raw) == 0)  # each loop has taken its connections with it
    assert len(storage._sides) <= 1
    asyncio.run(storage.close())


def test_one_storage_in_many_threads(redis_url: str, key: StorageKey) -> None:
    storage = RedisStorage.from_url(redis_url, mirror="apart")

    async def work(who: int) -> None:
        for n in range(20):
            await asyncio.gather(
                storage.update_data(key, {f"{who}-{n}": n}), storage.set_state(key, str(who))
            )

    threads = [threading.Thread(target=lambda who=who: asyncio.run(work(who))) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asyncio.run(storage.get_data(key))) == 80
    asyncio.run(storage.close())


def test_closing_reaches_the_loops_of_other_threads(
    redis_url: str, raw: redis.Redis, key: StorageKey
) -> None:
    storage = RedisStorage.from_url(redis_url, mirror="apart")
    started, end = threading.Event(), threading.Event()

    async def work() -> None:
        await storage.set_state(key, "a")
        started.set()
        while not end.is_set():
            await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert started.wait(60)
    asyncio.run(storage.close())
    wait_until(lambda: clients(raw) == 0)
    end.set()
    thread.join()


def test_after_a_fork_both_sides_work(redis_url: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    finish_child(start_child("tests.redis.writers", "fork_after_use", redis_url, str(notes)))
    assert notes.read_text().splitlines() == ["before", "before child", "before child parent"]


async def test_from_the_settings(redis_url: str, settings: Any, key: StorageKey) -> None:
    settings.FSM_STORAGES = {
        "bot": {"BACKEND": "fsm_storage.RedisStorage", "OPTIONS": {"url": redis_url, "state_ttl": 60}}
    }
    storage = storages["bot"]
    assert isinstance(storage, RedisStorage)
    await storage.set_state(key, "a")
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.xlen("fsm_storage:{bot}:outbox") == 1
    await storage.close()
