"""The signals: what is told, when, and that it harms nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import transaction
from django.dispatch import Signal

from fsm_storage import DjangoStorage, signals
from fsm_storage.signals import conversation_expired, data_changed, state_changed
from tests.database.conftest import Statements
from tests.rows import in_thread, let_time_pass, record, records

Make = Callable[..., DjangoStorage]
NAMES = {state_changed: "state", data_changed: "data", conversation_expired: "expired"}


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


class Ear:
    """Notes what it hears, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, signal: Signal, sender: type, **arguments: Any) -> None:
        assert issubclass(sender, DjangoStorage)
        self.heard.append((NAMES[signal], arguments))

    def told(self) -> list[tuple[Any, ...]]:
        """Return the signals and what is special in them, and forget them."""
        short = [
            (name, *(a[n] for n in ("part", "state", "old_state", "new_state") if n in a), a["source"])
            for name, a in self.heard
        ]
        self.heard.clear()
        return short


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write waits for its receivers, also where a busy machine stands still."""
    monkeypatch.setattr(signals, "PATIENCE", 30.0)


@pytest.fixture
def ear() -> Iterator[Ear]:
    ear = Ear()
    with ExitStack() as stack:
        for signal in NAMES:
            signal.connect(ear)
            stack.callback(signal.disconnect, ear)
        yield ear


@pytest.mark.parametrize("history", ["off", "states", "full"])
async def test_each_real_change_is_told_and_nothing_else(
    make_storage: Make, ear: Ear, key: StorageKey, history: str
) -> None:
    storage = make_storage(history=history)
    await storage.set_state(key, "a")
    assert ear.told() == [("state", None, "a", "bot")]
    await storage.set_state(key, "a")
    await storage.set_data(key, {})
    assert ear.told() == []
    await storage.set_data(key, {"n": 1, "m": [1.0]})
    await storage.update_data(key, {"n": 2})
    assert ear.told() == [("data", "bot"), ("data", "bot")]
    await storage.update_data(key, {"n": 2})
    await storage.set_data(key, {"m": [1.0], "n": 2})
    assert ear.told() == []
    await storage.set_state(key, "b")
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    assert ear.told() == [("state", "a", "b", "bot"), ("state", "b", None, "bot"), ("data", "bot")]


async def test_what_is_told_names_the_record(
    storage: DjangoStorage, ear: Ear, key: StorageKey, database: str
) -> None:
    await storage.set_state(key, "a")
    row = await in_thread(record, database)
    assert ear.heard == [
        (
            "state",
            {
                "alias": database, "key": key, "record_key": row.key, "version": row.version,
                "source": "bot", "actor": "", "old_state": None, "new_state": "a",
            },
        )
    ]  # fmt: skip


async def test_every_write_of_a_batch_is_told(storage: DjangoStorage, ear: Ear) -> None:
    await asyncio.gather(*(storage.set_state(chat(n), f"s{n}") for n in range(20)))
    await asyncio.gather(*(storage.update_data(chat(n), {"n": n}) for n in range(0, 20, 2)))
    states = {a["key"].chat_id: a["new_state"] for name, a in ear.heard if name == "state"}
    assert states == {n: f"s{n}" for n in range(20)}
    assert sorted(a["key"].chat_id for name, a in ear.heard if name == "data") == list(range(0, 20, 2))


async def test_a_write_over_what_had_expired_tells_of_that_first(
    make_storage: Make, ear: Ear, key: StorageKey, database: str
) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await in_thread(let_time_pass, database, 150)
    expires_at = (await in_thread(record, database)).state_expires_at
    ear.told()
    await storage.set_state(key, "b")
    assert ear.heard[0][1]["expired_at"] == expires_at
    assert ear.told() == [
        ("expired", "state", "a", "expiry"),
        ("state", "a", None, "expiry"),
        ("state", None, "b", "bot"),
    ]
    await storage.update_data(key, {"n": 2})
    assert ear.told() == [("expired", "data", "b", "expiry"), ("data", "expiry"), ("data", "bot")]


async def test_the_sweep_tells(make_storage: Make, ear: Ear, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    await storage.set_state(chat(1), "a")
    await storage.set_data(chat(1), {"n": 1})
    await storage.set_state(chat(2), "b")
    await in_thread(let_time_pass, database, 150)
    await storage.set_state(chat(2), None)
    ear.told()
    await in_thread(storage.sweep)
    assert {a["version"] for _, a in ear.heard} == {None}  # the record is gone
    assert isinstance(ear.heard[0][1]["expired_at"], datetime)
    assert ear.told() == [
        ("expired", "state", "a", "expiry"),
        ("state", "a", None, "expiry"),
        ("expired", "data", None, "expiry"),  # the state went a moment before
        ("data", "expiry"),
    ]


async def test_an_edit_is_told_after_the_commit(storage: DjangoStorage, ear: Ear, database: str) -> None:
    await storage.set_state(chat(1), "a")
    ear.told()

    def edit() -> None:
        row = record(database)
        with transaction.atomic(using=database):
            row.edit(state="b", data={"n": 1}, by="ann")
            assert ear.heard == []
        assert [(a["actor"], a["version"]) for _, a in ear.heard] == [("ann", row.version)] * 2
        assert ear.told() == [("state", "a", "b", "admin"), ("data", "admin")]
        with transaction.atomic(using=database):
            row.edit(state="c")
            transaction.set_rollback(True, using=database)
        assert ear.told() == []
        row.edit(state="d", source="import")
        assert ear.told() == [("state", "b", "d", "import")]
        row.edit(state_ttl=timedelta(hours=1))
        assert ear.told() == []

    await in_thread(edit)


async def test_a_receiver_that_raises_harms_no_write(
    storage: DjangoStorage, ear: Ear, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(**_: Any) -> None:
        raise ZeroDivisionError("the receiver's")

    state_changed.connect(fail)
    try:
        await storage.set_state(key, "a")
        await in_thread(lambda: record(storage.database).edit(state="b"))
    finally:
        state_changed.disconnect(fail)
    assert await storage.get_state(key) == "b"
    assert len(ear.told()) == 2
    assert caplog.text.count("ZeroDivisionError: the receiver's") == 2


async def test_a_slow_receiver_lets_the_write_return(
    storage: DjangoStorage, key: StorageKey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.05)
    go_on, done = asyncio.Event(), asyncio.Event()

    async def dawdle(**_: Any) -> None:
        await go_on.wait()
        done.set()

    state_changed.connect(dawdle)
    try:
        with caplog.at_level(logging.WARNING, "fsm_storage"):
            await asyncio.wait_for(storage.set_state(key, "a"), 20)
    finally:
        state_changed.disconnect(dawdle)
    assert await storage.get_state(key) == "a"
    assert "are slow" in caplog.text
    assert not done.is_set()
    go_on.set()
    await asyncio.wait_for(done.wait(), 20)  # it was not cancelled


async def test_what_a_cancelled_caller_wrote_is_told(
    storage: DjangoStorage, ear: Ear, key: StorageKey
) -> None:
    await storage.get_state(key)
    writing = asyncio.create_task(storage.set_state(key, "a"))  # type: ignore[var-annotated]
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    async with asyncio.timeout(10):
        while not ear.heard:
            await asyncio.sleep(0.01)
    assert await storage.get_state(key) == "a"
    assert ear.told() == [("state", None, "a", "bot")]


async def test_nothing_is_asked_while_nobody_listens(
    statements: Statements, make_storage: Make, key: StorageKey
) -> None:
    """The statements are those of a storage without signals: on PostgreSQL, a lone write goes its short way."""
    storage = make_storage()
    await storage.set_state(key, "a")
    silent = statements.seen[-1]
    ear = Ear()
    state_changed.connect(ear)
    await storage.set_state(key, "b")
    state_changed.disconnect(ear)
    await storage.set_state(key, "c")
    if storage.database == "postgres":
        assert ("touches_state" in silent, "touches_state" in statements.seen[-2]) == (False, True)
        assert statements.seen[-1] == silent
    assert len(ear.heard) == 1


# Hints


@pytest.fixture
def hinted() -> Iterator[list[tuple[str, dict[str, int | None]]]]:
    noted: list[tuple[str, dict[str, int | None]]] = []

    def note(alias: str, written: Any) -> None:
        noted.append((alias, dict(written)))

    signals.hints.append(note)
    yield noted
    signals.hints.remove(note)


async def test_a_hint_comes_for_each_commit(
    make_storage: Make, database: str, hinted: list[tuple[str, dict[str, int | None]]]
) -> None:
    storage = make_storage(state_ttl=100)
    await asyncio.gather(*(storage.set_state(chat(n), "a") for n in range(30)))
    rows = await in_thread(records, database)
    assert {alias for alias, _ in hinted} == {database}
    assert {key: version for _, written in hinted for key, version in written.items()} == {
        row.key: row.version for row in rows
    }
    hinted.clear()
    await in_thread(rows[0].edit, state="b")
    assert hinted == [(database, {rows[0].key: rows[0].version})]
    hinted.clear()
    await in_thread(let_time_pass, database, 150)
    await in_thread(storage.sweep)
    assert {key for _, written in hinted for key in written} == {row.key for row in rows}
    assert {version for _, written in hinted for version in written.values()} == {None}


async def test_a_hint_that_raises_harms_no_write(
    storage: DjangoStorage, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(alias: str, written: Any) -> None:
        raise ZeroDivisionError

    signals.hints.append(fail)
    try:
        await storage.set_state(key, "a")
    finally:
        signals.hints.remove(fail)
    assert await storage.get_state(key) == "a"
    assert "a hint of 1 changes" in caplog.text


async def test_in_a_transaction_of_a_test_it_is_told_at_once(
    make_storage: Make, ear: Ear, key: StorageKey
) -> None:
    storage = make_storage(in_transaction=True)
    await storage.set_state(key, "a")
    assert ear.told() == [("state", None, "a", "bot")]
