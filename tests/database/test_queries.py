"""The plans of the queries that must not read the whole table, on 5,000 records."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections
from django.db.models import F, QuerySet
from django.db.models.functions import Now

from fsm_storage.codec import Codec
from fsm_storage.dialects import Read, Scope, Write, dialect_for
from fsm_storage.keys import RecordKeyBuilder
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.patches import Patch, Ttl
from tests.rows import execute, now_of

ROWS = 5_000
# SQLite gives the index of a unique constraint a name of its own.
BY_KEY = "fsm_storage_record_key|sqlite_autoindex_fsm_storage_record_1"
NEWEST = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def filled(database: str) -> Iterator[str]:
    """5,000 records in 500 states, one in a hundred of them expired, with two transitions each."""
    build = RecordKeyBuilder().build
    keys = [StorageKey(bot_id=1, chat_id=n // 2, user_id=n) for n in range(ROWS)]
    FSMRecord.objects.using(database).bulk_create(
        [
            FSMRecord(
                alias=database, key=build(key), bot_id=1, chat_id=key.chat_id, user_id=key.user_id, version=n,
                state=f"Form:s{n % 500}" if n % 3 else None, data={"n": n}, destiny="default",
                updated_at=NEWEST - timedelta(seconds=n),
            )
            for n, key in enumerate(keys)
        ]
    )  # fmt: skip
    rows = FSMRecord.objects.using(database)
    rows.update(state_expires_at=Now(), data_expires_at=Now())
    rows.filter(state=None).update(state_expires_at=None)
    later = now_of(database, 3600)
    for part in ("state_expires_at", "data_expires_at"):
        with connections[database].cursor() as cursor:
            cursor.execute(
                f"UPDATE fsm_storage_record SET {part} = {later} WHERE {part} IS NOT NULL AND id % 100 > 0"
            )
    FSMTransition.objects.using(database).bulk_create(
        [
            FSMTransition(
                alias=database,
                key=build(key),
                bot_id=1,
                chat_id=key.chat_id,
                user_id=key.user_id,
                to_state=state,
            )
            for key in keys
            for state in ("a", "b")
        ]
    )
    for table in ("fsm_storage_record", "fsm_storage_transition"):
        execute(database, f"ANALYZE {'TABLE' if database == 'mariadb' else ''} {table}")
    yield database
    connections[database].close()


def flaw(plan: str, index: str, table: str = "fsm_storage_record", *, in_order: bool = False) -> str | None:
    """Return the plan if it does not use the index, or walks through the whole table.

    `in_order`: a walk along the index is what a page of the newest needs.
    """
    walks = re.search(
        rf"Seq Scan on {table}\b|SCAN {table}\b"
        + (r"(?! USING)" if in_order else "")
        + rf"|\b({table}|r) (ALL|{'ALL' if in_order else 'index'})\b",  # MariaDB
        plan,
    )
    return plan if walks or not re.search(index, plan) else None


def questions(database: str) -> dict[str, tuple[QuerySet[Any], str]]:
    rows = FSMRecord.objects.using(database)
    return {
        "in some states": (rows.in_state("Form:s7", "Form:s8"), "fsm_storage_record_state"),
        "of a chat": (rows.for_chat(77), "fsm_storage_record_chat"),
        "of a user": (rows.for_user(77), "fsm_storage_record_user"),
        "of a key": (rows.with_key(StorageKey(1, 38, 77)), "fsm_storage_record_"),
        "the newest": (rows.order_by("-updated_at")[:50], "fsm_storage_record_updated"),
        "the newest, as the admin asks": (
            rows.order_by(F("updated_at").desc(), "-pk")[:50],
            "fsm_storage_record_updated",
        ),
        "with an expired state": (
            rows.state_expired().order_by("state_expires_at")[:50],
            "fsm_storage_record_state_exp",
        ),
        "with expired data": (
            rows.data_expired().order_by("data_expires_at")[:50],
            "fsm_storage_record_data_exp",
        ),
    }


def test_no_question_walks_through_the_table(filled: str) -> None:
    plans = {
        what: flaw(query.explain(), index, in_order="newest" in what)
        for what, (query, index) in questions(filled).items()
    }
    assert {what: plan for what, plan in plans.items() if plan} == {}
    record = FSMRecord.objects.using(filled).first()
    timeline = FSMTransition.objects.using(filled).of(record)[:50].explain()
    assert flaw(timeline, "fsm_storage_transition_key", "fsm_storage_transition") is None


def explained(database: str, sql: str, params: Any) -> str:
    connection = connections[database]
    connection.ensure_connection()
    if connection.vendor == "postgresql":
        from psycopg import Cursor

        cursor: Any = Cursor(connection.connection)
        cursor.execute(f"EXPLAIN {sql}", params)
    elif connection.vendor == "mysql":
        rows = execute(database, f"EXPLAIN {sql}", params)
        return "\n".join(" ".join(map(str, row)) for row in rows)
    else:
        cursor = sqlite3.Cursor(connection.connection)
        cursor.execute(f"EXPLAIN QUERY PLAN {sql}", params)
    return "\n".join(str(row[-1]) for row in cursor.fetchall())


def statements(database: str) -> dict[str, tuple[str, Any]]:
    dialect: Any = dialect_for(connections[database].vendor)
    scope = Scope(database, "states", Codec())
    keys = [StorageKey(bot_id=1, chat_id=n // 2, user_id=n) for n in range(0, 500, 10)]
    texts = [RecordKeyBuilder().build(key) for key in keys]
    patch = Patch(merge=('{"a":1}',))
    writes = [Write(text, key, patch, Ttl(), Ttl()) for text, key in zip(texts, keys, strict=True)]
    sweep = dialect.sweep(scope, 20)
    return {
        "read a state": next(dialect.read([Read(texts[0])], scope)),
        "read states": next(dialect.read([Read(text) for text in texts], scope)),
        "read data": next(dialect.read([Read(text, data=True) for text in texts], scope)),
        "write": next(dialect.write(writes[:1], scope)),
        "write a batch": next(dialect.write(writes, scope)),
        "sweep states": next(sweep),
        "sweep data": sweep.send([(0,)] if database == "postgres" else []),
    }


def test_no_statement_of_the_storage_walks_through_the_table(filled: str) -> None:
    index = {
        "sweep states": "fsm_storage_record_state_exp",
        "sweep data": "fsm_storage_record_data_exp",
    }
    plans = {
        what: flaw(explained(filled, *statement[:2]), index.get(what, BY_KEY))
        for what, statement in statements(filled).items()
    }
    assert {what: plan for what, plan in plans.items() if plan} == {}
