"""`fsm_import --from sqlite:…` and `mongodb://…`: what other packages' storages left behind."""

from __future__ import annotations

import asyncio
import pickle
import sqlite3
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram_sqlite_storage.sqlitestore import SQLStorage

from fsm_storage import DjangoStorage
from fsm_storage.sources.layout import KeyLayout
from fsm_storage.sources.mongodb import found
from fsm_storage.transfer import Conversation, Refused
from tests.commands.conftest import Run
from tests.rows import records

PRIVATE, GROUP, IDLE = StorageKey(42, 7, 7), StorageKey(42, -100, 8), StorageKey(42, 9, 9)
DATA = {"n": 2**70, "f": 0.1, "t": "é", "deep": [{"x": None, "yes": True}]}


def fill(file: Path, method: str) -> None:
    """Write as a bot on aiogram-sqlite-storage does."""

    async def main() -> None:
        storage = SQLStorage(str(file), serializing_method=method)
        await storage.set_state(PRIVATE, "a")
        await storage.set_data(PRIVATE, DATA)
        await storage.set_state(GROUP, "b")
        await storage.set_state(IDLE, None)
        await storage.close()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["pickle", "json"])
@pytest.mark.parametrize("form", ["sqlite:{}", "sqlite://{}"])
def test_what_aiogram_sqlite_storage_kept_reads_back_equal(
    form: str, method: str, storage: DjangoStorage, database: str, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "fsm.db"
    fill(file, method)
    before = file.read_bytes()
    said = run("fsm_import", "--from", form.format(file), "--alias", database, "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json == {"written": 2, "same": 1, "skipped": 0, "refused": 0, "transitions": 0}
    assert asyncio.run(storage.get_data(PRIVATE)) == DATA
    assert asyncio.run(storage.get_state(PRIVATE)) == "a"
    assert asyncio.run(storage.get_state(GROUP)) == "b"
    assert file.read_bytes() == before


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


def test_nothing_in_a_pickle_is_run_and_the_rest_goes_on(
    storage: DjangoStorage, database: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "fsm.db", "pickle")
    rows: list[tuple[Any, Any, Any]] = [
        ("42:1:1", "a", pickle.dumps({"x": Trap()})),
        ("42:2:2", "a", pickle.dumps({"at": datetime(2026, 1, 1)})),
        ("42:3:3", "a", pickle.dumps([1])),
        ("42:4:4", "a", pickle.dumps({"s": {1, 2}})),
        ("42:5:5", "a", b"broken"),
        ("no key", "a", None),
        ("42:6:6", b"\xff", None),
        ("42:7:70", 5, None),
        (None, "a", None),
    ]
    with sqlite3.connect("fsm.db") as connection:
        connection.executemany("INSERT INTO fsm_data VALUES (?, ?, ?)", rows)
    connection.close()
    said = run("fsm_import", "--from", "sqlite:fsm.db", "--alias", database, "--json")
    assert said.code == 3
    assert (said.json["written"], said.json["refused"]) == (3, 8)  # SQLite keeps the 5 as the text "5"
    for name, reason in (
        ("42:1:1", "it names pathlib."),
        ("42:2:2", "it names datetime.datetime"),
        ("42:3:3", "is a list where an object belongs"),
        ("42:4:4", "s is a set"),
        ("42:5:5", "no pickle of plain values"),
        ("no key", "is no key of bot, chat and user"),
        ("42:6:6", "can't decode"),
    ):
        assert any(name in line and reason in line for line in said.err.splitlines()), (name, said.err)
    assert not Path("sprung").exists()
    assert len(records(database)) == 3


@pytest.mark.django_db
def test_a_file_that_is_none(run: Run, tmp_path: Path) -> None:
    assert "there is no file" in run("fsm_import", "--from", f"sqlite:{tmp_path / 'no.db'}").err
    other = tmp_path / "other.db"
    other.write_text("not a database at all, but long enough to be looked at as one " * 50)
    said = run("fsm_import", "--from", f"sqlite:{other}")
    assert (said.code, "other.db failed: DatabaseError" in said.err) == (1, True)
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    empty.touch()
    assert "no such table: fsm_data" in run("fsm_import", "--from", f"sqlite:{empty}").err


LAYOUT = KeyLayout(bot_id=42)


def document(key: StorageKey, **parts: Any) -> dict[str, Any]:
    """What aiogram's PyMongoStorage writes: `_id` is the built key, and a part that is empty is not there."""
    return {"_id": DefaultKeyBuilder().build(key), **parts}


@pytest.mark.parametrize(
    ("parts", "state", "data"),
    [({"state": "a", "data": DATA}, "a", DATA), ({"state": "a"}, "a", {}), ({"data": DATA}, None, DATA)],
)
def test_a_document_of_mongodb(parts: dict[str, Any], state: str | None, data: dict[str, Any]) -> None:
    """No server: this is the reading of a document only."""
    value = found(document(GROUP, **parts), LAYOUT).value
    assert value == Conversation(GROUP, state, data)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"_id": "fsm:x:1"}, "does not fit"),
        ({"_id": 5}, "expected string"),
        ({"_id": "fsm:1:1", "state": 5}, "a state of type int"),
        ({"_id": "fsm:1:1", "data": [1]}, "data of type list"),
    ],
)
def test_a_document_that_is_none(given: dict[str, Any], reason: str) -> None:
    what = found(given, LAYOUT)
    assert repr(given["_id"]) in what.place
    assert isinstance(what.value, Refused)
    assert reason in what.value.reason


@pytest.mark.django_db
def test_a_mongodb_that_does_not_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsm_storage.sources.mongodb.PATIENCE_MS", 50)
    said = run("fsm_import", "--from", "mongodb://me:secret@127.0.0.1:1", "--bot-id", 1)
    assert (said.code, "127.0.0.1:1" in said.err, "secret" in said.err) == (1, True, False)


@pytest.mark.django_db
@pytest.mark.parametrize(("url", "package"), [("mongodb://x", "pymongo"), ("redis://x", "redis")])
def test_a_package_that_is_missing_is_named(
    url: str, package: str, run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(
        sys.modules, f"fsm_storage.sources.{'redis' if package == 'redis' else 'mongodb'}", False
    )
    said = run("fsm_import", "--from", url, "--bot-id", 1)
    assert said.code == 1
    assert f"pip install {package}" in said.err
