"""`DjangoEventIsolation` on Redis: one handler at a time, in order, over processes, loops and failures."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from aiogram import Bot, Dispatcher
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisEventIsolation
from redis.asyncio import Redis

from fsm_storage import DjangoEventIsolation, LeaseLost, LeaseTimeout, RedisStorage, storages
from fsm_storage.exceptions import (
    InvalidStorageError,
    RedisUnavailable,
    StorageTimeout,
    StorageUnavailable,
)
from tests.contract.isolation import IsolationContract
from tests.contract.places import Isolate, none_left
from tests.redis.conftest import Make
from tests.redis.mirroring import becomes
from tests.redis.patience import in_time
from tests.redis.proxy import Proxy
from tests.redis.writers import key_of
from tests.servers import RedisServer, finish_child, start_child

LOCK = "fsm:1:1:lock"
LAST_TOKEN = "fsm_storage:lease_token"


@pytest.fixture
def storage(make: Make) -> RedisStorage:
    return make(mirror=False)


def locks(raw: redis.Redis) -> list[bytes]:
    return list(raw.keys("*:lock"))


class Child:
    """A process with an interpreter of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.pid = process, process.pid

    def wait(self) -> int:
        finish_child(self._process)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class Keys:
    """The keys of locks in Redis."""

    turns, lease = 3.0, 3.0

    def __init__(self, url: str, raw: redis.Redis) -> None:
        self._url, self._raw = url, raw
        self.children: list[Child] = []

    def leases(self) -> list[str]:
        return [key.decode() for key in locks(self._raw)]

    def take_away(self) -> None:
        self._raw.delete(*locks(self._raw))

    def give_away(self) -> None:
        for key in locks(self._raw):
            self._raw.set(key, "1 another")

    def start(self, writer: str, notes: Path, *arguments: Any) -> Child:
        child = Child(start_child("tests.redis.writers", writer, self._url, str(notes), *map(str, arguments)))
        self.children.append(child)
        return child


@pytest.fixture
def place(redis_url: str, raw: redis.Redis) -> Iterator[Keys]:
    keys = Keys(redis_url, raw)
    yield keys
    for child in keys.children:
        child.kill()


class TestPromises(IsolationContract):
    @pytest.fixture
    def thread_storage(self, redis_url: str) -> RedisStorage:
        """A storage that is made in no event loop."""
        return RedisStorage.from_url(redis_url, mirror=False)


# The lock


async def test_claims_made_together_are_one_command(isolate: Isolate, place: Keys, raw: redis.Redis) -> None:
    isolation, all_in, inside = isolate(), asyncio.Event(), 0

    async def work(n: int) -> None:
        nonlocal inside
        async with isolation.lock(key_of(n)):
            inside += 1
            if inside == 200:
                all_in.set()
            await all_in.wait()

    async with isolation.lock(key_of(-1)):  # connected, and the script is there
        pass
    await none_left(isolation, place)
    before = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    await asyncio.gather(*map(work, range(200)))
    await none_left(isolation, place)
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 4
    assert raw.keys() == [LAST_TOKEN.encode()]  # nothing else is left


async def test_tokens_only_grow(isolate: Isolate, place: Keys, raw: redis.Redis) -> None:
    """Also when the clock of Redis went back, or Redis lost all that it had."""
    isolation, tokens = isolate(), []

    async def take() -> None:
        async with isolation.lock(key_of(1)):
            value = raw.get(LOCK)
            assert isinstance(value, bytes)
            tokens.append(int(value.split()[0]))
        await none_left(isolation, place)

    for _ in range(3):
        await take()
    ahead = tokens[-1] + 3_600_000_000
    raw.set(LAST_TOKEN, ahead)
    await take()
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == ahead + 1
    assert raw.get(LAST_TOKEN) == str(ahead + 1).encode()
    raw.flushall()
    await take()
    assert tokens[2] < tokens[-1]


async def test_one_bad_key_of_a_batch_fails_alone(isolate: Isolate, raw: redis.Redis) -> None:
    raw.rpush(LOCK, "a list")
    isolation = isolate()

    async def enter(n: int) -> int:
        async with isolation.lock(key_of(n)):
            return n

    found = await asyncio.gather(*map(enter, range(5)), return_exceptions=True)
    assert found[:1] + found[2:] == [0, 2, 3, 4]
    assert isinstance(found[1], RedisUnavailable)
    assert "WRONGTYPE" in str(found[1])
    assert LOCK in str(found[1])


# Beside aiogram's own


async def test_aiograms_lock_and_this_one_keep_each_other_out(isolate: Isolate, redis_url: str) -> None:
    client = Redis.from_url(redis_url)
    aiograms = RedisEventIsolation(client, lock_kwargs={"timeout": 60, "blocking_timeout": 0.2})
    patient = RedisEventIsolation(client, lock_kwargs={"timeout": 60, "blocking_timeout": 30})
    async with aiograms.lock(key_of(1)):
        with pytest.raises(LeaseTimeout):
            # Within which Redis has answered, also after the machine stood still.
            async with isolate(timeout=2.5).lock(key_of(1)):
                pytest.fail("it entered")
    async with isolate().lock(key_of(1)):
        with pytest.raises(redis.exceptions.LockError):
            async with aiograms.lock(key_of(1)):
                pytest.fail("it entered")
    async with asyncio.timeout(30), patient.lock(key_of(1)):  # it is given back a moment later
        pass
    await client.aclose()


# Waiting in vain


async def test_a_handler_does_not_run_while_redis_does_not_answer(
    make: Make, proxy: Proxy, raw: redis.Redis
) -> None:
    storage = make(proxy.url, mirror=False, timeout=0.5)
    isolation = storage.create_isolation(timeout=10)
    proxy.hold()
    began = time.monotonic()
    with pytest.raises((StorageTimeout, StorageUnavailable)):
        async with isolation.lock(key_of(1)):
            pytest.fail("it entered")
    assert time.monotonic() - began < 10
    proxy.mend()
    await in_time(lambda: enter(isolation, 2))
    await isolation.close()


async def test_a_redis_that_is_down_is_a_clear_error_and_the_lock_works_again_after_it(
    own_redis: RedisServer,
) -> None:
    storage = RedisStorage.from_url(own_redis.url, mirror=False, timeout=2.5)
    isolation = storage.create_isolation()
    async with isolation.lock(key_of(1)):
        waiting = asyncio.create_task(enter(isolation, 1))
        await asyncio.sleep(0)
        await asyncio.to_thread(own_redis.kill)
        began = time.monotonic()
        with pytest.raises(RedisUnavailable, match="Redis of storage 'default' failed"):
            async with isolation.lock(key_of(2)):
                pytest.fail("it entered")
        assert time.monotonic() - began < 15
        waiting.cancel()
    await asyncio.to_thread(own_redis.start)
    await in_time(lambda: enter(isolation, 2))
    await storage.close()
    await isolation.close()


@pytest.mark.slow
async def test_out_of_memory_nobody_enters_and_what_is_held_is_renewed_and_given_back(
    own_redis: RedisServer,
) -> None:
    storage = RedisStorage.from_url(own_redis.url, mirror=False)
    isolation = storage.create_isolation(lease=8.0)
    with redis.Redis(port=own_redis.port) as raw:

        async def is_renewed() -> bool:
            return time.monotonic() + raw.pttl(LOCK) / 1000 > ends + 1.0

        async with isolation.lock(key_of(1)):
            raw.config_set("maxmemory", "1")
            with pytest.raises(RedisUnavailable, match="OOM"):
                async with isolation.lock(key_of(2)):
                    pytest.fail("it entered")
            ends = time.monotonic() + raw.pttl(LOCK) / 1000
            await becomes(is_renewed)
            assert locks(raw) == [LOCK.encode()]
        await none_left(isolation, Keys(own_redis.url, raw))
    await storage.close()
    await isolation.close()


async def enter(isolation: DjangoEventIsolation, n: int) -> None:
    async with isolation.lock(key_of(n)):
        pass


# Losing the lease


@pytest.mark.parametrize("mirror", ["apart", False])
async def test_writes_of_the_lost_and_of_others_share_a_batch(
    make: Make, raw: redis.Redis, mirror: Any
) -> None:
    storage = make(mirror=mirror)
    isolation, results = storage.create_isolation(), {}

    async def hold(n: int) -> None:
        async with isolation.lock(key_of(n)):
            ready.append(n)
            if len(ready) == 3:
                raw.delete(LOCK)
                go.set()
            await go.wait()
            results[n] = await asyncio.gather(
                storage.set_state(key_of(n), "written"),
                storage.update_data(key_of(7), {f"f{n}": n}),
                return_exceptions=True,
            )

    async def free() -> None:
        await go.wait()
        await storage.update_data(key_of(7), {"free": 1})

    ready: list[int] = []
    go = asyncio.Event()
    await asyncio.gather(free(), *map(hold, (1, 2, 3)))
    assert [type(result) for result in results[1]] == [LeaseLost, LeaseLost]
    assert [await storage.get_state(key_of(n)) for n in (1, 2, 3)] == [None, "written", "written"]
    assert await storage.get_data(key_of(7)) == {"f2": 2, "f3": 3, "free": 1}
    if mirror:
        entries = str(raw.xrange("fsm_storage:{default}:outbox"))
        assert "written" in entries
        assert "f1" not in entries
    await isolation.close()


async def test_a_storage_on_another_redis_is_written_to_without_a_fence(
    isolate: Isolate, own_redis: RedisServer
) -> None:
    other = RedisStorage.from_url(own_redis.url, mirror=False)
    async with isolate().lock(key_of(1)):
        await other.set_state(key_of(1), "a")
    assert await other.get_state(key_of(1)) == "a"
    await other.close()


# Loops, closing, options


async def test_an_isolation_by_alias_finds_its_storage(storage: RedisStorage, raw: redis.Redis) -> None:
    storages["on redis"] = storage
    try:
        isolation = DjangoEventIsolation("on redis")
        async with isolation.lock(key_of(1)):
            assert locks(raw) == [LOCK.encode()]
        await isolation.close()
    finally:
        del storages["on redis"]


async def test_the_keys_are_those_of_the_key_builder(make: Make, raw: redis.Redis) -> None:
    storage = make(mirror=False, key_builder=DefaultKeyBuilder(prefix="p", with_bot_id=True))
    isolation = storage.create_isolation()
    async with isolation.lock(key_of(1)):
        assert locks(raw) == [b"p:1:1:1:lock"]
        assert 0 < raw.pttl("p:1:1:1:lock") <= 30_000
    await isolation.close()


async def test_options_that_are_wrong(storage: RedisStorage) -> None:
    with pytest.raises(InvalidStorageError, match=r"takes no lock_kwargs.*lease=.*timeout="):
        storage.create_isolation(lock_kwargs={"timeout": 60})
    with pytest.raises(InvalidStorageError, match="lease of DjangoEventIsolation must be above 0"):
        storage.create_isolation(lease=0)


async def test_a_dispatcher_works_with_it(storage: RedisStorage, raw: redis.Redis) -> None:
    dispatcher, seen = Dispatcher(storage=storage, events_isolation=storage.create_isolation()), []

    @dispatcher.message()
    async def handle(message: Any, state: FSMContext) -> None:
        n = (await state.get_data()).get("n", 0)
        await asyncio.sleep(0)
        await state.update_data(n=n + 1)
        seen.append(locks(raw))

    async with Bot("42:" + "A" * 35) as bot:
        person = {"id": 1, "is_bot": False, "first_name": "A"}
        message = {"message_id": 1, "date": 0, "chat": {"id": 1, "type": "private"}, "from": person}
        await asyncio.gather(
            *(dispatcher.feed_raw_update(bot, {"update_id": n, "message": message}) for n in range(20))
        )
        assert await storage.get_data(StorageKey(bot_id=42, chat_id=1, user_id=1)) == {"n": 20}
        assert seen == [[LOCK.encode()]] * 20
        await dispatcher.emit_shutdown(bot=bot, router=dispatcher, dispatcher=dispatcher)
    assert locks(raw) == []
