"""Redis away, slow, full, a replica, wiped; lines that are cut. A write is whole or an error, and it mends itself."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage
from fsm_storage.exceptions import CorruptData, RedisUnavailable, StorageTimeout, StorageUnavailable
from fsm_storage.outbox import stream_name
from tests.redis.conftest import Make
from tests.redis.patience import AWAY, in_time
from tests.redis.proxy import Proxy
from tests.redis.replay import records, replayed, stored
from tests.redis.writers import key_of
from tests.servers import RedisServer


async def seconds_of_no(operation: Callable[[], Awaitable[object]]) -> float:
    """Return after how long an operation is refused, with the reason."""
    started = time.monotonic()
    with pytest.raises(RedisUnavailable):
        await in_time(operation, StorageTimeout)
    return time.monotonic() - started


async def test_redis_down_at_the_start(make: Make, own_redis: RedisServer, key: StorageKey) -> None:
    own_redis.kill()
    storage = make(own_redis.url, timeout=0.5)
    for operation in (
        lambda: storage.get_state(key),
        lambda: storage.set_state(key, "a"),
        lambda: storage.update_data(key, {"a": 1}),
    ):
        assert 0.3 < await seconds_of_no(operation) < 8
    with pytest.raises(
        StorageUnavailable, match=r"Redis of storage 'default' failed: ConnectionError: .*connect"
    ):
        await in_time(lambda: storage.get_data(key), StorageTimeout)
    await asyncio.to_thread(own_redis.start)
    await in_time(lambda: storage.set_state(key, "b"))
    assert await in_time(lambda: storage.get_state(key)) == "b"


async def test_redis_that_comes_back_within_the_timeout_is_waited_for(
    make: Make, own_redis: RedisServer, key: StorageKey
) -> None:
    storage = make(own_redis.url, timeout=60)
    await storage.set_state(key, "a")
    own_redis.kill()
    waiting = [
        asyncio.create_task(storage.set_state(key, "b")),
        asyncio.create_task(storage.update_data(key, {"a": 1})),
    ]
    await asyncio.sleep(0.2)
    await asyncio.to_thread(own_redis.start)
    await asyncio.gather(*waiting)
    assert (await storage.get_state(key), await storage.get_data(key)) == ("b", {"a": 1})


async def test_redis_restarted_empty(make: Make, own_redis: RedisServer, key: StorageKey) -> None:
    storage = make(own_redis.url)
    await storage.set_state(key, "a")
    await storage.update_data(key, {"a": 1})
    own_redis.kill()
    await asyncio.to_thread(own_redis.start)
    assert (await storage.get_state(key), await storage.get_data(key)) == (None, {})
    await storage.update_data(key, {"b": 1})
    with redis.Redis(port=own_redis.port) as raw:
        assert replayed(raw) == stored(raw) == {b"fsm:-100200300:7:data": b'{"b": 1}'}


@pytest.mark.parametrize("wipe", ["FLUSHALL", "SCRIPT FLUSH", "CLIENT KILL TYPE normal"])
async def test_operations_go_on_after(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey, wipe: str
) -> None:
    for n in range(3):
        await storage.set_state(key, f"s{n}")
        await asyncio.gather(*(storage.get_state(key_of(n)) for n in range(20)))  # by the other script
        await storage.update_data(key, {"n": n})
        raw.execute_command(wipe)
    await storage.update_data(key, {"end": 1})
    expected = {"end": 1} if wipe == "FLUSHALL" else {"n": 2, "end": 1}
    assert await storage.get_data(key) == expected
    assert replayed(raw) == stored(raw)


@pytest.mark.loop_gap(8)  # the test's own client is paused too
async def test_slow_redis_is_a_timeout_and_no_other_commands_answer(
    make: Make, own_redis: RedisServer
) -> None:
    storage = make(own_redis.url, timeout=0.4)
    for n in range(50):
        await in_time(lambda n=n: storage.set_state(key_of(n), f"s{n}"))
    with redis.Redis(port=own_redis.port) as raw:
        raw.client_pause(5000)
        started = time.monotonic()
        replies = await asyncio.gather(
            *(storage.get_state(key_of(n)) for n in range(50)),
            storage.set_state(key_of(99), "late"),
            return_exceptions=True,
        )
        assert 0.3 < time.monotonic() - started < 4.5
        assert all(isinstance(reply, AWAY) for reply in replies)
        raw.client_unpause()
        # Only now: a client that is paused waits itself.
        states = [await in_time(lambda n=n: storage.get_state(key_of(n))) for n in range(50)]
        assert states == [f"s{n}" for n in range(50)]
        assert await in_time(lambda: storage.get_state(key_of(99))) in (None, "late")


async def test_answers_that_come_too_late_are_not_taken_for_others(make: Make, proxy: Proxy) -> None:
    storage = make(proxy.url, timeout=0.3)
    for n in range(20):
        await in_time(lambda n=n: storage.set_state(key_of(n), f"s{n}"))
    proxy.hold()
    for n in range(3):
        with pytest.raises(AWAY):
            await storage.get_state(key_of(n))
    proxy.mend()
    states = [await in_time(lambda n=n: storage.get_state(key_of(n))) for n in range(20)]
    assert states == [f"s{n}" for n in range(20)]


async def test_a_cancelled_caller_takes_no_answer_with_it(make: Make, proxy: Proxy) -> None:
    storage = make(proxy.url)
    for n in range(20):
        await storage.set_state(key_of(n), f"s{n}")
    for n in range(20):
        proxy.hold()
        read = asyncio.create_task(storage.get_state(key_of(n)))
        write = asyncio.create_task(storage.set_state(key_of(n), f"t{n}"))
        await asyncio.sleep(random.choice([0, 0.01]))
        read.cancel()
        write.cancel()
        proxy.mend()
        await asyncio.gather(read, write, return_exceptions=True)
        other = (n + 1) % 20
        assert await storage.get_state(key_of(other)) in (f"s{other}", f"t{other}")


async def test_a_line_cut_at_any_byte(make: Make, proxy: Proxy, raw: redis.Redis) -> None:
    """Every answer that is given is right, every acknowledged write is there, and the outbox tells it all."""
    storage = make(proxy.url, timeout=10)
    for round_ in range(30):
        proxy.cut_after(round_ * 23)
        writes = [storage.set_state(key_of(n), f"{round_}-{n}") for n in range(10)]
        merges = [storage.update_data(key_of(n), {f"r{round_}": n}) for n in range(10)]
        working = asyncio.gather(*writes, *merges)
        await asyncio.sleep(0.03)
        proxy.mend()
        await working
        proxy.cut()
        states = await asyncio.gather(*(storage.get_state(key_of(n)) for n in range(10)))
        assert states == [f"{round_}-{n}" for n in range(10)]
    data = await asyncio.gather(*(storage.get_data(key_of(n)) for n in range(10)))
    assert data == [{f"r{round_}": n for round_ in range(30)} for n in range(10)]
    assert replayed(raw) == stored(raw)
    assert proxy.lines > 30


async def test_out_of_memory(make: Make, own_redis: RedisServer, key: StorageKey) -> None:
    storage = make(own_redis.url, timeout=20)
    await storage.set_state(key, "old")
    with redis.Redis(port=own_redis.port) as raw:
        before = (stored(raw), records(raw))
        raw.config_set("maxmemory", 1)
        for write in (
            lambda: storage.set_state(key, "new"),
            lambda: storage.set_state(key, None),
            lambda: storage.set_data(key, {"a": 1}),
            lambda: storage.update_data(key, {"a": 1}),
        ):
            assert await seconds_of_no(write) < 10  # no sense in trying again
        with pytest.raises(RedisUnavailable, match="OOM"):
            await storage.set_state(key, "new")
        assert (stored(raw), records(raw)) == before
        assert await storage.get_state(key) == "old"
        raw.config_set("maxmemory", 0)
        await storage.set_state(key, "new")
        assert await storage.get_state(key) == "new"


async def test_a_master_that_became_a_replica(make: Make, own_redis: RedisServer, key: StorageKey) -> None:
    storage = make(own_redis.url, timeout=0.4)
    await in_time(lambda: storage.set_state(key, "old"))
    with redis.Redis(port=own_redis.port) as raw:
        before = records(raw)
        raw.replicaof("127.0.0.1", 1)
        for write in (lambda: storage.set_state(key, "new"), lambda: storage.update_data(key, {"a": 1})):
            assert 0.2 < await seconds_of_no(write) < 8
        with pytest.raises(RedisUnavailable, match="read only"):
            await in_time(lambda: storage.set_state(key, "new"), StorageTimeout)
        assert records(raw) == before
        patient = make(own_redis.url, timeout=60)
        waiting = asyncio.create_task(patient.set_state(key, "after"))
        await asyncio.sleep(0.3)
        raw.replicaof("NO", "ONE")
        await waiting
        assert await in_time(lambda: storage.get_state(key)) == "after"


async def test_no_permission_and_a_wrong_password_are_told_at_once(
    make: Make, own_redis: RedisServer, key: StorageKey
) -> None:
    with redis.Redis(port=own_redis.port) as raw:
        raw.execute_command(
            "ACL SETUSER bot on >secret ~fsm:* ~fsm_storage:* +@read +eval +evalsha +set +del +xadd"
        )
        raw.execute_command("ACL SETUSER reader on >secret ~fsm:* +@read")
    bot = make(f"redis://bot:secret@127.0.0.1:{own_redis.port}/0")  # may not ask for the size of the outbox
    await bot.set_state(key, "a")
    assert await bot.update_data(key, {"a": 1}) == {"a": 1}
    reader = make(f"redis://reader:secret@127.0.0.1:{own_redis.port}/0", timeout=20)
    assert await reader.get_state(key) == "a"
    assert await seconds_of_no(lambda: reader.set_state(key, "b")) < 10
    stranger = make(f"redis://bot:wrong@127.0.0.1:{own_redis.port}/0", timeout=20)
    assert await seconds_of_no(lambda: stranger.get_state(key)) < 10


async def test_one_bad_key_fails_alone_in_its_batch(storage: RedisStorage, raw: redis.Redis) -> None:
    raw.rpush("fsm:5:5:state", "a list")
    raw.set("fsm:6:6:data", "{")
    states = await asyncio.gather(*(storage.get_state(key_of(n)) for n in range(20)), return_exceptions=True)
    assert [type(state) for state in states] == [CorruptData if n == 5 else type(None) for n in range(20)]
    merged = await asyncio.gather(
        *(storage.update_data(key_of(n), {"n": n}) for n in range(20)),
        *(storage.set_data(key_of(100), value) for value in ({"a": {1, 2}}, {"a": float("nan")}, [])),
        storage.set_state(key_of(0), 5),
        return_exceptions=True,
    )
    assert [reply for reply in merged[:20] if not isinstance(reply, Exception)] == [
        {"n": n} for n in range(20) if n != 6
    ]
    assert [isinstance(reply, Exception) for reply in merged[20:]] == [True] * 4
    assert len([record for record in records(raw) if record.part == "data"]) == 19


async def test_a_wrong_type_that_appears_within_a_merge(
    make: Make, proxy: Proxy, raw: redis.Redis, key: StorageKey
) -> None:
    storage = make(proxy.url)
    await storage.get_data(key)
    proxy.hold()
    merge = asyncio.create_task(storage.update_data(key, {"a": 1}))
    other = asyncio.create_task(storage.set_state(key, "a"))
    await asyncio.sleep(0.1)
    raw.rpush("fsm:-100200300:7:data", "a list")
    proxy.mend()
    with pytest.raises(CorruptData, match="set_data"):
        await merge
    await other
    assert raw.xlen(stream_name("default")) == 1
