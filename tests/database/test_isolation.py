"""`DjangoEventIsolation`: one handler at a time, in order, over processes, loops and failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db.models import F, QuerySet

from fsm_storage import DjangoEventIsolation, DjangoStorage, LeaseLost, MemoryStorage, storages
from fsm_storage.exceptions import (
    InvalidStorageError,
    StorageTimeout,
    StorageUnavailable,
)
from fsm_storage.models import FSMLease
from tests.contract.isolation import IsolationContract
from tests.contract.places import Isolate, none_left
from tests.database.conftest import Launcher, Statements
from tests.database.writers import key_of
from tests.rows import in_thread, record
from tests.servers import Mariadb, Postgres


class Forked:
    """A process that the launcher has forked."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self._launcher, self.pid = launcher, pid

    def wait(self) -> int:
        return self._launcher.wait(self.pid)

    def kill(self) -> None:
        self._launcher.kill(self.pid)


class Table:
    """The table of leases in a database."""

    turns, lease = 4.0, 3.0

    def __init__(self, database: str, launcher: Launcher) -> None:
        self.database, self._launcher = database, launcher

    def _rows(self) -> QuerySet[FSMLease]:
        return FSMLease.objects.using(self.database)

    def leases(self) -> list[str]:
        return list(self._rows().values_list("key", flat=True))

    def take_away(self) -> None:
        self._rows().delete()

    def give_away(self) -> None:
        self._rows().update(owner="another", token=F("token") + 1)

    def start(self, writer: str, notes: Path, *arguments: Any) -> Forked:
        return Forked(self._launcher, self._launcher.start(writer, self.database, str(notes), *arguments))


@pytest.fixture
def place(database: str, launcher: Launcher) -> Table:
    return Table(database, launcher)


class TestPromises(IsolationContract):
    @pytest.fixture
    def thread_storage(self, storage: DjangoStorage) -> DjangoStorage:
        return storage


# The lock


async def test_a_line_of_waiters_takes_the_lease_once(
    isolate: Isolate,
    statements: Statements,
    key: StorageKey,
    database: str,
    place: Table,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsm_storage.isolation.TURN_SECONDS", 60.0)  # a busy machine stands still for longer
    isolation = isolate()

    async def work() -> None:
        async with isolation.lock(key):
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(50)))
    await none_left(isolation, place)
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
            await asyncio.wait_for(all_in.wait(), 30)

    await asyncio.gather(*map(work, keys))
    assert inside == len(keys)


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
    assert waited < 15


# Waiting in vain


async def test_a_handler_does_not_run_while_the_database_is_away(
    isolate: Isolate, statements: Statements, database: str, place: Table
) -> None:
    isolation = isolate(timeout=0.4)
    with statements.held():
        began = time.monotonic()
        with pytest.raises(StorageTimeout):
            async with isolation.lock(key_of(1)):
                pytest.fail("it entered")
        assert time.monotonic() - began < 10
    await none_left(isolation, place)


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
    assert time.monotonic() - began < 15
    await asyncio.to_thread(own_server.start)
    async with isolation.lock(key_of(2)):
        pass
    await storage.close()
    await isolation.close()


# Losing the lease


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
        await asyncio.sleep(0.1)  # usually enough for them to gather; else they come one after the other
    await asyncio.gather(*tasks)
    assert [await storage.get_state(key_of(n)) for n in (1, 2, 3)] == [None, "written", "written"]
    await isolation.close()


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


async def test_an_isolation_by_alias_finds_its_storage_when_it_is_used(database: str, place: Table) -> None:
    isolation = DjangoEventIsolation(database)
    async with isolation.lock(key_of(1)):
        assert await in_thread(place.leases) == ["1:1:1"]
    await storages[database].close()  # the storages make it anew
    async with isolation.lock(key_of(1)):
        pass
    await isolation.close()
    assert await in_thread(place.leases) == []


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
