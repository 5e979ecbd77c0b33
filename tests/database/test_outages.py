"""Servers that go away and come back, dropped connections, and a database that somebody else has locked."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.backends.carrying import Carrier
from fsm_storage.exceptions import StorageTimeout, StorageUnavailable
from tests.conftest import MARIADB, POSTGRES, SQLITE
from tests.database.conftest import in_time
from tests.loop_watch import watched_loop
from tests.rows import (
    OtherSession,
    drop_connections,
    execute,
    in_thread,
    is_deadlock,
    now_of,
    record,
    transitions,
)
from tests.servers import Mariadb, Postgres

Make = Callable[..., DjangoStorage]
ON_SERVERS = pytest.mark.parametrize("database", [POSTGRES, MARIADB], indirect=True)
ONLY_SQLITE = pytest.mark.parametrize("database", [SQLITE], indirect=True)
TIMEOUT = 1.5
CLEAR = (StorageTimeout, StorageUnavailable)


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


class Load:
    """Tasks that write a new field again and again, and remember how each write went."""

    def __init__(self, storage: DjangoStorage, tasks: int) -> None:
        self.storage = storage
        self.acknowledged: dict[int, set[str]] = {n: set() for n in range(tasks)}
        self.errors: list[BaseException] = []
        self.slowest = 0.0
        self._goes_on = True
        self._tasks = [asyncio.create_task(self._write(n)) for n in range(tasks)]

    async def _write(self, n: int) -> None:
        count = 0
        while self._goes_on:
            count += 1
            began = time.monotonic()
            try:
                await self.storage.update_data(chat(n), {f"f{count}": count})
                await self.storage.get_state(chat(n))
            except Exception as error:
                self.errors.append(error)
            else:
                self.acknowledged[n].add(f"f{count}")
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._goes_on = False
        await asyncio.wait_for(asyncio.gather(*self._tasks), 10)

    @property
    def total(self) -> int:
        return sum(map(len, self.acknowledged.values()))

    async def wait_for_writes(self, more: int = 50) -> None:
        goal = self.total + more
        async with asyncio.timeout(15):
            while self.total < goal:
                await asyncio.sleep(0.01)


async def is_refused_in_time(ask: Callable[[], Awaitable[Any]]) -> bool:
    """Say whether a clear error comes within the timeout, one time in three: a busy machine stands still for longer."""
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(CLEAR):
            await ask()
        if time.monotonic() - began < TIMEOUT + 0.5:
            return True
    return False


@pytest.mark.parametrize("away", ["stop", "kill"])
async def test_a_server_that_goes_and_comes_back_under_load(
    own_database: str, own_server: Postgres | Mariadb, away: str
) -> None:
    storage = DjangoStorage(own_database, database=own_database, timeout=TIMEOUT)
    await in_time(lambda: storage.set_state(chat(0), "before"), TIMEOUT)
    load = Load(storage, 20)
    await load.wait_for_writes()
    await asyncio.to_thread(getattr(own_server, away))
    await asyncio.sleep(2 * TIMEOUT)
    # Each call that met the outage was told so in time, and the loop went on.
    assert load.errors
    assert [error for error in load.errors if not isinstance(error, CLEAR)] == []
    # A call of the load is a write and a read, each of which may take the whole timeout.
    assert load.slowest < 4 * TIMEOUT - 0.2  # not twice as long
    assert await is_refused_in_time(lambda: storage.get_state(chat(0)))
    await asyncio.to_thread(own_server.start)
    # The first call after the restart.
    assert await in_time(lambda: storage.get_state(chat(0)), TIMEOUT) == "before"
    await load.wait_for_writes()
    await load.stop()
    for n, fields in load.acknowledged.items():
        found = await in_time(lambda n=n: storage.get_data(chat(n)), TIMEOUT)  # type: ignore[misc]
        assert fields <= found.keys()
    await storage.close()


async def test_the_first_write_after_a_restart_works(
    own_database: str, own_server: Postgres | Mariadb
) -> None:
    storage = DjangoStorage(own_database, database=own_database)
    await storage.set_state(chat(0), "before")
    await storage.set_data(chat(0), {"a": 1})
    for _ in range(2):
        await asyncio.to_thread(own_server.stop)
        await asyncio.to_thread(own_server.start)
        assert await storage.update_data(chat(0), {"b": 1}) == {"a": 1, "b": 1}
        assert await storage.get_state(chat(0)) == "before"
    await storage.close()


@pytest.mark.parametrize("own_server", ["postgres"], indirect=True)
async def test_closing_waits_no_longer_than_the_timeout(own_database: str, own_server: Postgres) -> None:
    storage = DjangoStorage(own_database, database=own_database, timeout=2 * TIMEOUT)
    await asyncio.gather(*(storage.set_state(chat(n), "before") for n in range(20)))
    server = psutil.Process(own_server.pid)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        writes = [asyncio.create_task(storage.set_state(chat(n), "after")) for n in range(20)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await storage.close()
        assert time.monotonic() - began < 3.8 * TIMEOUT
    finally:
        for process in processes:
            process.resume()
    for outcome in await asyncio.gather(*writes, return_exceptions=True):
        assert outcome is None or isinstance(outcome, CLEAR)
    await in_thread(storage.shut)  # its threads were left at work


@pytest.mark.parametrize("own_server", ["postgres"], indirect=True)
@pytest.mark.parametrize("is_apart", [False, True], ids=["loop", "thread"])
async def test_a_crash_of_one_process_of_the_server_fails_no_call(
    own_database: str, monkeypatch: pytest.MonkeyPatch, is_apart: bool
) -> None:
    """PostgreSQL then ends all the others too; over a Unix socket, libpq first learns of it when it writes."""
    if is_apart:
        monkeypatch.setattr(Carrier, "_drive", lambda *args: False)
    storage = DjangoStorage(own_database, database=own_database, timeout=15.0)
    for round_ in range(3):
        await asyncio.gather(*(storage.set_state(chat(n), "before") for n in range(20)))
        os.kill(await in_thread(lambda: backend_of(own_database)), signal.SIGKILL)
        writes = [storage.update_data(chat(n), {f"r{round_}": n}) for n in range(20)]
        reads = [storage.get_state(chat(n)) for n in range(20)]
        assert await asyncio.gather(*reads, *writes)
    for n in range(20):
        assert await storage.get_data(chat(n)) == {"r0": n, "r1": n, "r2": n}
        assert await storage.get_state(chat(n)) == "before"
    await storage.close()


def backend_of(database: str) -> int:
    """Return the id of a process that serves somebody else."""
    try:
        with connections[database].cursor() as cursor:
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            pid: int = cursor.fetchone()[0]
            return pid
    finally:
        connections[database].close()


async def test_a_server_that_is_away_at_the_start(own_database: str, own_server: Postgres | Mariadb) -> None:
    storage = DjangoStorage(own_database, database=own_database, timeout=TIMEOUT)
    await asyncio.to_thread(own_server.stop)

    async def ask() -> None:
        outcomes = await asyncio.gather(
            *(storage.set_state(chat(n), "a") for n in range(10)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} <= set(CLEAR)
        raise StorageUnavailable(own_database, TimeoutError())

    assert await is_refused_in_time(ask)
    await asyncio.to_thread(own_server.start)
    await in_time(lambda: storage.set_state(chat(0), "later"), TIMEOUT)
    assert await in_time(lambda: storage.get_state(chat(0)), TIMEOUT) == "later"
    await storage.close()


@pytest.fixture
def none_open(_django_db_marker: None) -> None:
    """In a session's first test, this thread has the connection that made the tables: it would be dropped too."""
    connections.close_all()


@ON_SERVERS
@pytest.mark.usefixtures("none_open")
async def test_a_dropped_connection_is_replaced_by_the_next_call(
    storage: DjangoStorage, database: str
) -> None:
    await storage.set_state(chat(0), "a")
    await storage.get_state(chat(0))
    calls = [
        lambda: storage.get_state(chat(0)),
        lambda: storage.set_state(chat(0), "a"),
        lambda: storage.update_data(chat(0), {"n": 1}),
        lambda: storage.get_data(chat(0)),
    ]
    for call in calls:
        assert await in_thread(drop_connections, database) >= 1
        await call()
    assert await storage.get_state(chat(0)) == "a"
    assert await storage.get_data(chat(0)) == {"n": 1}


@ON_SERVERS
@pytest.mark.usefixtures("none_open")
async def test_connections_that_drop_under_load_fail_no_call(make_storage: Make, database: str) -> None:
    storage = make_storage(timeout=20.0)
    load = Load(storage, 10)
    for _ in range(10):
        await load.wait_for_writes(20)
        await in_thread(drop_connections, database, "%fsm_storage%")
    await load.wait_for_writes(20)
    await load.stop()
    assert load.errors == []
    for n, fields in load.acknowledged.items():
        assert fields <= (await storage.get_data(chat(n))).keys()


# Locks of others


@contextmanager
def sqlite_locked(database: str) -> Iterator[None]:
    """Hold SQLite's write lock from a connection of somebody else's."""
    other = sqlite3.connect(
        connections[database].settings_dict["NAME"], isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@ONLY_SQLITE
@pytest.mark.slow
@pytest.mark.loop_gap(0.25)
async def test_sqlite_locked_for_two_seconds_is_waited_for(make_storage: Make, database: str) -> None:
    storage = make_storage(timeout=20.0)  # for a busy machine, on which it may be locked for longer
    await storage.set_state(chat(0), "a")
    with sqlite_locked(database):
        began = time.monotonic()
        tasks = [asyncio.create_task(storage.update_data(chat(n), {"n": n})) for n in range(20)]
        await asyncio.sleep(2)
        assert not any(task.done() for task in tasks)
    assert await asyncio.gather(*tasks) == [{"n": n} for n in range(20)]
    assert time.monotonic() - began < 15


@ONLY_SQLITE
@pytest.mark.loop_gap(0.25)
async def test_sqlite_locked_for_longer_is_a_clear_error_in_time(make_storage: Make, database: str) -> None:
    storage = make_storage(timeout=1.0)
    await in_time(lambda: storage.set_state(chat(0), "old"), 1.0)
    with sqlite_locked(database):
        for _ in range(2):
            began = time.monotonic()
            outcomes = await asyncio.gather(
                *(storage.set_state(chat(n), "new") for n in range(10)), return_exceptions=True
            )
            assert time.monotonic() - began < 5
            assert {type(outcome) for outcome in outcomes} <= set(CLEAR)
    assert await in_time(lambda: storage.get_state(chat(0)), 1.0) in ("old", "new")
    await in_time(lambda: storage.set_state(chat(0), "later"), 1.0)
    assert await in_time(lambda: storage.get_state(chat(0)), 1.0) == "later"


@ON_SERVERS
@pytest.mark.parametrize(
    "hold",
    [
        "SELECT 1 FROM fsm_storage_record WHERE chat_id = 3 FOR UPDATE",
        "UPDATE fsm_storage_record SET data = data WHERE chat_id = 3",
        "UPDATE fsm_storage_record SET updated_at = {now} WHERE chat_id = 3",  # makes a new index entry
    ],
    ids=["locked", "updated", "indexed column updated"],
)
async def test_a_row_that_somebody_holds_delays_no_other(
    make_storage: Make, database: str, hold: str
) -> None:
    """A locked row is left out of the batch and asked for again."""
    storage, hasty = make_storage(timeout=20.0), make_storage(timeout=2.0)
    for n in range(10):
        await storage.set_data(chat(n), {"old": n})
    hold = hold.format(now=now_of(database))
    other = await asyncio.to_thread(OtherSession, database)
    try:
        await in_thread(other.execute, hold)
        stuck = asyncio.create_task(storage.update_data(chat(3), {"new": 3}))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        for _ in range(15):
            others = [storage.update_data(chat(n), {"new": n}) for n in range(10) if n != 3]
            await asyncio.gather(*others)
        assert time.monotonic() - began < 8
        assert not stuck.done()
        await in_thread(other.rollback)
        assert await asyncio.wait_for(stuck, 20) == {"old": 3, "new": 3}

        await in_thread(other.execute, hold)
        began = time.monotonic()
        with pytest.raises(CLEAR):
            await hasty.update_data(chat(3), {"never": 3})
        assert time.monotonic() - began < 12
        assert await storage.get_data(chat(3)) == {"old": 3, "new": 3}  # reading needs no lock
        await in_thread(other.rollback)
    finally:
        await in_thread(other.close)
    await storage.set_state(chat(3), "later")


@ON_SERVERS
async def test_a_deadlock_with_somebody_else_is_survived(make_storage: Make, database: str) -> None:
    """Another session locks the same rows, in the other order, again and again."""
    storage = make_storage(timeout=20.0)
    keys = [chat(n) for n in range(6)]
    await asyncio.gather(*(storage.set_data(key, {}) for key in keys))
    await asyncio.gather(*(storage.set_data(key, {"n": 0}) for key in keys))
    ends = threading.Event()

    rounds = 0

    def interfere() -> None:
        nonlocal rounds
        other = OtherSession(database)
        sql = f"UPDATE fsm_storage_record SET updated_at = {now_of(database)} WHERE chat_id = %s"
        while not ends.is_set():
            try:
                for number in (5, 3, 1, 0):
                    other.execute(sql, [number])
                    time.sleep(0.001)
            except Exception as error:
                if not is_deadlock(error):
                    raise
            other.rollback()
            rounds += 1
            time.sleep(0.01)
        other.close()

    interfering = asyncio.create_task(asyncio.to_thread(interfere))
    n = 0
    try:
        while n < 12 or rounds < 2:
            merged = await asyncio.gather(*(storage.update_data(key, {f"f{n}": n}) for key in keys))
            assert all(data[f"f{n}"] == n for data in merged)
            n += 1
    finally:
        ends.set()
        await interfering
    for key in keys:
        assert await storage.get_data(key) == {"n": 0, **{f"f{number}": number for number in range(n)}}


async def test_a_change_and_its_transition_go_together(storage: DjangoStorage, database: str) -> None:
    """The table of transitions is out of the way for a moment: neither is written."""
    await storage.set_state(chat(0), "a")
    await in_thread(execute, database, "ALTER TABLE fsm_storage_transition RENAME TO hidden")
    try:
        with pytest.raises(Exception, match="migrate"):
            await storage.set_state(chat(0), "b")
        assert await storage.get_state(chat(0)) == "a"
    finally:
        await in_thread(execute, database, "ALTER TABLE hidden RENAME TO fsm_storage_transition")
    assert (await in_thread(record, database)).state == "a"
    await storage.set_state(chat(0), "c")
    assert await in_thread(transitions, database) == [(None, "a", "bot", ""), ("a", "c", "bot", "")]


@pytest.mark.loop_gap(5)
async def test_big_data_does_not_stop_the_loop(storage: DjangoStorage) -> None:
    """10 MB are refused by a named limit, nearly 1 MB is kept, of text or of many small values; the loop goes on."""
    gaps: list[float] = []
    while len(gaps) < 3 and not any(gap < 0.25 for gap in gaps):  # a busy machine stands still by itself
        gaps.append(await gap_with_big_data(storage))
    assert min(gaps) < 0.25


async def gap_with_big_data(storage: DjangoStorage) -> float:
    """Return how long the loop has stood still."""
    many = {"rows": [{"id": n, "name": "abc", "n": [1, 2, 3]} for n in range(25_000)]}
    async with watched_loop() as watch:
        await storage.set_data(chat(1), many)
        assert await storage.update_data(chat(1), {"more": 1}) == {**many, "more": 1}
        assert await storage.get_data(chat(1)) == {**many, "more": 1}
        big = {"text": "x" * 1_000_000}
        await storage.set_data(chat(0), big)
        assert await storage.get_data(chat(0)) == big
        with pytest.raises(ValueError, match=r"limit of \d+"):
            await storage.set_data(chat(0), {"text": "x" * 10_000_000})
        with pytest.raises(ValueError, match=r"limit of \d+"):
            await storage.set_data(chat(0), {"list": ["x" * 100] * 100_000})
        assert await storage.get_data(chat(0)) == big
    return watch.longest
