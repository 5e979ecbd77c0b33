"""`fsm_export` and `fsm_import`: what goes out comes in again, in another storage and database too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import Error, connections
from django.db.models import F
from django.db.models.functions import Now

from fsm_storage import DjangoStorage
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.transfer.importer import Importer
from fsm_storage.transfer.lines import read_lines
from tests.commands.conftest import Run
from tests.database.conftest import wait_for
from tests.rows import execute, others, record, records, transitions
from tests.servers import finish_child, start_child

Make = Callable[..., DjangoStorage]

KEYS = [
    StorageKey(1, 7, 7),
    StorageKey(1, -100, 8, thread_id=0),
    StorageKey(2, 9, 9, business_connection_id="b:%", destiny="wizard"),
    StorageKey(2, 9, 9, business_connection_id=""),
]
DATA = {"n": 2**70, "f": 1e23, "w": 1.0, "t": "é\u2028", "deep": [{"x": None, "yes": True}]}


def write(storage: DjangoStorage, key: StorageKey, state: str | None, data: dict[str, Any]) -> None:
    async def main() -> None:
        await storage.set_state(key, state)
        await storage.set_data(key, data)

    asyncio.run(main())


def as_stored(database: str, alias: str) -> list[dict[str, Any]]:
    """All that an import must bring over: everything but the row's own id, alias and version."""
    rows = FSMRecord.objects.using(database).filter(alias=alias).order_by("key")
    return [
        {name: value for name, value in row.items() if name not in ("id", "alias", "version")}
        for row in rows.values()
    ]


def line(**changes: Any) -> str:
    values = {
        "format": 1,
        "type": "conversation",
        "bot_id": 1,
        "chat_id": 7,
        "user_id": 7,
        "state": "a",
        "data": {},
    }
    return json.dumps(values | changes) + "\n"


def age(database: str, seconds: float) -> None:
    rows = FSMRecord.objects.using(database)
    rows.update(
        updated_at=F("updated_at") - timedelta(seconds=seconds),
        created_at=F("created_at") - timedelta(days=9),
    )


def test_what_goes_out_comes_in_to_the_microsecond(
    make_storage: Make, database: str, run: Run, tmp_path: Path
) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=2000.5)
    for key, (state, data) in zip(
        KEYS, [("a", DATA), ("b", {}), (None, {"n": 1}), ("", {"": {}})], strict=True
    ):
        write(storage, key, state, data)
    age(database, 100)
    file = tmp_path / "all.jsonl"
    said = run("fsm_export", "--alias", database, "--output", file, "--json")
    assert (said.code, said.json) == (0, {"conversation": 4})
    copy = make_storage(alias="copy")
    said = run("fsm_import", file, "--alias", "copy", "--by", "maria", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["written"] == 4
    assert as_stored(database, "copy") == as_stored(database, database)
    assert asyncio.run(copy.get_data(KEYS[0])) == DATA
    assert isinstance(asyncio.run(copy.get_data(KEYS[0]))["f"], float)
    assert (None, "a", "import", "maria") in transitions(database, alias="copy")


def test_again_it_is_the_same(make_storage: Make, database: str, run: Run, tmp_path: Path) -> None:
    write(make_storage(state_ttl=1000), KEYS[0], "a", {"n": 1})
    file = tmp_path / "all.jsonl"
    run("fsm_export", "--alias", database, "--output", file)
    make_storage(alias="copy")
    run("fsm_import", file, "--alias", "copy")
    before = record(database, alias="copy").version
    said = run("fsm_import", file, "--alias", "copy", "--overwrite", "--json")
    assert said.json == {"written": 0, "same": 1, "skipped": 0, "refused": 0, "transitions": 0}
    assert record(database, alias="copy").version == before


def test_true_is_not_one(make_storage: Make, database: str, run: Run, tmp_path: Path) -> None:
    write(make_storage(), KEYS[0], "a", {"n": 1})
    file = tmp_path / "all.jsonl"
    file.write_text(line(data={"n": True}, updated_at="2100-01-01T00:00:00+00:00"))
    assert run("fsm_import", file, "--alias", database, "--json").json["written"] == 1
    assert asyncio.run(make_storage().get_data(KEYS[0])) == {"n": True}


@pytest.mark.parametrize(
    ("line_age", "arguments", "outcome"),
    [(1, (), "written"), (200, (), "skipped"), (None, (), "skipped"), (200, ("--overwrite",), "written")],
)
def test_the_newer_one_wins(
    line_age: float | None, arguments: tuple[str, ...], outcome: str,
    make_storage: Make, database: str, run: Run, tmp_path: Path,
) -> None:  # fmt: skip
    storage = make_storage()
    write(storage, KEYS[0], "mine", {})
    age(database, 100)
    now = FSMRecord.objects.using(database).clock()
    updated_at = None if line_age is None else (now - timedelta(seconds=line_age)).isoformat()
    file = tmp_path / "all.jsonl"
    file.write_text(line(state="theirs", updated_at=updated_at))
    said = run("fsm_import", file, "--alias", database, "--json", *arguments)
    assert (said.code, said.json[outcome]) == (0, 1)
    assert asyncio.run(storage.get_state(KEYS[0])) == ("theirs" if outcome == "written" else "mine")


def test_what_ended_or_expired_since_ends_here_too(
    make_storage: Make, database: str, run: Run, tmp_path: Path
) -> None:
    storage = make_storage()
    for number in (7, 8, 9):
        write(storage, StorageKey(1, number, number), "a", {"n": 1})
    age(database, 100)
    new, past = FSMRecord.objects.using(database).clock().isoformat(), "2020-01-01T00:00:00+00:00"
    file = tmp_path / "all.jsonl"
    file.write_text(
        line(state=None, updated_at=new)
        + line(chat_id=8, user_id=8, data={"n": 2}, state_expires_at=past, updated_at=new)
        + line(
            chat_id=9, user_id=9, data={"n": 2}, state_expires_at=past, data_expires_at=past, updated_at=new
        )
        + line(chat_id=10, user_id=10, state_expires_at=past, updated_at=new)
    )
    said = run("fsm_import", file, "--alias", database, "--json")
    assert (said.json["written"], said.json["same"]) == (3, 1)
    live = FSMRecord.objects.using(database).live()
    assert [(row.chat_id, row.state, row.data) for row in live] == [(8, None, {"n": 2})]
    assert storage.sweep() == (0, 0, 2)


BAD_LINES = {
    "{no json": "is no JSON",
    "[1]": "is a JSON list where an object belongs",
    line(format=2): "has the format 2; this version reads format 1",
    line(type="other"): "has the type 'other'",
    line(bot_id=None): "bot_id of the storage key must be an int",
    line(chat_id=2**63): "does not fit 64 bits",
    line(state=5): "has a state of type int",
    line(state="s" * 300): "has 300 characters",
    line(data=[1]): "has data of type list",
    line(data={"x": float("nan")}): "x is nan",
    line(data={"x": "\0"}): "x contains NUL",
    line(state_expires_at="soon"): "state_expires_at 'soon', which is no time",
    line(updated_at="2026-01-01T00:00:00"): "without a time zone",
    line(masked=True): "has masked data",
    line(type="transition", key="k", source="bot"): "has no time",
    line(type="transition", key="k", source="x", at="2026-01-01T00:00:00Z"): "has the source 'x'",
    '{"format": 1, "type": "conversation", "data": {}}': "names no key: bot_id, chat_id, user_id missing",
    "[" * 100_000: "is nested too deep",
}  # fmt: skip


def test_each_bad_line_is_named_and_the_rest_goes_on(
    storage: DjangoStorage, database: str, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    with file.open("wb") as out:
        for number, text in enumerate(BAD_LINES):
            out.write(text.strip().encode() + b"\n")
            out.write(line(chat_id=100 + number).encode())
        out.write(b"\xff\xfe\n\n")
        out.write(line(chat_id=99).encode().rstrip())  # the last without an end
    said = run("fsm_import", file, "--alias", database, "--json")
    assert said.code == 3
    assert said.json["written"] == len(BAD_LINES) + 1
    assert said.json["refused"] == len(BAD_LINES) + 1
    told = said.err.splitlines()
    for number, reason in enumerate([*BAD_LINES.values(), "is no UTF-8"]):
        expected = 2 * number + 1
        assert any(text.startswith(f"line {expected}: ") and reason in text for text in told), (
            expected,
            reason,
        )
    assert len(records(database)) == len(BAD_LINES) + 1


def test_a_line_that_is_too_long_is_skipped_without_reading_it_whole(
    storage: DjangoStorage, database: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsm_storage.transfer.lines.MAX_LINE", 1000)
    file = tmp_path / "long.jsonl"
    file.write_text(line(data={"x": "y" * 5000}) + line(chat_id=8))
    said = run("fsm_import", file, "--alias", database, "--json")
    assert (said.code, said.json["written"], said.json["refused"]) == (3, 1, 1)
    assert said.err.startswith("line 1: is longer than 1000 bytes")


def test_lines_go_to_the_storage_that_they_name(
    make_storage: Make, database: str, run: Run, tmp_path: Path
) -> None:
    make_storage(alias="one")
    make_storage(alias="two")
    file = tmp_path / "all.jsonl"
    file.write_text(
        line(alias="one") + line(alias="two") + line(alias="nobody") + line(alias="one", state="b")
    )
    said = run("fsm_import", file)
    assert said.code == 3
    assert "line 3: FSM_STORAGES has no 'nobody'" in said.err
    assert "--alias names another storage" in said.err
    assert [(row.alias, row.state) for row in FSMRecord.objects.using(database).order_by("alias")] == [
        ("one", "a"),
        ("two", "a"),  # the second line for "one" has no time, and what is there stays
    ]


def test_resume_from_a_line(storage: DjangoStorage, database: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("".join(line(chat_id=number) for number in range(1, 11)))
    assert run("fsm_import", file, "--alias", database, "--resume-from", 8, "--json").json["written"] == 3
    assert {row.chat_id for row in records(database)} == {8, 9, 10}


def test_a_dry_run_of_both(make_storage: Make, database: str, run: Run, tmp_path: Path) -> None:
    write(make_storage(), KEYS[0], "a", {})
    file = tmp_path / "all.jsonl"
    said = run("fsm_export", "--alias", database, "--output", file, "--dry-run", "--json")
    assert (said.json, file.exists()) == ({"conversation": 1}, False)
    run("fsm_export", "--alias", database, "--output", file)
    make_storage(alias="copy")
    said = run("fsm_import", file, "--alias", "copy", "--dry-run", "--json")
    assert said.json["written"] == 1
    assert len(records(database)) == 1


def test_the_history_comes_along_once_and_before_the_import(
    make_storage: Make, database: str, run: Run, tmp_path: Path
) -> None:
    storage = make_storage(history="full")
    write(storage, KEYS[0], "a", {"n": 1})
    write(storage, KEYS[0], "b", {"n": 2})
    old = list(
        FSMTransition.objects.using(database)
        .order_by("id")
        .values("from_state", "to_state", "at", "data_after")
    )
    file = tmp_path / "all.jsonl"
    said = run("fsm_export", "--alias", database, "--history", "--output", file, "--json")
    assert said.json == {"transition": 4, "conversation": 1}
    make_storage(alias="copy")
    for expected in (4, 0):
        assert run("fsm_import", file, "--alias", "copy", "--json").json["transitions"] == expected
    new = FSMTransition.objects.using(database).filter(alias="copy").order_by("id")
    assert list(new.exclude(source="import").values("from_state", "to_state", "at", "data_after")) == old
    assert new.last().source == "import"


def test_an_export_that_was_broken_off_goes_on(
    make_storage: Make, database: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsm_storage.transfer.lines.PAGE", 3)
    storage = make_storage()
    for number in range(1, 9):
        write(storage, StorageKey(1, number, number), "a", {"n": number})
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    arguments = ("fsm_export", "--alias", database, "--history", "--output")
    run(*arguments, whole)
    text = whole.read_bytes()
    for size in (0, 10, len(text) // 3, text.index(b'"conversation"') + 5, len(text) - 40, len(text)):
        broken.write_bytes(text[:size])
        assert run(*arguments, broken, "--resume").code == 0
        assert broken.read_bytes() == text, size


def test_an_export_never_overwrites(storage: DjangoStorage, database: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    for precious in ("precious", '{"precious": 1}\n', "precious\n"):
        file.write_text(precious)
        said = run("fsm_export", "--alias", database, "--output", file, "--resume")
        assert (said.code, "cannot be resumed" in said.err) == (1, True)
        assert file.read_text() == precious
    said = run("fsm_export", "--alias", database, "--output", file)
    assert (said.code, "is there already; --resume goes on with it" in said.err) == (1, True)
    assert file.read_text() == "precious\n"
    assert run("fsm_export", "--resume").code == 2
    assert run("fsm_export", "--history", "--state", "a").code == 2
    assert run("fsm_export", "--output", tmp_path / "no" / "folder").code == 1
    assert run("fsm_import", tmp_path / "nowhere").code == 1


def test_the_bot_that_is_faster_is_not_overwritten(
    make_storage: Make, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes between the look at its record and the write: for an old record, and for one that is new."""
    storage = make_storage()
    write(storage, KEYS[0], "mine", {})
    age(database, 100)
    put, calls = Importer._put, 0

    def late(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            asyncio.run(storage.set_state(KEYS[0], "newest"))
            asyncio.run(storage.set_state(KEYS[1], "newest"))
        return put(*arguments)

    monkeypatch.setattr(Importer, "_put", late)
    middle = (FSMRecord.objects.using(database).clock() - timedelta(seconds=50)).isoformat()
    file = tmp_path / "all.jsonl"
    theirs: Any = {"state": "theirs", "updated_at": middle}
    file.write_text(
        line(**theirs) + line(**theirs, chat_id=-100, user_id=8, thread_id=0) + line(**theirs, chat_id=3)
    )
    importer = Importer(lambda alias: storage, lambda *_: None)
    with file.open("rb") as source:
        *_, (_, counts) = importer.run(read_lines(source))
    assert (counts.written, counts.skipped, counts.refused) == (1, 2, 0)
    assert {row.chat_id: row.state for row in records(database)} == {7: "newest", -100: "newest", 3: "theirs"}


@pytest.mark.django_db(transaction=True, databases=["postgres"], available_apps=["fsm_storage"])
def test_a_connection_that_is_cut_in_mid_batch_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = DjangoStorage(alias="postgres", database="postgres")
    put, cut = storage.put, 0

    def cutting(*arguments: Any, **options: Any) -> Any:
        nonlocal cut
        replies = put(*arguments, **options)
        cut += 1
        if cut == 1:  # written, and not committed
            with contextlib.suppress(Error):
                execute("postgres", "SELECT pg_terminate_backend(pg_backend_pid())")
        return replies

    monkeypatch.setattr(storage, "put", cutting)
    file = tmp_path / "all.jsonl"
    at = "2026-01-01T00:00:00+00:00"
    file.write_text("".join(line(chat_id=number, updated_at=at) for number in range(1, 4)))
    with file.open("rb") as source:
        *_, (_, counts) = Importer(lambda alias: storage, lambda *_: None).run(read_lines(source))
    assert (counts.written, counts.same, counts.refused, cut) == (3, 0, 0, 2)
    assert len(records("postgres")) == 3


@pytest.mark.django_db(transaction=True, databases=["postgres"], available_apps=["fsm_storage"])
def test_a_row_that_stays_locked_ends_the_import_with_its_place(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsm_storage.transfer.importer.LOCK_WAIT", 0.1)
    write(DjangoStorage(alias="postgres", database="postgres"), KEYS[0], "mine", {})
    age("postgres", 100)
    file = tmp_path / "all.jsonl"
    now = FSMRecord.objects.using("postgres").clock().isoformat()
    others = "".join(line(chat_id=100 + number, updated_at=now) for number in range(500))
    file.write_text(others + line(state="theirs", updated_at=now))
    settings = connections["postgres"].settings_dict
    with psycopg.connect(host=settings["HOST"], user=settings["USER"], dbname=settings["NAME"]) as other:
        other.execute("SELECT FROM fsm_storage_record FOR UPDATE")
        said = run("fsm_import", file, "--alias", "postgres")
        assert said.code == 1
        assert "stopped behind line 500: database 'postgres' failed" in said.err
    assert run("fsm_import", file, "--alias", "postgres", "--json").json["written"] == 1


def test_an_import_that_is_killed_goes_on(
    database: str, run: Run, tmp_path: Path, make_storage: Make
) -> None:
    """Nothing is half there: each record that is there has its expiry and its own time."""
    lines = [
        line(
            chat_id=number, alias=database, data={"n": number},
            updated_at="2026-01-01T00:00:00+00:00", data_expires_at="2100-01-01T00:00:00+00:00",
        )
        for number in range(1, 3001)
    ]  # fmt: skip
    before = others(database)
    child = start_child("django", "fsm_import", "-", "--alias", database)
    assert child.stdin is not None
    child.stdin.write("".join(lines[:2500]))
    child.stdin.flush()
    rows = FSMRecord.objects.using(database)
    wait_for(lambda: rows.count() >= 1000, 60)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    wait_for(lambda: others(database) <= before, 60)  # the server may still be at the last batch
    there = rows.count()
    assert there % 500 == 0
    assert (
        rows.filter(updated_at=datetime(2026, 1, 1, tzinfo=UTC), data_expires_at__year=2100).count() == there
    )
    child = start_child("django", "fsm_import", "-", "--alias", database, "--json")
    child_out = finish_child_with(child, "".join(lines))
    assert json.loads(child_out)["same"] == there
    assert json.loads(child_out)["written"] == 3000 - there
    assert rows.filter(data_expires_at__gt=Now()).count() == 3000


def finish_child_with(child: Any, text: str) -> str:
    child.stdin.write(text)
    return finish_child(child)


def test_stored_data_that_is_unreadable_is_exported_and_refused(
    make_storage: Make, database: str, run: Run, tmp_path: Path
) -> None:
    write(make_storage(), KEYS[0], "a", {"n": 1})
    execute(database, "UPDATE fsm_storage_record SET data = '[1]'")
    file = tmp_path / "all.jsonl"
    run("fsm_export", "--alias", database, "--output", file)
    make_storage(alias="copy")
    said = run("fsm_import", file, "--alias", "copy")
    assert said.code == 3
    assert "line 1: has data of type list where an object belongs" in said.err
