"""PostgreSQL's two ways for a batch of writes do the same: the upsert, and the statement that locks first."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey

from fsm_storage.backends.session import Session
from fsm_storage.codec import Codec
from fsm_storage.dialects import Scope, Write, Written
from fsm_storage.dialects.postgresql import PostgreSQL
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.patches import Patch, Ttl
from tests.conftest import POSTGRES, POSTGRES16

KEYS = [StorageKey(bot_id=1, chat_id=number, user_id=number + 1000, thread_id=5) for number in range(24)]
PATCHES = [
    Patch("Order:a"), Patch("Order:b"), Patch(""), Patch(None),
    Patch(data="{}"), Patch(data='{"a": 1}'), Patch(data='{"x": {"y": 1e23}}'),
    Patch(merge=("{}",)), Patch(merge=('{"a": 2, "b": null}',)), Patch(merge=('{"n": 12345678901234567890}',)),
    Patch("Order:c", '{"c": 3}'), Patch(None, "{}"), Patch("Order:c", merge=('{"c": 4}',)),
]  # fmt: skip


def text(key: StorageKey) -> str:
    return f"1:{key.chat_id}:{key.user_id}:5"


def fill(alias: str, database: str, choose: random.Random) -> None:
    """Make records of every kind: with and without state and data, expired, about to expire, corrupt, none."""
    now = datetime.now(UTC)
    instants = [None, now - timedelta(hours=1), now + timedelta(hours=1)]
    for key in KEYS:
        state, data = (
            choose.choice(["Order:a", "Order:b", None]),
            choose.choice([{}, {"a": 1}, {"z": [1]}, 5]),
        )
        state_at, data_at = choose.choice(instants), choose.choice(instants)
        if choose.random() < 0.25:
            continue
        FSMRecord.objects.using(database).create(
            alias=alias, key=text(key), bot_id=1, chat_id=key.chat_id, user_id=key.user_id, thread_id=5,
            state=state, data=data, version=7,
            state_expires_at=state_at if state is not None else None,
            data_expires_at=data_at if data != {} else None if state is not None else now,
        )  # fmt: skip


def outcome(alias: str, database: str) -> tuple[list[Any], list[Any]]:
    """Return what records and transitions there are; instants by how far off they are."""
    now = datetime.now(UTC)

    def rough(at: datetime | None) -> Any:
        return at and round((at - now).total_seconds() / 60)

    rows = FSMRecord.objects.using(database).filter(alias=alias).order_by("key")
    records = [
        (row.key, row.thread_id, row.state, row.data, rough(row.state_expires_at), rough(row.data_expires_at),
         row.version if row.version < 100 else "new", rough(row.updated_at))
        for row in rows
    ]  # fmt: skip
    noted = FSMTransition.objects.using(database).filter(alias=alias).order_by("key", "id")
    fields = ("key", "chat_id", "from_state", "to_state", "source", "actor")
    return records, [(*row[:-1], rough(row[-1])) for row in noted.values_list(*fields, "at")]


def answers(replies: Any) -> list[Any]:
    return [
        (reply.version and min(reply.version, 100), reply.text and json.loads(reply.text))
        if isinstance(reply, Written)
        else (type(reply), str(reply))
        for reply in replies
    ]


@pytest.mark.parametrize("database", [POSTGRES, POSTGRES16], indirect=True)
@pytest.mark.parametrize("history", ["off", "states"])
@pytest.mark.parametrize("ttl", [Ttl(), Ttl(600.0)], ids=["for-ever", "ten-minutes"])
def test_both_ways_do_the_same(database: str, history: Any, ttl: Ttl) -> None:
    seen = []
    for alias in ("short", "long"):
        choose = random.Random(1)
        session = Session(database, 5.0)
        for _ in range(8):
            FSMRecord.objects.using(database).filter(alias=alias).delete()
            fill(alias, database, choose)
            writes = [Write(text(key), key, choose.choice(PATCHES), ttl, ttl) for key in KEYS]
            choose.shuffle(writes)
            session._contended = {write.key for write in writes} if alias == "long" else set()
            unit = session._unit()
            session._prepare(unit)
            # Not `write()`, which would hide an error of the upsert by going write by write.
            replies = session._write(unit, writes, Scope(alias, history, Codec()))
            seen.append((alias, answers(replies), outcome(alias, database)))
        session.release()
    half = len(seen) // 2
    for short, long in zip(seen[:half], seen[half:], strict=True):
        assert short[1:] == long[1:]


@pytest.mark.parametrize(("version", "history", "is_short"), [
    (180001, "states", True), (180001, "off", True), (180001, "full", False),
    (170005, "off", True), (170005, "states", False),
])  # fmt: skip
def test_the_short_way_is_taken_where_it_can_be(version: int, history: Any, is_short: bool) -> None:
    writes = [Write(text(key), key, Patch("Order:a")) for key in KEYS]
    scope = Scope("shop", history, Codec())
    dialect = PostgreSQL().at(version)
    assert ("DO UPDATE" in next(dialect.write(writes, scope, free=True)).sql) is is_short
    assert "DO UPDATE" not in next(dialect.write(writes, scope)).sql
    fenced = [*writes[1:], writes[0]._replace(if_version=5)]
    assert "DO UPDATE" not in next(dialect.write(fenced, scope, free=True)).sql
