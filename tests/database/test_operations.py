"""Migrations that change conversations: run by Django's executor, beside a bot that goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.db import connections, transaction
from django.db.migrations.exceptions import IrreversibleError
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.recorder import MigrationRecorder

from fsm_storage import DjangoStorage, storages
from fsm_storage.exceptions import (
    InvalidData,
    InvalidState,
    MissingDependency,
    NotEditable,
    StillInUse,
    TransformFailed,
)
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.operations import RenameDataKey, RenameState, RenameStatesGroup, TransformData, base
from tests.conftest import POSTGRES, SQLITE
from tests.database.conftest import Launcher, wait_for
from tests.database.writers import key_of
from tests.rows import data_as_text, execute, let_time_pass, record, records, transitions

Make = Callable[..., DjangoStorage]
Migrate = Callable[..., None]


@pytest.fixture
def migrate(database: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Migrate]:
    """Run a migration that has these operations; with `undo`, run it backwards."""
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "tests.shop"]
    migration = import_module("tests.shop.migrations.0001_conversations").Migration
    connection = connections[database]

    def run(*chosen: Any, atomic: bool = False, undo: bool = False) -> None:
        monkeypatch.setattr(migration, "operations", chosen)
        monkeypatch.setattr(migration, "atomic", atomic)
        executor = MigrationExecutor(connection)
        executor.migrate([("shop", None if undo else "0001_conversations")])

    yield run
    MigrationRecorder(connection).migration_qs.filter(app="shop").delete()


def write(
    storage: DjangoStorage, chat: int, state: str | None = None, data: dict[str, Any] | None = None
) -> None:
    async def main() -> None:
        if state is not None:
            await storage.set_state(key_of(chat), state)
        if data is not None:
            await storage.set_data(key_of(chat), data)

    asyncio.run(main())


def states(database: str) -> dict[int, str | None]:
    return {row.chat_id: row.state for row in records(database)}


def data(database: str) -> dict[int, Any]:
    return {row.chat_id: row.data for row in records(database)}


# A state


@pytest.mark.parametrize("atomic", [False, True])
def test_a_state_is_renamed_and_renamed_back(
    storage: DjangoStorage, database: str, migrate: Migrate, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_SIZE", 3)
    for chat in range(8):
        write(storage, chat, "Form:name" if chat else "Form:nameless", {"n": chat})
    versions = {row.chat_id: row.version for row in records(database)}
    rename = RenameState("Form:name", "Form:full_name")
    migrate(rename, atomic=atomic)
    assert states(database) == {0: "Form:nameless", **dict.fromkeys(range(1, 8), "Form:full_name")}
    assert data(database) == {chat: {"n": chat} for chat in range(8)}
    assert {row.chat_id: row.version - versions[row.chat_id] for row in records(database)} == {
        0: 0, **dict.fromkeys(range(1, 8), 1),
    }  # fmt: skip
    noted = transitions(database, source="migration")
    assert noted == [("Form:name", "Form:full_name", "migration", "shop")] * 7
    migrate(rename, atomic=atomic, undo=True)
    assert states(database) == {0: "Form:nameless", **dict.fromkeys(range(1, 8), "Form:name")}


def test_the_bot_sees_the_new_name_at_once(storage: DjangoStorage, database: str, migrate: Migrate) -> None:
    write(storage, 1, "Form:name")
    migrate(RenameState("Form:name", "Form:full_name"))
    assert asyncio.run(storage.get_state(key_of(1))) == "Form:full_name"
    # The past is as it was; what is current is the new name.
    steps = [
        (step.from_state, step.to_state)
        for step in FSMTransition.objects.of(record(database)).using(database)
    ]
    assert steps == [("Form:name", "Form:full_name"), (None, "Form:name")]


def test_time_goes_on_as_it_did(make_storage: Make, database: str, migrate: Migrate) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=500)
    write(storage, 1, "Form:name", {"phone": 1})
    write(make_storage(), 2, "Form:name", {"phone": 1})
    before = records(database)
    migrate(RenameState("Form:name", "Form:full_name"), RenameDataKey("phone", "tel"))
    after = records(database)
    assert [row.state for row in after] == ["Form:full_name"] * 2
    assert [row.data for row in after] == [{"tel": 1}] * 2
    for part in ("state_expires_at", "data_expires_at"):
        assert [getattr(row, part) for row in after] == [getattr(row, part) for row in before]
    assert after[1].state_expires_at is None


def test_what_has_expired_stays_expired_under_its_new_name(
    make_storage: Make, database: str, migrate: Migrate
) -> None:
    """The sweep did not come by yet; an expiry handler knows only the new name."""
    storage = make_storage(state_ttl=100, data_ttl=100)
    write(storage, 1, "Form:name", {"phone": 1})
    let_time_pass(database, 150)
    migrate(RenameState("Form:name", "Form:full_name"), RenameDataKey("phone", "tel"))
    assert (record(database).state, record(database).data) == ("Form:full_name", {"tel": 1})
    assert asyncio.run(storage.get_state(key_of(1))) is None
    assert asyncio.run(storage.get_data(key_of(1))) == {}
    assert FSMRecord.objects.using(database).expired().count() == 1


def test_only_one_storage_if_it_is_named(make_storage: Make, database: str, migrate: Migrate) -> None:
    write(make_storage(), 1, "Form:name")
    write(make_storage(alias="second"), 2, "Form:name")
    with pytest.raises(NotEditable, match="second"):  # of a storage that nobody configured
        migrate(RenameState("Form:name", "a"))
    assert states(database) == {1: "Form:name", 2: "Form:name"}
    migrate(RenameState("Form:name", "a", alias=database))
    assert states(database) == {1: "a", 2: "Form:name"}


def test_another_database_is_left_alone(make_storage: Make, database: str, migrate: Migrate) -> None:
    """Rows that a storage left behind when it moved to another database are read by nobody."""
    write(make_storage(), 1, "Form:name")
    elsewhere = DjangoStorage(database, database="postgres" if database == "default" else "default")
    storages[database] = elsewhere
    migrate(RenameState("Form:name", "a"))
    assert states(database) == {1: "Form:name"}


def test_a_router_decides(storage: DjangoStorage, database: str, migrate: Migrate, settings: Any) -> None:
    class Elsewhere:
        def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
            return False if app_label == "fsm_storage" else None

    write(storage, 1, "Form:name")
    settings.DATABASE_ROUTERS = [Elsewhere()]
    migrate(RenameState("Form:name", "a"))
    assert states(database) == {1: "Form:name"}


# A group


def test_a_group_is_renamed_with_the_groups_in_it(
    storage: DjangoStorage, database: str, migrate: Migrate
) -> None:
    before = ["Form:name", "Form.Address:city", "Form.Address.Door:code", "Former:name", "XForm:name", "Form"]
    for chat, state in enumerate(before):
        write(storage, chat, state)
    rename = RenameStatesGroup("Form", "Shop.Signup")
    migrate(rename)
    assert list(states(database).values()) == [
        "Shop.Signup:name", "Shop.Signup.Address:city", "Shop.Signup.Address.Door:code",
        "Former:name", "XForm:name", "Form",
    ]  # fmt: skip
    migrate(rename, undo=True)
    assert list(states(database).values()) == before


def test_a_group_whose_new_name_is_too_long_changes_nothing(
    storage: DjangoStorage, database: str, migrate: Migrate
) -> None:
    write(storage, 1, "Form:a")
    write(storage, 2, "Form:" + "b" * 200)
    with pytest.raises(InvalidState, match="1:2:2"):
        migrate(RenameStatesGroup("Form", "F" * 100))
    assert states(database)[1] == "Form:a"


# Data


def test_a_key_is_renamed_and_renamed_back(storage: DjangoStorage, database: str, migrate: Migrate) -> None:
    before = {
        1: {"phone": "1", "a": 1},
        2: {"phone": "old", "tel": "new"},
        3: {"cart": {"phone": 1}, "b": "phone"},
        4: {"PHONE": 1, "tel": 2},
    }
    for chat, content in before.items():
        write(storage, chat, data=content)
    versions = {row.chat_id: row.version for row in records(database)}
    rename = RenameDataKey("phone", "tel")
    migrate(rename)
    assert data(database) == {1: {"tel": "1", "a": 1}, 2: {"tel": "new"}, 3: before[3], 4: before[4]}
    changed = {row.chat_id for row in records(database) if row.version != versions[row.chat_id]}
    assert changed == {1, 2}
    migrate(rename, undo=True)
    assert data(database)[1] == before[1]
    assert data(database)[4] == {"PHONE": 1, "phone": 2}


@pytest.mark.parametrize("name", ["имя", 'a"b\\c', "%_", "line\nbreak", "😀"])
def test_any_key_is_found(make_storage: Make, database: str, migrate: Migrate, name: str) -> None:
    import json

    write(make_storage(), 1, data={name: 1, "other": 2})
    write(make_storage(json_dumps=json.dumps), 2, data={name: 1})  # which escapes what is no ASCII
    migrate(RenameDataKey(name, "new"))
    assert data(database) == {1: {"new": 1, "other": 2}, 2: {"new": 1}}


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ({"states": "Form:a"}, {1}),
        ({"states": ["Form:a", "Form.In:b"]}, {1, 2}),
        ({"group": "Form"}, {1, 2}),
        ({"group": "Form.In"}, {2}),
        ({}, {1, 2, 3, 4}),
    ],
)
def test_a_key_is_renamed_in_some_states(
    storage: DjangoStorage, database: str, migrate: Migrate, scope: Any, changed: set[int]
) -> None:
    for chat, state in enumerate(("Form:a", "Form.In:b", "Other:c", None), start=1):
        write(storage, chat, state, {"phone": chat})
    migrate(RenameDataKey("phone", "tel", **scope))
    assert {chat for chat, content in data(database).items() if "tel" in content} == changed


def split_name(content: dict[str, Any]) -> dict[str, Any]:
    if "name" in content:
        content["first"], _, content["last"] = content.pop("name").partition(" ")
    return content


def join_name(content: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"{content['first']} {content['last']}"} if "first" in content else content


@pytest.mark.parametrize("atomic", [False, True])
def test_data_is_transformed_and_back(
    storage: DjangoStorage, database: str, migrate: Migrate, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_SIZE", 2)
    for chat in range(5):
        write(storage, chat, "Form:a", {"name": f"Anna {chat}"})
    write(storage, 5, "Form:a", {"other": 1})
    write(storage, 6, "Form:a")
    untouched = {row.chat_id: row.version for row in records(database) if row.chat_id >= 5}
    transform = TransformData(split_name, join_name)
    migrate(transform, atomic=atomic)
    assert data(database) == {
        **{chat: {"first": "Anna", "last": str(chat)} for chat in range(5)}, 5: {"other": 1}, 6: {},
    }  # fmt: skip
    assert {row.chat_id: row.version for row in records(database) if row.chat_id >= 5} == untouched
    migrate(transform, atomic=atomic, undo=True)
    assert data(database)[3] == {"name": "Anna 3"}


def test_a_transformation_gets_each_conversation_once(
    storage: DjangoStorage, database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_SIZE", 2)
    for chat in range(7):
        write(storage, chat, data={"n": chat})
    migrate(TransformData(lambda content: {"n": content["n"] + 1}))
    assert data(database) == {chat: {"n": chat + 1} for chat in range(7)}


def test_a_function_that_raises_names_the_conversation_and_stops(
    storage: DjangoStorage, database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_SIZE", 3)
    for chat in range(6):
        write(storage, chat, data={"name": "a b"} if chat != 4 else {"name": 4})
    with pytest.raises(TransformFailed, match=r"split_name\(\) failed for '1:4:4': AttributeError") as failed:
        migrate(TransformData(split_name))
    assert failed.value.key == "1:4:4"
    # The batch before it is written, its own is not: it ran in transactions of three.
    assert ["first" in content for content in data(database).values()] == [True] * 3 + [False] * 3
    execute(database, "UPDATE fsm_storage_record SET data = '{}' WHERE chat_id = 4")
    migrate(TransformData(split_name))
    assert all("first" in content for chat, content in data(database).items() if chat != 4)


@pytest.mark.parametrize("database", [SQLITE, POSTGRES], indirect=True)
def test_an_atomic_migration_that_fails_leaves_nothing(
    storage: DjangoStorage, database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_SIZE", 1)
    for chat in range(3):
        write(storage, chat, "Form:name", data={"name": "a b"} if chat != 2 else {"name": 4})
    with pytest.raises(TransformFailed):
        migrate(RenameState("Form:name", "a"), TransformData(split_name), atomic=True)
    assert set(states(database).values()) == {"Form:name"}
    assert not any("first" in content for content in data(database).values())


@pytest.mark.parametrize("returned", [None, [], "text"])
def test_a_function_that_returns_no_dict(
    storage: DjangoStorage, database: str, migrate: Migrate, returned: Any
) -> None:
    write(storage, 1, data={"a": 1})
    with pytest.raises(TransformFailed, match=r"1:1:1.*it returned"):
        migrate(TransformData(lambda content: returned))
    assert data(database) == {1: {"a": 1}}


def test_a_function_that_returns_what_cannot_be_stored(
    storage: DjangoStorage, database: str, migrate: Migrate
) -> None:
    write(storage, 1, data={"a": 1})
    with pytest.raises(InvalidData, match=r"1:1:1.*a is nan"):
        migrate(TransformData(lambda content: {"a": float("nan")}))
    assert data(database) == {1: {"a": 1}}


def test_unreadable_data_is_left_and_named(
    storage: DjangoStorage, database: str, migrate: Migrate, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can rename inside of it; a set_data() repairs it."""
    for chat in range(3):
        write(storage, chat, data={"phone": chat})
    broken = '["phone"]'
    execute(database, f"UPDATE fsm_storage_record SET data = '{broken}' WHERE chat_id = 1")
    with caplog.at_level(logging.WARNING):
        RenameDataKey("phone", "tel").apply(database)
        TransformData(lambda content: {**content, "seen": True}).apply(database)
    found = execute(database, f"SELECT {data_as_text(database)} FROM fsm_storage_record ORDER BY chat_id")
    assert [bool("seen" in text and "tel" in text) for (text,) in found] == [True, False, True]
    assert found[1][0] == broken
    assert "1:1:1" in caplog.text


def test_values_of_other_types_come_through(make_storage: Make, database: str, migrate: Migrate) -> None:
    """The storage's own `json_dumps` and `json_loads` are in use, for the function too."""
    import json
    from datetime import date

    storage = make_storage(
        json_dumps=lambda value: json.dumps(value, default=lambda day: {"day": day.isoformat()}),
        json_loads=lambda text: json.loads(
            text, object_hook=lambda found: date.fromisoformat(found["day"]) if "day" in found else found
        ),
    )
    write(storage, 1, data={"born": date(2000, 1, 2), "n": 10**30, "f": 1e23})
    migrate(
        TransformData(lambda content: {**content, "year": content["born"].year}), RenameDataKey("born", "b")
    )
    assert asyncio.run(storage.get_data(key_of(1))) == {
        "b": date(2000, 1, 2), "n": 10**30, "f": 1e23, "year": 2000,
    }  # fmt: skip


def test_history_in_full_has_the_data(make_storage: Make, database: str, migrate: Migrate) -> None:
    write(make_storage(history="full"), 1, data={"phone": 1})
    migrate(RenameDataKey("phone", "tel"))
    step = FSMTransition.objects.using(database).get(source="migration")
    assert (step.data_before, step.data_after) == ({"phone": 1}, {"tel": 1})


# Beside a bot


@pytest.mark.loop_gap(5)
def test_nothing_that_a_bot_wrote_meanwhile_is_lost(
    make_storage: Make, database: str, launcher: Launcher, notes: Path, migrate: Migrate
) -> None:
    """A bot with the old code, in another process, goes through the states that are being renamed."""
    make_storage(timeout=30)
    chats = 15
    bot = launcher.start("talk_in_old_states", database, str(notes), chats)
    wait_for(lambda: notes.exists() and notes.read_text().count("\n") > 3 * chats)
    chosen = (
        RenameStatesGroup("Form", "Signup"),
        RenameDataKey("phone", "tel"),
        TransformData(lambda content: {**content, "seen": True}),
    )
    migrate(*chosen)
    after = notes.read_text().count("\n") + chats
    wait_for(lambda: notes.read_text().count("\n") > after)
    Path(f"{notes}.stop").touch()
    assert launcher.wait(bot) == 0
    for operation in chosen:  # what the old code wrote after the migration
        operation.apply(database)
    last = {}
    for chat, n, state in (line.split() for line in notes.read_text().splitlines()):
        last[int(chat)] = (int(n), state)
    assert len(last) == chats
    for row in records(database):
        n, state = last[row.chat_id]
        assert row.state == state.replace("Form", "Signup")
        assert row.data == {**{f"f{i}": i for i in range(n + 1)}, "tel": row.chat_id, "seen": True}
        steps = list(FSMTransition.objects.of(row).using(database).order_by("id"))
        assert [one.to_state for one, other in pairwise(steps) if one.to_state != other.from_state] == []
        assert steps[-1].to_state == row.state
    assert transitions(database, source="migration")


def test_a_conversation_that_moves_on_between_reading_and_writing_is_not_moved_back(
    storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chat in range(3):
        write(storage, chat, "Form:name", {"n": 1})
    put = DjangoStorage.put
    calls: list[int] = []

    def late(self: DjangoStorage, edits: Any, **cause: Any) -> Any:
        if not calls:
            thread = threading.Thread(target=write, args=(storage, 1, "Other:state", {"n": 2}))
            thread.start()
            thread.join(20)
        calls.append(len(edits))
        return put(self, edits, **cause)

    monkeypatch.setattr(DjangoStorage, "put", late)
    assert RenameState("Form:name", "a").apply(database) == 2
    assert states(database) == {0: "a", 1: "Other:state", 2: "a"}
    assert calls == [3]
    # And data: the change is made again, to what is there now.
    calls.clear()
    assert TransformData(lambda content: {"n": content["n"] * 10}).apply(database) == 3
    assert data(database) == {0: {"n": 10}, 1: {"n": 20}, 2: {"n": 10}}
    assert calls == [3, 1]


def test_what_old_code_writes_after_the_renaming_is_the_newer_value(
    storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, 1, data={"phone": "first"})
    put = DjangoStorage.put
    calls: list[int] = []

    def followed(self: DjangoStorage, edits: Any, **cause: Any) -> Any:
        late = put(self, edits, **cause)
        if not calls:
            update = storage.update_data(key_of(1), {"phone": "second"})
            thread = threading.Thread(target=lambda: asyncio.run(update))
            thread.start()
            thread.join(20)
        calls.append(len(edits))
        return late

    monkeypatch.setattr(DjangoStorage, "put", followed)
    assert RenameDataKey("phone", "tel").apply(database) == 2
    assert data(database) == {1: {"tel": "second"}}


def test_old_code_that_never_stops_is_named(
    storage: DjangoStorage, database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CATCH_UP_SECONDS", 0.05)
    write(storage, 1, "Form:name")
    put = DjangoStorage.put

    def spoiled(self: DjangoStorage, edits: Any, **cause: Any) -> Any:
        late = put(self, edits, **cause)
        thread = threading.Thread(target=write, args=(storage, 1, "Form:name"))
        thread.start()
        thread.join(20)
        return late

    monkeypatch.setattr(DjangoStorage, "put", spoiled)
    with pytest.raises(StillInUse, match=r"Rename state Form:name to a.*: \d+ were changed.*stop it"):
        migrate(RenameState("Form:name", "a"))
    monkeypatch.setattr(DjangoStorage, "put", put)
    monkeypatch.setattr(base, "CATCH_UP_SECONDS", 60.0)
    migrate(RenameState("Form:name", "a"))
    assert states(database) == {1: "a"}


def test_batches_are_bounded_transactions(
    storage: DjangoStorage, database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is committed before the next begins, and another connection sees it."""
    monkeypatch.setattr(base, "BATCH_SIZE", 4)
    for chat in range(10):
        write(storage, chat, "Form:name")
    put = DjangoStorage.put
    seen: list[int] = []

    def counted(self: DjangoStorage, edits: Any, **cause: Any) -> Any:
        def count() -> None:
            seen.append(FSMRecord.objects.using(database).filter(state="a").count())
            connections[database].close()

        thread = threading.Thread(target=count)
        thread.start()
        thread.join(20)
        return put(self, edits, **cause)

    monkeypatch.setattr(DjangoStorage, "put", counted)
    migrate(RenameState("Form:name", "a"))
    assert seen == [0, 4, 8]


def test_an_editor_that_only_knows_edit_will_do(
    storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DjangoStorage, "put")
    write(storage, 1, "Form:name", {"phone": 1})
    assert RenameState("Form:name", "a").apply(database, by="me") == 1
    assert RenameDataKey("phone", "tel").apply(database) == 1
    assert (record(database).state, record(database).data) == ("a", {"tel": 1})
    assert transitions(database, source="migration") == [("Form:name", "a", "migration", "me")]


# As operations


def test_a_migration_without_the_dependency_says_so(
    database: str, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db.migrations.state import ProjectState

    with connections[database].schema_editor() as editor, pytest.raises(MissingDependency, match="'shop'"):
        RenameState("a", "b").database_forwards("shop", editor, ProjectState(), ProjectState())


def test_data_that_is_only_transformed_forwards_cannot_be_reversed(
    storage: DjangoStorage, database: str, migrate: Migrate
) -> None:
    migrate(TransformData(split_name))
    with pytest.raises(IrreversibleError):
        migrate(TransformData(split_name), undo=True)
    with pytest.raises(NotImplementedError):
        TransformData(split_name).reversed()


def test_no_transaction_is_left_open(storage: DjangoStorage, database: str, migrate: Migrate) -> None:
    write(storage, 1, "Form:name")
    migrate(RenameState("Form:name", "a"))
    assert not connections[database].in_atomic_block
    with transaction.atomic(using=database):
        assert RenameState("a", "b").apply(database) == 1
        transaction.set_rollback(True, using=database)
    assert states(database) == {1: "a"}
