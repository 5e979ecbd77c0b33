"""Somebody else's open transaction must stop its own record's writes, and nobody else's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.exceptions import StorageTimeout
from fsm_storage.models import FSMRecord, FSMTransition
from tests.conftest import MARIADB, POSTGRES
from tests.database.conftest import in_time
from tests.rows import OtherSession, now_of

pytestmark = [pytest.mark.parametrize("database", [POSTGRES, MARIADB], indirect=True)]

HELD = {
    "select": "SELECT 1 FROM fsm_storage_record WHERE chat_id = 3 FOR UPDATE",
    "update": "UPDATE fsm_storage_record SET updated_at = {now} WHERE chat_id = 3",
    "delete": "DELETE FROM fsm_storage_record WHERE chat_id = 3",
    "insert": """INSERT INTO fsm_storage_record (alias, {key}, bot_id, chat_id, user_id, destiny, data, version)
        VALUES ('{database}', '1:77:77', 1, 77, 77, 'default', '{{}}', 1)""",
}


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


@pytest.fixture
def other(database: str) -> Iterator[OtherSession]:
    session = OtherSession(database)
    yield session
    session.close()


def held_sql(held: str, database: str) -> str:
    key = connections[database].ops.quote_name("key")
    return HELD[held].format(now=now_of(database), key=key, database=database)


@pytest.mark.parametrize("history", ["off", "states", "full"])
@pytest.mark.parametrize("held", sorted(HELD))
async def test_a_held_record_stops_its_own_writes_only(
    make_storage: Callable[..., DjangoStorage], other: OtherSession, database: str, held: str, history: str
) -> None:
    storage = make_storage(history=history, timeout=20.0)
    await asyncio.gather(*(storage.set_state(chat(n), "before") for n in range(10)))
    other.execute(held_sql(held, database))
    blocked = asyncio.create_task(storage.set_state(chat(77 if held == "insert" else 3), "after"))
    free = [n for n in range(10) if n != 3]
    began = time.monotonic()
    await asyncio.gather(*(storage.set_state(chat(n), "after") for n in free))
    await asyncio.gather(*(storage.update_data(chat(n), {"n": n}) for n in free))
    assert time.monotonic() - began < 10
    assert not blocked.done()
    other.rollback()
    await blocked
    assert await storage.get_state(chat(77 if held == "insert" else 3)) == "after"


async def test_a_record_that_stays_held_is_a_clear_error_within_the_timeout(
    make_storage: Callable[..., DjangoStorage], other: OtherSession, database: str
) -> None:
    storage = make_storage(timeout=0.5)
    await make_storage().set_state(chat(3), "before")
    other.execute(held_sql("update", database))
    began = time.monotonic()
    with pytest.raises(StorageTimeout):
        await storage.set_state(chat(3), "after")
    assert time.monotonic() - began < 15
    other.rollback()
    await in_time(lambda: storage.set_state(chat(3), "later"), 0.5)
    assert await in_time(lambda: storage.get_state(chat(3)), 0.5) == "later"


async def test_a_lone_write_that_meets_the_sweep_notes_the_expiry_once(
    make_storage: Callable[..., DjangoStorage], other: OtherSession, database: str
) -> None:
    """The upsert waits for the sweep that deletes the row, and then inserts: the old row is history already."""
    storage = make_storage(timeout=20.0)
    await storage.set_state(chat(3), "old")
    other.execute(f"UPDATE fsm_storage_record SET state_expires_at = {now_of(database, -3600)}")
    other.commit()
    columns = f"alias, {connections[database].ops.quote_name('key')}, bot_id, chat_id, user_id"
    other.execute(
        f"""INSERT INTO fsm_storage_transition ({columns}, from_state, at, source)
        SELECT {columns}, state, state_expires_at, 'expiry' FROM fsm_storage_record"""
    )
    other.execute("DELETE FROM fsm_storage_record")
    writing = asyncio.create_task(storage.set_state(chat(3), "new"))
    await asyncio.sleep(0.05)
    other.commit()
    await writing
    notes = [
        (row.from_state, row.to_state, row.source)
        async for row in FSMTransition.objects.using(database).order_by("id")
    ]
    assert notes == [(None, "old", "bot"), ("old", None, "expiry"), (None, "new", "bot")]


async def test_writes_are_committed_where_the_project_switches_autocommit_off(
    make_storage: Callable[..., DjangoStorage],
    other: OtherSession,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(connections[database].settings_dict, "AUTOCOMMIT", False)
    storage = make_storage(alias="manual")
    for number in range(5):
        await storage.set_state(chat(number), "kept")
    await asyncio.gather(*(storage.set_state(chat(number), "kept") for number in range(5, 20)))
    found = other.execute("SELECT count(*) FROM fsm_storage_record WHERE alias = 'manual'")
    assert list(found) == [(20,)]
    assert await FSMRecord.objects.using(database).filter(alias="manual").acount() == 20
