"""Event loops, threads, cancellation, closing and pressure."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable

import pytest
from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import async_to_sync
from django.db import connections

from fsm_storage import DjangoStorage, storages
from fsm_storage.exceptions import StorageClosed, StorageTimeout
from tests.database.conftest import Statements, in_time
from tests.rows import execute, in_thread, record, records

Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


def in_threads(*functions: Callable[[], None]) -> None:
    """Run functions in threads of their own, and raise what one of them raises."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_two_loops_in_two_threads_share_a_storage(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage(timeout=30)

    def work(who: str) -> Callable[[], None]:
        async def main() -> None:
            await asyncio.gather(*(storage.update_data(key, {f"{who}{n}": n}) for n in range(100)))
            for n in range(20):
                await storage.set_state(chat(n), who)
                assert await storage.get_state(chat(n)) in ("a", "b")

        return lambda: asyncio.run(main())

    in_threads(work("a"), work("b"))
    assert record(database, chat_id=key.chat_id).data == {f"{who}{n}": n for who in "ab" for n in range(100)}


def test_an_alias_has_one_storage_in_all_threads(database: str) -> None:
    found: list[object] = []
    in_threads(*[lambda: found.append(storages[database])] * 8)
    assert len(set(map(id, found))) == 1


def test_a_second_run_of_asyncio_finds_the_storage_working(storage: DjangoStorage, key: StorageKey) -> None:
    for n in range(3):
        assert asyncio.run(asyncio.wait_for(storage.update_data(key, {"n": n}), 10)) == {"n": n}


def test_a_loop_that_ended_in_mid_write_leaves_the_storage_working(
    storage: DjangoStorage, statements: Statements, key: StorageKey
) -> None:
    """The reply then finds a closed loop."""

    async def leave() -> None:
        task = asyncio.create_task(storage.set_state(key, "left"))
        while not statements.someone_is_held():
            await asyncio.sleep(0.005)
        task.cancel()

    with statements.held():
        asyncio.run(leave())
    assert asyncio.run(asyncio.wait_for(storage.get_state(key), 10)) in (None, "left")


def test_short_lived_loops_leave_nothing_behind(storage: DjangoStorage, key: StorageKey) -> None:
    for n in range(30):
        async_to_sync(storage.update_data)(key, {"n": n})
    for batcher in (storage._carrier._reads, *storage._carrier._writes):
        assert batcher is not None
        assert len(batcher._lanes) <= 2


async def test_a_thousand_tasks_share_a_few_connections(
    make_storage: Make, database: str, statements: Statements
) -> None:
    storage = make_storage(timeout=30)

    async def talk(n: int) -> None:
        await storage.set_state(chat(n), f"s{n}")
        await storage.update_data(chat(n), {"n": n})
        assert await storage.get_state(chat(n)) == f"s{n}"
        assert await storage.get_data(chat(n)) == {"n": n}

    await asyncio.gather(*map(talk, range(1000)))
    assert statements.connections <= 6
    assert len(await in_thread(records, database)) == 1000


# Cancellation


async def test_cancelled_callers_leave_nothing_open(make_storage: Make, database: str) -> None:
    storage = make_storage(timeout=30)
    choose = random.Random(5)

    async def write(n: int) -> None:
        await storage.set_data(chat(n), {"a": 1, "b": 1})
        await storage.set_data(chat(n), {"a": 2, "b": 2})

    cancelled = 0
    for wait in (0, 0.0005, 0.001, 0.002, 0.004, 0.008):
        tasks = [asyncio.create_task(write(n)) for n in range(100)]
        await asyncio.sleep(wait)
        for task in choose.sample(tasks, 60):
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        cancelled += sum(task.cancelled() for task in tasks)
    assert cancelled >= 60
    for n in range(100):
        assert await storage.get_data(chat(n)) in ({}, {"a": 1, "b": 1}, {"a": 2, "b": 2})
    for _ in range(200):  # a write of a cancelled caller may still be at work
        if not (left_open := await in_thread(open_transactions, database)):
            break
        await asyncio.sleep(0.05)
    assert left_open == 0


def open_transactions(database: str) -> int:
    """Count the transactions that somebody left open."""
    if database == "postgres":
        sql = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        return int(execute(database, sql)[0][0])
    if database == "mariadb":
        return int(execute(database, "SELECT count(*) FROM information_schema.innodb_trx")[0][0])
    other = sqlite3.connect(connections[database].settings_dict["NAME"], timeout=0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return 1
    finally:
        other.close()
    return 0


async def test_a_cancelled_caller_gets_its_cancellation_at_once(
    storage: DjangoStorage, statements: Statements, key: StorageKey
) -> None:
    with statements.held():
        task = asyncio.create_task(storage.set_state(key, "new"))
        while not statements.someone_is_held():
            await asyncio.sleep(0.005)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 5
    # It was on its way already, so it is carried out, whole.
    assert await storage.get_state(key) in (None, "new")
    await storage.set_state(key, "later")
    assert await storage.get_state(key) == "later"


# Closing


async def test_close_finishes_what_was_accepted(storage: DjangoStorage, database: str) -> None:
    tasks = [asyncio.create_task(storage.update_data(chat(n), {"n": n})) for n in range(50)]
    await asyncio.sleep(0)  # all of them are in the queue now
    began = time.monotonic()
    await storage.close()
    assert time.monotonic() - began < 5
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    for n, outcome in enumerate(done):
        assert outcome == {"n": n} or isinstance(outcome, StorageClosed)
    assert sum(isinstance(outcome, dict) for outcome in done) == 50
    rows = await in_thread(records, database)
    assert sorted(row.chat_id for row in rows) == list(range(50))


async def test_close_twice_and_use_afterwards(storage: DjangoStorage, key: StorageKey) -> None:
    await storage.set_state(key, "a")
    await storage.close()
    await storage.close()
    for operation in (
        storage.get_state(key),
        storage.set_state(key, "b"),
        storage.get_data(key),
        storage.set_data(key, {}),
        storage.update_data(key, {}),
        storage.get_value(key, "x"),
    ):
        with pytest.raises(StorageClosed, match="closed"):
            await operation


async def test_a_storage_that_was_never_used_can_be_closed(storage: DjangoStorage, key: StorageKey) -> None:
    await storage.close()
    with pytest.raises(StorageClosed):
        await storage.get_state(key)


async def test_close_is_not_held_up_for_ever(
    make_storage: Make, statements: Statements, key: StorageKey
) -> None:
    storage = make_storage(timeout=0.5)
    with statements.held():
        task = asyncio.create_task(storage.set_state(key, "a"))
        # On a busy machine its time may be up before a thread takes it: then nobody is ever held.
        while not statements.someone_is_held() and not task.done():
            await asyncio.sleep(0.005)
        began = time.monotonic()
        await storage.close()
        assert time.monotonic() - began < 10
        with pytest.raises(StorageTimeout):
            await task


async def test_closing_ends_the_threads(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    others = threading.enumerate()  # those of the test before may be about to end
    await storage.update_data(key, {"a": 1})
    await storage.get_data(key)
    started = [thread for thread in threading.enumerate() if thread not in others]
    threads = [thread for thread in started if thread.name.startswith(f"fsm_storage {database}")]
    assert threads
    await storage.close()
    assert not [thread for thread in threads if thread.is_alive()]


async def test_the_handler_makes_a_closed_storage_anew(database: str, key: StorageKey) -> None:
    """aiogram's Dispatcher closes its storage when polling ends; the web process goes on with the alias."""
    first = storages[database]
    await first.set_state(key, "a")
    await first.close()
    assert storages[database] is not first
    assert await storages[database].get_state(key) == "a"


# Pressure


async def test_past_the_bound_a_caller_waits_and_then_gets_a_clear_error(
    make_storage: Make, statements: Statements
) -> None:
    storage = make_storage(max_pending=5, batch_size=2, timeout=1.0)
    with statements.held():
        tasks = [asyncio.create_task(storage.set_state(chat(n), "a")) for n in range(40)]
        began = time.monotonic()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 10
        assert {type(outcome) for outcome in done} == {StorageTimeout}
        # Those that found no room were told so; the others were in the queue or on their way.
        refused = [outcome for outcome in done if "waiting already" in str(outcome)]
        assert len(refused) >= 40 - 2 * (5 + 5 + 2 + 1), "at most two queues, each with a line and a batch"
        assert all("5 operations" in str(outcome) for outcome in refused)
    await in_time(lambda: storage.set_state(chat(0), "later"), 1.0)
    assert await in_time(lambda: storage.get_state(chat(0)), 1.0) == "later"


async def test_a_caller_who_waits_for_room_goes_on_when_there_is(
    make_storage: Make, statements: Statements, database: str
) -> None:
    storage = make_storage(max_pending=5, batch_size=2, timeout=30)
    with statements.held():
        tasks = [asyncio.create_task(storage.set_state(chat(n), f"s{n}")) for n in range(40)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    rows = await in_thread(records, database)
    assert sorted(row.chat_id for row in rows) == list(range(40))


async def test_a_cancelled_caller_who_waited_for_room_gives_its_turn_away(
    make_storage: Make, statements: Statements
) -> None:
    storage = make_storage(max_pending=2, batch_size=1)
    with statements.held():
        tasks = [asyncio.create_task(storage.set_state(chat(n), "a")) for n in range(20)]
        await asyncio.sleep(0.05)
        for task in tasks[5:15]:
            task.cancel()
        await asyncio.sleep(0)
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [n for n, outcome in enumerate(done) if outcome is None] == [*range(5), *range(15, 20)]
