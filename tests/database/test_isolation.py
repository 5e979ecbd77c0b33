"""`DjangoEventIsolation`: one handler at a time, in order, over processes, loops and failures."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoEventIsolation, DjangoStorage, LeaseLost, LeaseTimeout, MemoryStorage, storages
from fsm_storage.exceptions import (
    InvalidStorageError,
    StorageClosed,
    StorageTimeout,
    StorageUnavailable,
)
from fsm_storage.models import FSMLease
from tests.database.conftest import Launcher, Statements, wait_for
from tests.database.writers import key_of
from tests.rows import in_thread, record
from tests.servers import Mariadb, Postgres

Isolate = Callable[..., DjangoEventIsolation]


@pytest_asyncio.fixture
async def isolate(storage: DjangoStorage) -> AsyncIterator[Isolate]:
    """Make isolations, each an owner of its own, as in processes of their own."""
    made: list[DjangoEventIsolation] = []

    def make(**options: Any) -> DjangoEventIsolation:
        made.append(DjangoEventIsolation(storage=storage, **options))
        return made[-1]

    yield make
    for isolation in made:
        await isolation.close()


def leases(database: str) -> list[str]:
    return list(FSMLease.objects.using(database).values_list("key", flat=True))


async def none_left(isolation: DjangoEventIsolation, database: str) -> None:
    """The rows go a moment after the lock was left."""
    _, lines = isolation._open()
    assert lines._lines == {}
    for _ in range(500):
        if not await in_thread(leases, database):
            break
        await asyncio.sleep(0.02)
    assert await in_thread(leases, database) == []
    assert lines.keeper.count == 0


def overlaps(path: Path) -> int:
    """Count the turns that began before another one had ended."""
    turns = sorted(tuple(map(int, line.split()[:2])) for line in path.read_text().splitlines())
    assert len(turns) > 20
    return sum(later[0] < earlier[1] for earlier, later in pairwise(turns))


# Processes


@pytest.mark.slow
def test_turns_of_two_processes_with_eight_tasks_each_never_overlap(
    database: str, launcher: Launcher, notes: Path
) -> None:
    workers = [launcher.start("take_turns", database, str(notes), who, 4.0, 8) for who in "ab"]
    assert [launcher.wait(pid) for pid in workers] == [0, 0]
    assert overlaps(notes) == 0
    assert {tuple(line.split()[2:]) for line in notes.read_text().splitlines()} == {
        (who, str(task)) for who in "ab" for task in range(8)
    }
    assert leases(database) == []


@pytest.mark.slow
def test_without_the_check_of_the_lease_they_do(database: str, launcher: Launcher, notes: Path) -> None:
    """Shows that the test before this one would see it."""
    workers = [launcher.start("take_turns", database, str(notes), who, 2.0, 8, "the same") for who in "ab"]
    assert [launcher.wait(pid) for pid in workers] == [0, 0]
    assert overlaps(notes) > 0


@pytest.mark.slow
async def test_after_a_killed_holder_the_next_one_enters_when_the_lease_ran_out(
    isolate: Isolate, database: str, launcher: Launcher, notes: Path
) -> None:
    lease = 2.0
    pid = await asyncio.to_thread(launcher.start, "hold_for_ever", database, str(notes), lease)
    await asyncio.to_thread(wait_for, lambda: notes.exists() and "wrote 1\n" in notes.read_text())
    await asyncio.to_thread(launcher.kill, pid)
    entered = int(notes.read_text().split()[1]) / 1e9
    async with isolate().lock(key_of(1)):
        waited = time.monotonic() - entered
    # Its claim was sent, and counted by the database, a little before it entered.
    assert lease - 0.2 < waited < 2 * lease


@pytest.mark.slow
async def test_a_holder_that_was_stopped_for_two_lease_times_is_refused(
    isolate: Isolate, storage: DjangoStorage, database: str, launcher: Launcher, notes: Path
) -> None:
    lease = 3.0
    pid = await asyncio.to_thread(launcher.start, "hold_for_ever", database, str(notes), lease)
    await asyncio.to_thread(wait_for, lambda: notes.exists() and "wrote 5\n" in notes.read_text(), 20)
    os.kill(pid, signal.SIGSTOP)
    try:
        async with isolate(lease=30).lock(key_of(1)):
            await storage.set_data(key_of(1), {"n": "mine"})
            before = notes.read_text()
            await asyncio.sleep(lease)
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.to_thread(launcher.wait, pid) == 0
            assert await storage.get_data(key_of(1)) == {"n": "mine"}
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    after = notes.read_text()[len(before) :].split("\n")
    # What it was about to note when it was stopped had been written in time.
    assert [line for line in after if line.startswith("wrote")][1:] == []
    assert f"lost {storage.key_text(key_of(1))}" in after


def test_the_child_of_a_fork_has_none_of_its_parents_leases(
    database: str, launcher: Launcher, notes: Path
) -> None:
    assert launcher.wait(launcher.start("lock_after_fork", database, str(notes))) == 0
    assert notes.read_text().splitlines() == ["child timeout", "parent"]
    assert leases(database) == []


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


async def test_first_come_first_served(isolate: Isolate, key: StorageKey) -> None:
    isolation, order = isolate(), []

    async def work(n: int) -> None:
        async with isolation.lock(key):
            order.append(n)
            await asyncio.sleep(0)

    await asyncio.gather(*map(work, range(50)))
    assert order == list(range(50))


async def test_a_line_of_waiters_takes_the_lease_once(
    isolate: Isolate, statements: Statements, key: StorageKey, database: str
) -> None:
    isolation = isolate()

    async def work() -> None:
        async with isolation.lock(key):
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(50)))
    await none_left(isolation, database)
    each = 2 if database == "mariadb" else 1
    assert len([sql for sql in statements.seen if "fsm_storage_lease" in sql]) == 2 * each


async def test_different_keys_do_not_wait_for_one_another(isolate: Isolate, storage: DjangoStorage) -> None:
    isolation, inside = isolate(), 0
    keys = [
        StorageKey(1, 2, 3),
        StorageKey(2, 2, 3),
        StorageKey(1, 2, 4),
        StorageKey(1, 2, 3, thread_id=0),
        StorageKey(1, 2, 3, business_connection_id=""),
        StorageKey(1, 2, 3, destiny="x"),
    ]
    all_in = asyncio.Event()

    async def work(key: StorageKey) -> None:
        nonlocal inside
        async with isolation.lock(key):
            inside += 1
            if inside == len(keys):
                all_in.set()
            await asyncio.wait_for(all_in.wait(), 10)

    await asyncio.gather(*map(work, keys))


async def test_nothing_is_left_for_keys_that_nobody_works_on(isolate: Isolate, database: str) -> None:
    isolation = isolate()

    async def work(n: int) -> None:
        async with isolation.lock(key_of(n % 100)):
            await asyncio.sleep(0)

    await asyncio.gather(*map(work, range(500)))
    await none_left(isolation, database)


async def test_handed_over_between_processes_within_a_fifth_of_a_second(
    isolate: Isolate, key: StorageKey
) -> None:
    one, other = isolate(), isolate()
    waited = []
    for _ in range(7):
        left = 0.0

        async def enter() -> float:
            async with other.lock(key):
                return time.monotonic()

        async with one.lock(key):
            waiting = asyncio.create_task(enter())
            await asyncio.sleep(0.3)
            left = time.monotonic()
        waited.append(await waiting - left)
    assert statistics.median(waited) < 0.2
    assert max(waited) < (0.2 if os.getloadavg()[0] < 2 else 1.0)


@pytest.mark.slow
async def test_a_busy_line_lets_other_processes_in(isolate: Isolate, key: StorageKey) -> None:
    busy, stopping = isolate(), False

    async def work() -> None:
        while not stopping:
            async with busy.lock(key):
                await asyncio.sleep(0.005)

    tasks = [asyncio.create_task(work()) for _ in range(4)]
    await asyncio.sleep(0.1)
    began = time.monotonic()
    async with isolate().lock(key):
        waited = time.monotonic() - began
    stopping = True
    await asyncio.gather(*tasks)
    assert waited < 4


# Waiting in vain


async def test_a_waiter_in_the_line_has_a_timeout(isolate: Isolate, database: str) -> None:
    isolation = isolate(timeout=timedelta(seconds=0.2))
    async with isolation.lock(key_of(1)):
        began = time.monotonic()
        with pytest.raises(LeaseTimeout, match=r"'1:1:1' not granted within 0\.2 s") as caught:
            async with isolation.lock(key_of(1)):
                pytest.fail("it entered")
        assert time.monotonic() - began < 2
        assert caught.value.key == "1:1:1"
        assert isinstance(caught.value, TimeoutError)
    await none_left(isolation, database)


async def test_a_waiter_for_another_process_has_a_timeout(isolate: Isolate, database: str) -> None:
    one, other = isolate(), isolate(timeout=0.3)
    async with one.lock(key_of(1)):
        with pytest.raises(LeaseTimeout):
            async with other.lock(key_of(1)):
                pytest.fail("it entered")
        assert other._open()[1]._lines == {}
    await none_left(one, database)


async def test_waiters_that_are_cancelled_leave_nothing_behind(isolate: Isolate, database: str) -> None:
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
        await none_left(isolation, database)


async def test_a_handler_that_raises_gives_the_lock_back(isolate: Isolate, database: str) -> None:
    isolation = isolate()
    with pytest.raises(ZeroDivisionError):
        async with isolation.lock(key_of(1)):
            raise ZeroDivisionError
    await none_left(isolation, database)


async def test_a_handler_does_not_run_while_the_database_is_away(
    isolate: Isolate, statements: Statements, database: str
) -> None:
    isolation = isolate(timeout=0.4)
    with statements.held():
        began = time.monotonic()
        with pytest.raises(StorageTimeout):
            async with isolation.lock(key_of(1)):
                pytest.fail("it entered")
        assert time.monotonic() - began < 2
    await none_left(isolation, database)


@pytest.mark.slow
async def test_a_killed_server_is_a_clear_error_and_the_lock_works_again_after_it(
    own_database: str, own_server: Postgres | Mariadb
) -> None:
    storage = DjangoStorage(own_database, database=own_database, timeout=3.0)
    isolation = storage.create_isolation()
    async with isolation.lock(key_of(1)):
        pass
    await asyncio.to_thread(own_server.kill)
    began = time.monotonic()
    with pytest.raises((StorageUnavailable, StorageTimeout)):
        async with isolation.lock(key_of(2)):
            pytest.fail("it entered")
    assert time.monotonic() - began < 4
    await asyncio.to_thread(own_server.start)
    async with isolation.lock(key_of(2)):
        pass
    await storage.close()
    await isolation.close()


# Losing the lease


async def take_away(storage: DjangoStorage) -> None:
    await in_thread(FSMLease.objects.using(storage.database).all().delete)


async def test_a_write_under_a_lease_that_is_anothers_is_refused_by_the_database(
    isolate: Isolate, storage: DjangoStorage, database: str
) -> None:
    """The process does not know it yet; whatever the way in which the database writes."""
    key, isolation = key_of(1), isolate()
    await storage.set_data(key, {"a": 1})
    async with isolation.lock(key):
        await storage.set_state(key, "in time")
        await take_away(storage)
        for write in (
            lambda: storage.set_state(key, "late"),
            lambda: storage.set_state(key, None),
            lambda: storage.set_data(key, {"late": 1}),
            lambda: storage.set_data(key, {}),
            lambda: storage.update_data(key, {"late": 1}),
            lambda: storage.set_state(key_of(2), "late"),
        ):
            with pytest.raises(LeaseLost, match="'1:1:1'"):
                await write()
        together = await asyncio.gather(
            *(storage.set_state(key_of(n), "late") for n in range(10)), return_exceptions=True
        )
        assert {type(outcome) for outcome in together} == {LeaseLost}
    assert (await storage.get_state(key), await storage.get_data(key)) == ("in time", {"a": 1})
    assert await storage.get_state(key_of(2)) is None


@pytest.mark.parametrize("history", ["off", "states", "full"])
async def test_writes_of_the_lost_and_of_others_share_a_batch(
    make_storage: Callable[..., DjangoStorage], statements: Statements, history: str
) -> None:
    storage = make_storage(history=history)
    isolation = storage.create_isolation()

    async def hold(n: int) -> Any:
        async with isolation.lock(key_of(n)):
            if n == 1:
                await in_thread(FSMLease.objects.using(storage.database).filter(key="1:1:1").delete)
            ready.append(n)
            while len(ready) < 3:
                await asyncio.sleep(0.01)
            with suppress(LeaseLost):
                await storage.set_state(key_of(n), "written")

    ready: list[int] = []
    tasks = [asyncio.create_task(hold(n)) for n in (1, 2)]
    while len(ready) < 2:
        await asyncio.sleep(0.01)
    with statements.held():
        ready.append(3)
        tasks.append(asyncio.create_task(storage.set_state(key_of(3), "written")))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
    await asyncio.gather(*tasks)
    assert [await storage.get_state(key_of(n)) for n in (1, 2, 3)] == [None, "written", "written"]
    await isolation.close()


@pytest.mark.slow
async def test_a_handler_that_lost_its_lease_is_cancelled(isolate: Isolate, storage: DjangoStorage) -> None:
    met: list[str] = []

    async def handle() -> None:
        async with isolate(lease=0.6).lock(key_of(1)):
            await take_away(storage)
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError as error:
                met.append(str(error))
                raise

    with pytest.raises(LeaseLost, match="'1:1:1' lost"):
        await asyncio.wait_for(handle(), 10)
    assert met == ["the lease on '1:1:1' is lost"]
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


@pytest.mark.slow
async def test_a_handler_that_ends_before_it_learns_of_it_is_told_too(isolate: Isolate) -> None:
    isolation = isolate(lease=0.3)
    with pytest.raises(LeaseLost):
        async with isolation.lock(key_of(1)):
            isolation._open()[1].keeper._held["1:1:1"].deadline = 0.0


async def test_what_a_handler_started_may_outlive_its_lock(
    isolate: Isolate, storage: DjangoStorage, database: str
) -> None:
    isolation = isolate()

    async def afterwards() -> None:
        await left.wait()
        await storage.set_state(key_of(1), "afterwards")

    left = asyncio.Event()
    async with isolation.lock(key_of(1)):
        task = asyncio.create_task(afterwards())
        await asyncio.sleep(0)
    await none_left(isolation, database)
    left.set()
    await task
    assert await storage.get_state(key_of(1)) == "afterwards"


async def test_locks_within_locks(isolate: Isolate, storage: DjangoStorage, database: str) -> None:
    isolation = isolate()
    async with isolation.lock(key_of(1)):
        async with isolation.lock(key_of(2)):
            await storage.set_state(key_of(2), "inner")
        await storage.set_state(key_of(1), "outer")
    assert await storage.get_state(key_of(1)) == "outer"
    await none_left(isolation, database)


async def test_a_storage_on_another_table_is_written_to_without_a_fence(
    isolate: Isolate, make_storage: Callable[..., DjangoStorage]
) -> None:
    other, memory = make_storage(alias="other"), MemoryStorage()
    async with isolate().lock(key_of(1)):
        await other.set_state(key_of(1), "a")
        await memory.set_state(key_of(1), "b")
    assert await other.get_state(key_of(1)) == "a"
    await other.close()


# Loops, threads, closing


def test_loops_in_threads_of_their_own_take_turns(storage: DjangoStorage, database: str) -> None:
    from tests.database.test_loops import in_threads

    isolation = DjangoEventIsolation(storage=storage)
    inside, most, count = 0, 0, 0

    def work() -> None:
        async def main() -> None:
            async def once() -> None:
                nonlocal inside, most, count
                async with isolation.lock(key_of(1)):
                    inside += 1
                    most = max(most, inside)
                    count += 1
                    await asyncio.sleep(0.001)
                    inside -= 1

            await asyncio.gather(*(once() for _ in range(25)))

        asyncio.run(main())

    in_threads(*[work] * 4)
    assert (most, count) == (1, 100)
    assert isolation._open()[1]._lines == {}
    asyncio.run(isolation.close())
    assert leases(database) == []


def test_short_lived_loops_one_after_the_other(storage: DjangoStorage, database: str) -> None:
    isolation = DjangoEventIsolation(storage=storage)

    async def once() -> None:
        async with isolation.lock(key_of(1)):
            await storage.set_state(key_of(1), "a")

    for _ in range(5):
        asyncio.run(asyncio.wait_for(once(), 10))
    asyncio.run(isolation.close())
    assert leases(database) == []


@pytest.mark.parametrize("storage_first", [True, False])
async def test_close_gives_back_what_is_held(
    isolate: Isolate, storage: DjangoStorage, database: str, storage_first: bool
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
    assert await in_thread(leases, database) == []
    with pytest.raises(StorageClosed, match="isolation is closed"):
        isolation.lock(key_of(1))
    await isolation.close()


async def test_an_isolation_by_alias_finds_its_storage_when_it_is_used(database: str) -> None:
    isolation = DjangoEventIsolation(database)
    async with isolation.lock(key_of(1)):
        assert await in_thread(leases, database) == ["1:1:1"]
    await storages[database].close()  # the storages make it anew
    async with isolation.lock(key_of(1)):
        pass
    await isolation.close()
    assert await in_thread(leases, database) == []


async def test_an_isolation_works_in_the_transaction_of_a_test(
    make_storage: Callable[..., DjangoStorage], database: str
) -> None:
    storage = make_storage(in_transaction=True)
    isolation = storage.create_isolation()
    async with isolation.lock(key_of(1)):
        await storage.set_state(key_of(1), "a")
    assert (await in_thread(record, database, chat_id=1)).state == "a"
    await isolation.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lease": 0}, "lease of DjangoEventIsolation must be above 0"),
        ({"lease": True}, "lease of DjangoEventIsolation must be seconds or a timedelta, not bool"),
        ({"timeout": None}, "timeout of DjangoEventIsolation must be seconds or a timedelta, not None"),
        ({"timeout": "5"}, "timeout of DjangoEventIsolation must be seconds or a timedelta, not str"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidStorageError, match=words):
        DjangoEventIsolation(**options)


def test_a_storage_that_keeps_nothing_in_django(monkeypatch: pytest.MonkeyPatch) -> None:
    storages["memory"] = MemoryStorage()
    try:
        with pytest.raises(InvalidStorageError, match="'memory' is a MemoryStorage"):
            DjangoEventIsolation("memory").lock(key_of(1))
    finally:
        del storages["memory"]
