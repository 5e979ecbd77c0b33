"""Edits from Django: `record.edit()` and the querysets', beside a bot that writes too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey
from django.db import connections, transaction

from fsm_storage import DjangoStorage, storages
from fsm_storage.exceptions import (
    InvalidData,
    InvalidState,
    InvalidStateType,
    NotEditable,
    StorageUnavailable,
    VersionConflict,
)
from fsm_storage.models import FSMRecord
from tests.rows import OtherSession, let_time_pass, record, transitions

Make = Callable[..., DjangoStorage]


class Form(StatesGroup):
    name = State()


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


class User:
    """What `by` takes: Django's user has this method."""

    def get_username(self) -> str:
        return "maria"


def write(storage: DjangoStorage, key: StorageKey, state: Any = "a", data: Any = None) -> None:
    """Write as a bot does."""

    async def main() -> None:
        await storage.set_state(key, state)
        await storage.set_data(key, {"n": 1} if data is None else data)

    asyncio.run(main())


def test_an_edit_is_what_the_bot_sees_next(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    row = record(database)
    row.edit(state="b", data={"m": 2}, by=User())
    assert (row.state, row.data) == ("b", {"m": 2})
    assert asyncio.run(storage.get_state(key)) == "b"
    assert asyncio.run(storage.get_data(key)) == {"m": 2}
    assert transitions(database) == [(None, "a", "bot", ""), ("a", "b", "admin", "maria")]


def test_an_edit_leaves_the_other_part_alone(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    row = record(database)
    row.edit(state=Form.name)
    assert (row.state, row.data) == ("Form:name", {"n": 1})
    row.edit(data={})
    assert (row.state, row.data) == ("Form:name", {})
    row.edit(state=None)
    assert (row.state, row.data) == (None, {})


def test_an_edit_can_say_who_and_why(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    record(database).edit(state="b", by="import of May", source="import")
    record(database).edit(state="b", by="nobody")  # no change of state, no transition
    assert transitions(database)[1:] == [("a", "b", "import", "import of May")]


def test_an_edit_of_a_version_that_is_there(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    row = record(database)
    before = row.version
    row.edit(state="b", if_version=row.version)
    assert row.version == before + 1
    row.edit(state="c", if_version=row.version)
    assert record(database).state == "c"


def test_an_edit_of_an_older_version_writes_nothing(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    write(storage, key)
    row = record(database)
    seen = row.version
    asyncio.run(storage.set_state(key, "the bot moved on"))
    with pytest.raises(VersionConflict, match="changed meanwhile") as conflict:
        row.edit(state="b", data={}, if_version=seen)
    assert (conflict.value.key, conflict.value.expected, conflict.value.found) == (row.key, seen, seen + 1)
    now = record(database)
    assert (now.state, now.data, now.version) == ("the bot moved on", {"n": 1}, seen + 1)
    assert transitions(database, source="admin") == []


def test_an_edit_of_a_record_that_is_gone(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    row = record(database)
    version, row_key = row.version, row.key
    FSMRecord.objects.using(database).filter(pk=row.pk).delete()
    with pytest.raises(VersionConflict, match="gone") as conflict:
        row.edit(state="b", if_version=version)
    assert (conflict.value.key, conflict.value.found) == (row_key, None)
    assert not FSMRecord.objects.using(database).exists()


def test_of_two_edits_of_one_version_one_wins(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    version = record(database).version
    outcomes: list[object] = []

    def edit(state: str) -> None:
        try:
            record(database).edit(state=state, if_version=version)
            outcomes.append(state)
        except VersionConflict as conflict:
            outcomes.append(conflict)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=edit, args=(f"s{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(outcomes) == 6
    assert winners == [record(database).state]


def test_an_edit_keeps_the_time_to_expiry(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=500)
    write(storage, key)
    before = record(database)
    before.edit(state="b", data={"m": 2})
    after = record(database)
    assert after.state_expires_at == before.state_expires_at is not None
    assert after.data_expires_at == before.data_expires_at is not None
    assert after.state_expires_at - after.data_expires_at > timedelta(seconds=490)


def test_a_part_that_was_empty_gets_the_storages_ttl(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage(state_ttl=1000)
    asyncio.run(storage.set_data(key, {"n": 1}))
    row = record(database).__class__.objects.using(database).with_clock().get()
    row.edit(state="b")
    row = FSMRecord.objects.using(database).with_clock().get()
    assert abs(row.state_expires_at - row.read_at - timedelta(seconds=1000)) < timedelta(seconds=10)
    assert row.data_expires_at is None


def test_an_edit_can_change_the_time_to_expiry(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=1000)
    write(storage, key)
    record(database).edit(state_ttl=timedelta(hours=5), data_ttl=None)
    row = FSMRecord.objects.using(database).with_clock().get()
    assert (row.state, row.data) == ("a", {"n": 1})
    assert abs(row.state_expires_at - row.read_at - timedelta(hours=5)) < timedelta(seconds=10)
    assert row.data_expires_at is None
    let_time_pass(database, 2000)
    assert asyncio.run(storage.get_state(key)) == "a"
    assert asyncio.run(storage.get_data(key)) == {"n": 1}


def test_an_edit_does_not_wake_what_expired(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    write(storage, key)
    let_time_pass(database, 150)
    record(database).edit(data={"m": 2})
    assert asyncio.run(storage.get_state(key)) is None
    assert asyncio.run(storage.get_data(key)) == {"m": 2}


def test_an_edit_in_a_transaction_goes_with_it(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    write(storage, key)

    class Undone(Exception):
        pass

    def edit_and_fail() -> None:
        with transaction.atomic(using=database):
            record(database).edit(state="b", by=User())
            assert record(database).state == "b"
            raise Undone

    with pytest.raises(Undone):
        edit_and_fail()
    assert record(database).state == "a"
    assert transitions(database, source="admin") == []
    with transaction.atomic(using=database):
        record(database).edit(state="b", by=User())
    assert asyncio.run(storage.get_state(key)) == "b"
    assert len(transitions(database, source="admin")) == 1


def test_a_conflict_in_a_transaction_leaves_the_transaction_usable(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    write(storage, key)
    with transaction.atomic(using=database):
        with pytest.raises(VersionConflict):
            record(database).edit(state="b", if_version=1)
        record(database).edit(state="c")
    assert record(database).state == "c"


def test_what_cannot_be_kept_is_refused(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    write(storage, key)
    row = record(database)
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"state": "x" * 1000}, InvalidState),
        ({"state": "a\0b"}, InvalidState),
        ({"state": 5}, InvalidStateType),
        ({"data": {"a": float("nan")}}, InvalidData),
        ({"state": "b", "data": {"a": {1: 1, "1": 2}}}, InvalidData),
        ({"state_ttl": -1}, ValueError),
        ({"state_ttl": "soon"}, TypeError),
    ]
    for changes, error in wrong:
        with pytest.raises(error):
            row.edit(**changes)
    now = record(database)
    assert (now.state, now.data, now.version) == ("a", {"n": 1}, row.version)


def test_edits_and_a_bot_lose_nothing_of_one_another(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    """Edits change the state while the bot merges fields."""
    storage = make_storage(timeout=30)
    write(storage, key, data={})
    ends = threading.Event()

    def edit() -> None:
        n = 0
        try:
            while not ends.is_set():
                n += 1
                record(database).edit(state=f"edit{n}", by="editor")
        finally:
            connections.close_all()

    editor = threading.Thread(target=edit)
    editor.start()

    async def bot() -> None:
        for n in range(60):
            await asyncio.gather(
                storage.update_data(key, {f"f{n}": n}), storage.update_data(key, {f"g{n}": n})
            )

    try:
        asyncio.run(bot())
    finally:
        ends.set()
        editor.join(30)
    row = record(database)
    assert row.data == {f"{letter}{n}": n for letter in "fg" for n in range(60)}
    noted = transitions(database)
    assert [before for before, *_ in noted] == [None, *(after for _, after, *_ in noted[:-1])]
    assert noted[-1][1] == row.state


def test_an_alias_that_is_not_configured_cannot_be_edited(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage()
    write(storage, key)
    FSMRecord.objects.using(database).update(alias="forgotten")
    with pytest.raises(NotEditable, match="forgotten"):
        record(database).edit(state="b")
    with pytest.raises(NotEditable, match="forgotten"):
        FSMRecord.objects.using(database).all().edit(state="b")
    assert record(database).state == "a"


def test_a_storage_of_another_kind_cannot_be_edited(settings: Any) -> None:
    settings.FSM_STORAGES = {"memory": {"BACKEND": "fsm_storage.MemoryStorage"}}
    with pytest.raises(NotEditable, match="MemoryStorage"):
        storages.editor("memory")


# Many at once


def test_a_queryset_edits_all_its_records(storage: DjangoStorage, database: str) -> None:
    for n in range(23):
        write(storage, chat(n), state="a" if n % 2 else "b", data={"n": n})
    found = FSMRecord.objects.using(database).in_state("a")
    assert found.edit(state=None, by=User(), batch_size=5) == 11
    for row in FSMRecord.objects.using(database):
        assert row.state == (None if row.chat_id % 2 else "b")
        assert row.data == {"n": row.chat_id}
    assert transitions(database, source="admin") == [("a", None, "admin", "maria")] * 11
    assert found.edit(state="c") == 0


def test_a_queryset_edit_can_extend_the_time(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100)
    for n in range(7):
        write(storage, chat(n))
    assert FSMRecord.objects.using(database).all().edit(state_ttl=timedelta(days=1)) == 7
    let_time_pass(database, 1000)
    assert FSMRecord.objects.using(database).in_state("a").count() == 7
    assert len(transitions(database)) == 7


def test_a_record_gives_back_its_key_and_a_context(storage: DjangoStorage, database: str) -> None:
    key = StorageKey(bot_id=1, chat_id=-5, user_id=7, thread_id=0, business_connection_id="a:b", destiny="é ")
    write(storage, key)
    row = record(database)
    assert row.storage_key == key
    assert FSMRecord.objects.using(database).with_key(key).get() == row
    assert asyncio.run(row.context().get_state()) == "a"


def test_an_edit_waits_for_a_locked_database_and_no_longer(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    """Somebody else holds the lock that the edit needs."""
    import sqlite3
    import time

    write(make_storage(), key)
    make_storage(timeout=1.0)
    row = record(database)
    if database == "default":
        connections[database].close()
        other: Any = sqlite3.connect(connections[database].settings_dict["NAME"], isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        connections[database].settings_dict["OPTIONS"]["timeout"], before = 1, 5
    else:
        other = OtherSession(database)
        other.execute("SELECT 1 FROM fsm_storage_record FOR UPDATE")
        before = None
    began = time.monotonic()
    try:
        with pytest.raises(StorageUnavailable):
            row.edit(state="b")
        assert time.monotonic() - began < 15
    finally:
        other.rollback() if before is None else other.execute("ROLLBACK")
        other.close()
        if before is not None:
            connections[database].close()
            connections[database].settings_dict["OPTIONS"]["timeout"] = before
    make_storage()
    row.edit(state="b")
    assert record(database).state == "b"
