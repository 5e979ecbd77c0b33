"""`DjangoEventIsolation` on Redis: one handler at a time, in order, over processes, loops and failures."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
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
    StorageClosed,
    StorageTimeout,
    StorageUnavailable,
)
from tests.redis.conftest import Make
from tests.redis.proxy import Proxy
from tests.redis.writers import key_of
from tests.servers import RedisServer, finish_child, start_child

Isolate = Callable[..., DjangoEventIsolation]
LOCK = "fsm:1:1:lock"
LAST_TOKEN = "fsm_storage:lease_token"


@pytest.fixture
def storage(make: Make) -> RedisStorage:
    return make(mirror=False)


@pytest_asyncio.fixture
async def isolate(storage: RedisStorage) -> AsyncIterator[Isolate]:
    """Make isolations, each an owner of its own, as in processes of their own."""
    made: list[DjangoEventIsolation] = []

    def make(**options: Any) -> DjangoEventIsolation:
        made.append(DjangoEventIsolation(storage=storage, **options))
        return made[-1]

    yield make
    for isolation in made:
        await isolation.close()


def locks(raw: redis.Redis) -> list[bytes]:
    return list(raw.keys("*:lock"))


async def none_left(isolation: DjangoEventIsolation, raw: redis.Redis) -> None:
    """The keys go a moment after the lock was left."""
    _, lines = isolation._open()
    assert lines._lines == {}
    for _ in range(200):
        if not locks(raw):
            break
        await asyncio.sleep(0.02)
    assert locks(raw) == []
    assert lines.keeper.count == 0


@asynccontextmanager
async def child(name: str, *arguments: Any) -> AsyncIterator[subprocess.Popen[str]]:
    process = await asyncio.to_thread(start_child, "tests.redis.writers", name, *map(str, arguments))
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.to_thread(process.communicate)


async def noted(notes: Path, words: str) -> None:
    async with asyncio.timeout(30):
        while not notes.exists() or words not in notes.read_text():
            await asyncio.sleep(0.01)


# Processes


def overlaps(redis_url: str, notes: Path, *owner: str) -> int:
    """Let two processes with eight tasks each take turns; count those that began before another had ended."""
    workers = [
        start_child("tests.redis.writers", "take_turns", redis_url, str(notes), who, "3", "8", *owner)
        for who in "ab"
    ]
    for worker in workers:
        finish_child(worker)
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert {(who, task) for _, _, who, task in lines} == {(who, str(n)) for who in "ab" for n in range(8)}
    turns = sorted((int(began), int(ended)) for began, ended, _, _ in lines)
    return sum(later[0] < earlier[1] for earlier, later in pairwise(turns))


@pytest.mark.slow
def test_turns_of_two_processes_with_eight_tasks_each_never_overlap(
    redis_url: str, raw: redis.Redis, tmp_path: Path
) -> None:
    assert overlaps(redis_url, tmp_path / "notes") == 0
    assert raw.keys() == [LAST_TOKEN.encode()]


@pytest.mark.slow
def test_without_the_check_of_the_lease_they_do(redis_url: str, tmp_path: Path) -> None:
    """Shows that the test before this one would see it."""
    assert overlaps(redis_url, tmp_path / "notes", "the same") > 0


@pytest.mark.slow
async def test_after_a_killed_holder_the_next_one_enters_when_the_lease_ran_out(
    isolate: Isolate, redis_url: str, tmp_path: Path
) -> None:
    lease, notes = 2.0, tmp_path / "notes"
    async with child("hold_for_ever", redis_url, notes, lease) as holder:
        await noted(notes, "wrote 1 ")
        holder.kill()
        entered = int(notes.read_text().split()[2]) / 1e9
    async with isolate().lock(key_of(1)):
        waited = time.monotonic() - entered
    # Its lease was taken a little before its first write, and may have been renewed once.
    assert lease - 0.5 < waited < 2 * lease


@pytest.mark.slow
async def test_a_holder_that_was_stopped_for_two_lease_times_is_refused(
    isolate: Isolate, storage: RedisStorage, redis_url: str, tmp_path: Path
) -> None:
    lease, notes = 2.0, tmp_path / "notes"
    async with child("hold_for_ever", redis_url, notes, lease) as holder:
        await noted(notes, "wrote 20 ")
        holder.send_signal(signal.SIGSTOP)
        async with isolate(lease=30).lock(key_of(1)):
            await storage.set_data(key_of(1), {"n": "mine"})
            before = notes.read_text()
            await asyncio.sleep(lease)
            holder.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(holder.wait, 20) == 0
            assert await storage.get_data(key_of(1)) == {"n": "mine"}
    after = notes.read_text()[len(before) :].split("\n")
    # What it was about to note when it was stopped had been written in time.
    assert [line for line in after if line.startswith("wrote")][1:] == []
    assert f"lost {LOCK}" in after


@pytest.mark.slow
def test_the_child_of_a_fork_has_none_of_its_parents_leases(
    redis_url: str, raw: redis.Redis, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    finish_child(start_child("tests.redis.writers", "lock_after_fork", redis_url, str(notes)))
    assert notes.read_text().splitlines() == ["child timeout", "parent"]
    assert locks(raw) == []


# The lock


async def test_as_aiogram_tests_it(isolate: Isolate, key: StorageKey) -> None:
    isolation = isolate()
    async with isolation.lock(key=key):
        assert True, "Everything is OK"
    async with isolation.lock(key=key):
        assert True, "And again"


@pytest.mark.slow
async def test_a_handler_that_takes_three_lease_times_keeps_its_lease(
    isolate: Isolate, key: StorageKey
) -> None:
    lease, ends = 0.8, []

    async def wait() -> None:
        async with isolate(lease=lease).lock(key):
            ends.append("other")

    async with isolate(lease=lease).lock(key):
        other = asyncio.create_task(wait())
        await asyncio.sleep(3 * lease)
        ends.append("long")
    await other
    assert ends == ["long", "other"]


async def test_first_come_first_served(isolate: Isolate, key: StorageKey, raw: redis.Redis) -> None:
    isolation, order = isolate(), []

    async def work(n: int) -> None:
        async with isolation.lock(key):
            order.append(n)
            await asyncio.sleep(0)

    await asyncio.gather(*map(work, range(50)))
    assert order == list(range(50))
    await none_left(isolation, raw)


async def test_nothing_is_left_for_keys_that_nobody_works_on(isolate: Isolate, raw: redis.Redis) -> None:
    isolation = isolate()

    async def work(n: int) -> None:
        async with isolation.lock(key_of(n % 100)):
            await asyncio.sleep(0)

    await asyncio.gather(*map(work, range(500)))
    await none_left(isolation, raw)
    assert raw.keys() == [LAST_TOKEN.encode()]


async def test_claims_made_together_are_one_command(isolate: Isolate, raw: redis.Redis) -> None:
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
    await none_left(isolation, raw)
    before = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    await asyncio.gather(*map(work, range(200)))
    await none_left(isolation, raw)
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 4


async def test_handed_over_between_processes_within_a_fifth_of_a_second(
    isolate: Isolate, key: StorageKey
) -> None:
    one, other, waited = isolate(), isolate(), []

    async def enter() -> float:
        async with other.lock(key):
            return time.monotonic()

    for _ in range(7):
        async with one.lock(key):
            waiting = asyncio.create_task(enter())
            await asyncio.sleep(0.3)
            left = time.monotonic()
        waited.append(await waiting - left)
    assert sorted(waited)[3] < 0.12
    assert max(waited) < (0.2 if os.getloadavg()[0] < 2 else 1.0)


async def test_tokens_only_grow(isolate: Isolate, storage: RedisStorage, raw: redis.Redis) -> None:
    """Also when the clock of Redis went back, or Redis lost all that it had."""
    isolation, tokens = isolate(), []

    async def take() -> None:
        async with isolation.lock(key_of(1)):
            value = raw.get(LOCK)
            assert isinstance(value, bytes)
            tokens.append(int(value.split()[0]))
        await none_left(isolation, raw)

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
    async with aiograms.lock(key_of(1)):
        with pytest.raises(LeaseTimeout):
            async with isolate(timeout=0.2).lock(key_of(1)):
                pytest.fail("it entered")
    async with isolate().lock(key_of(1)):
        with pytest.raises(redis.exceptions.LockError):
            async with aiograms.lock(key_of(1)):
                pytest.fail("it entered")
    async with asyncio.timeout(5), aiograms.lock(key_of(1)):
        pass
    await client.aclose()


# Waiting in vain


async def test_waiters_have_a_timeout(isolate: Isolate, raw: redis.Redis) -> None:
    one, other = isolate(timeout=0.2), isolate(timeout=0.3)
    async with one.lock(key_of(1)):
        for isolation in (one, other):
            began = time.monotonic()
            with pytest.raises(LeaseTimeout, match=rf"'{LOCK}' not granted within 0\.[23] s"):
                async with isolation.lock(key_of(1)):
                    pytest.fail("it entered")
            assert time.monotonic() - began < 2
        assert other._open()[1]._lines == {}
    await none_left(one, raw)


async def test_waiters_that_are_cancelled_leave_nothing_behind(isolate: Isolate, raw: redis.Redis) -> None:
    isolation, entered = isolate(), []

    async def work(n: int) -> None:
        async with isolation.lock(key_of(1)):
            entered.append(n)
            await asyncio.sleep(0.001)

    for delay in (0, 0.0005, 0.002, 0.005, 0.01):
        entered.clear()
        tasks = [asyncio.create_task(work(n)) for n in range(40)]
        await asyncio.sleep(delay)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert set(entered) >= set(range(1, 40, 2))
        assert entered == sorted(entered)
        await none_left(isolation, raw)


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
    assert time.monotonic() - began < 3
    proxy.mend()
    async with isolation.lock(key_of(2)):
        pass
    await isolation.close()


async def test_a_redis_that_is_down_is_a_clear_error_and_the_lock_works_again_after_it(
    own_redis: RedisServer,
) -> None:
    storage = RedisStorage.from_url(own_redis.url, mirror=False, timeout=1.0)
    isolation = storage.create_isolation()
    async with isolation.lock(key_of(1)):
        waiting = asyncio.create_task(enter_when_free(isolation))
        await asyncio.sleep(0)
        await asyncio.to_thread(own_redis.kill)
        began = time.monotonic()
        with pytest.raises(RedisUnavailable, match="Redis of storage 'default' failed"):
            async with isolation.lock(key_of(2)):
                pytest.fail("it entered")
        assert time.monotonic() - began < 4
        waiting.cancel()
    await asyncio.to_thread(own_redis.start)
    async with isolation.lock(key_of(2)):
        pass
    await storage.close()
    await isolation.close()


@pytest.mark.slow
async def test_out_of_memory_nobody_enters_and_what_is_held_is_renewed_and_given_back(
    own_redis: RedisServer,
) -> None:
    storage = RedisStorage.from_url(own_redis.url, mirror=False, timeout=2.0)
    isolation = storage.create_isolation(lease=0.6)
    with redis.Redis(port=own_redis.port) as raw:
        async with isolation.lock(key_of(1)):
            raw.config_set("maxmemory", "1")
            with pytest.raises(RedisUnavailable, match="OOM"):
                async with isolation.lock(key_of(2)):
                    pytest.fail("it entered")
            await asyncio.sleep(1.5)
            assert locks(raw) == [LOCK.encode()]
        await none_left(isolation, raw)
    await storage.close()
    await isolation.close()


async def enter_when_free(isolation: DjangoEventIsolation) -> None:
    async with isolation.lock(key_of(1)):
        pass


# Losing the lease


async def test_a_write_under_a_lease_that_is_anothers_is_refused_by_redis(
    isolate: Isolate, storage: RedisStorage, raw: redis.Redis
) -> None:
    """The process does not know it yet."""
    key, isolation = key_of(1), isolate()
    await storage.set_data(key, {"a": 1})
    async with isolation.lock(key):
        await storage.set_state(key, "in time")
        assert await storage.update_data(key, {"b": 2}) == {"a": 1, "b": 2}
        raw.set(LOCK, "1 another")
        for write in (
            lambda: storage.set_state(key, "late"),
            lambda: storage.set_state(key, None),
            lambda: storage.set_data(key, {"late": 1}),
            lambda: storage.set_data(key, {}),
            lambda: storage.update_data(key, {"late": 1}),
            lambda: storage.set_state(key_of(2), "late"),
        ):
            with pytest.raises(LeaseLost, match=LOCK):
                await write()
        raw.delete(LOCK)
        together = await asyncio.gather(
            *(storage.set_state(key_of(n), "late") for n in range(10)), return_exceptions=True
        )
        assert {type(outcome) for outcome in together} == {LeaseLost}
    assert (await storage.get_state(key), await storage.get_data(key)) == ("in time", {"a": 1, "b": 2})
    assert await storage.get_state(key_of(2)) is None


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


@pytest.mark.slow
async def test_a_handler_that_lost_its_lease_is_cancelled(isolate: Isolate, raw: redis.Redis) -> None:
    met: list[str] = []

    async def handle() -> None:
        async with isolate(lease=0.6).lock(key_of(1)):
            raw.delete(LOCK)
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError as error:
                met.append(str(error))
                raise

    with pytest.raises(LeaseLost, match=f"'{LOCK}' lost"):
        await asyncio.wait_for(handle(), 10)
    assert met == [f"the lease on '{LOCK}' is lost"]


async def test_what_a_handler_started_may_outlive_its_lock(
    isolate: Isolate, storage: RedisStorage, raw: redis.Redis
) -> None:
    isolation, left = isolate(), asyncio.Event()

    async def afterwards() -> None:
        await left.wait()
        await storage.set_state(key_of(1), "afterwards")

    async with isolation.lock(key_of(1)):
        task = asyncio.create_task(afterwards())
        await asyncio.sleep(0)
    await none_left(isolation, raw)
    left.set()
    await task
    assert await storage.get_state(key_of(1)) == "afterwards"


async def test_a_storage_on_another_redis_is_written_to_without_a_fence(
    isolate: Isolate, own_redis: RedisServer
) -> None:
    other = RedisStorage.from_url(own_redis.url, mirror=False)
    async with isolate().lock(key_of(1)):
        await other.set_state(key_of(1), "a")
    assert await other.get_state(key_of(1)) == "a"
    await other.close()


# Loops, closing, options


def test_loops_in_threads_of_their_own_take_turns(redis_url: str, raw: redis.Redis) -> None:
    storage = RedisStorage.from_url(redis_url, mirror=False)
    isolation = DjangoEventIsolation(storage=storage)
    inside, most, count = 0, 0, 0

    async def once() -> None:
        nonlocal inside, most, count
        async with isolation.lock(key_of(1)):
            inside += 1
            most = max(most, inside)
            count += 1
            await asyncio.sleep(0.001)
            inside -= 1

    async def main() -> None:
        await asyncio.gather(*(once() for _ in range(25)))

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, count) == (1, 100)
    assert isolation._open()[1]._lines == {}
    asyncio.run(isolation.close())
    asyncio.run(storage.close())
    assert locks(raw) == []


def test_a_lock_left_at_the_end_of_a_loop_is_given_back(redis_url: str, raw: redis.Redis) -> None:
    """As by `async_to_sync`: the loop ends before the answer, or before it was even sent."""
    storage = RedisStorage.from_url(redis_url, mirror=False)
    isolation = DjangoEventIsolation(storage=storage, timeout=10)

    async def once() -> None:
        async with isolation.lock(key_of(1)):
            await storage.set_state(key_of(1), "a")

    for _ in range(5):
        asyncio.run(once())
    deadline = time.monotonic() + 10
    while locks(raw):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asyncio.run(isolation.close())
    asyncio.run(storage.close())


@pytest.mark.parametrize("storage_first", [True, False])
async def test_close_gives_back_what_is_held(
    isolate: Isolate, storage: RedisStorage, raw: redis.Redis, storage_first: bool
) -> None:
    """aiogram's Dispatcher closes the storage first."""
    isolation, outcomes, is_in = isolate(), [], asyncio.Event()

    async def work() -> None:
        try:
            async with isolation.lock(key_of(1)):
                is_in.set()
                await asyncio.sleep(30)
        except Exception as error:
            outcomes.append(type(error))

    tasks = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.wait_for(is_in.wait(), 10)
    if storage_first:
        await storage.close()
    await isolation.close()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert outcomes.count(LeaseLost) == 1
    assert outcomes.count(StorageClosed) == 2
    assert locks(raw) == []
    with pytest.raises(StorageClosed, match="isolation is closed"):
        isolation.lock(key_of(1))


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
