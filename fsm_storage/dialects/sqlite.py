"""SQLite: one writer at a time, no round trips. Reads the rows, patches them in Python, writes them back."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

from fsm_storage.dialects import (
    NOTHING_SPARED,
    TOGETHER,
    AsOf,
    Plan,
    Read,
    ReadReply,
    Rows,
    Scope,
    Spared,
    Statement,
    Sweep,
    Write,
    WriteReply,
)
from fsm_storage.dialects import sqlite_leases as leases
from fsm_storage.dialects import sqlite_peers as peers
from fsm_storage.dialects.rows import Expired, Row, Work, due_until, lapsed_of
from fsm_storage.exceptions import LeaseLost
from fsm_storage.patches import EMPTY

T = TypeVar("T")

# Django keeps an instant as text in UTC; two such texts compare as the instants do.
_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"

# The keys or rows of a batch go into one statement, not to executemany(): sqlite3 gives the interpreter
# away at each execution, and with a busy event loop beside it may wait 5 ms to get it back, row by row.
# A statement has room for 1, 2, 3, 4, 6, 8, 12 … rows, so few sizes that sqlite3 remembers them all; what is
# left over is NULL.
# (Rows as one JSON parameter take a third longer, because json_extract() parses a row for each column.)
MAX_ROWS = 256
LOG_PAGES = 4000
"""A commit of a worker thread makes a checkpoint when the write-ahead log has so many pages (of 4 KB: 16 MB)."""


def _places(columns: int, rows: int) -> str:
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


def _insert(table_and_columns: str, rows: int) -> str:
    columns = table_and_columns.count(",") + 1
    if rows == 1:
        return f"INSERT INTO {table_and_columns} VALUES {_places(columns, 1)}"
    values = _places(columns, rows)
    return f"INSERT INTO {table_and_columns} SELECT * FROM (VALUES {values}) WHERE column1 IS NOT NULL"


def _update(columns: tuple[str, ...], rows: int) -> str:
    """Return an UPDATE of these columns; the row's id comes last."""
    if rows == 1:
        return f"UPDATE fsm_storage_record SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?"
    assignments = ", ".join(f"{name} = v.column{index}" for index, name in enumerate(columns, 1))
    return f"""
        UPDATE fsm_storage_record SET {assignments} FROM (VALUES {_places(len(columns) + 1, rows)}) v
        WHERE fsm_storage_record.id = v.column{len(columns) + 1}
    """


# CROSS and LEFT JOIN keep the order of the loops: left to itself, SQLite may read all records for
# each key. `|| ''` hides a column's declared type from Django's converters, which would parse it.
_SELECT = f"""
SELECT {_NOW}, r.id, r.version, r.state, r.data, r.state_expires_at || '', r.data_expires_at || ''
FROM (VALUES {{keys}}) k LEFT JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.column2
"""
_READ_STATES = f"""
SELECT k.column1, CASE WHEN r.state_expires_at <= {_NOW} THEN NULL ELSE r.state END
FROM (VALUES {{keys}}) k CROSS JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.column2
"""
_READ_DATA = f"""
SELECT k.column1, CASE WHEN r.data_expires_at <= {_NOW} THEN '{{{{}}}}' ELSE r.data END
FROM (VALUES {{keys}}) k CROSS JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.column2
"""
_RECORD = """fsm_storage_record (alias, key, bot_id, chat_id, user_id, thread_id, business_connection_id,
    destiny, state, data, state_expires_at, data_expires_at, version, created_at, updated_at)
"""
_TRANSITION = """fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
    source, actor, data_before, data_after)
"""
_CHANGING = ("state", "state_expires_at", "data_expires_at", "version", "updated_at")


class _Sql:
    """The statements with room for so many keys or rows."""

    def __init__(self, size: int) -> None:
        keys = ", ".join(f"({place}, ?)" for place in range(size))
        self.select = _SELECT.format(keys=keys)
        self.read_states, self.read_data = _READ_STATES.format(keys=keys), _READ_DATA.format(keys=keys)
        self.insert, self.transition = _insert(_RECORD, size), _insert(_TRANSITION, size)
        self.update_state = _update(_CHANGING, size)
        self.update_all = _update((*_CHANGING, "data"), size)


_SQL = {
    size: _Sql(size)
    for size in sorted({1, *(part << n for part in (2, 3) for n in range(8))})
    if size <= MAX_ROWS
}
_SIZES = list(_SQL)


def _room_for(count: int) -> int:
    return _SIZES[bisect_left(_SIZES, count)]


_EXPIRED = """
SELECT id, key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny, version, state, data,
    {part}_expires_at || '' FROM fsm_storage_record
WHERE {part}_expires_at <= coalesce(?, {now}) AND alias = ? AND version < ? {unless} ORDER BY {part}_expires_at LIMIT ?
"""
# Its parameters: whether every state is spared, and a list of those that are.
_IS_SPARED = "(? OR coalesce(state IN (SELECT value FROM json_each(?)), 0))"
_EXPIRED_STATES = _EXPIRED.format(part="state", now=_NOW, unless=f"AND NOT {_IS_SPARED}")
_EXPIRED_DATA = _EXPIRED.format(
    part="data",
    now=_NOW,
    unless=f"""AND NOT (? AND data <> '{{}}') AND NOT (coalesce(state_expires_at
        <= strftime('%Y-%m-%d %H:%M:%f', data_expires_at, '+{TOGETHER} seconds'), 0) AND {_IS_SPARED})""",
)
_CLEAR_STATES = f"""
UPDATE fsm_storage_record SET state = NULL, state_expires_at = NULL, version = version + 1, updated_at = {_NOW},
    data_expires_at = CASE WHEN data = '{{}}' THEN {_NOW} ELSE data_expires_at END
WHERE id IN (SELECT value FROM json_each(?))
"""
_DELETE_IDLE = """
DELETE FROM fsm_storage_record WHERE id IN (SELECT value FROM json_each(?)) AND state IS NULL RETURNING id
"""
_CLEAR_DATA = f"""
UPDATE fsm_storage_record SET data = '{{}}', data_expires_at = NULL, version = version + 1, updated_at = {_NOW}
WHERE id IN (SELECT value FROM json_each(?))
"""


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class SQLite:
    """See `Dialect`."""

    is_embedded = True
    reads_apart = False
    writers = 1
    write_begin = "BEGIN IMMEDIATE"
    binds_on_server = False
    paramstyle = "qmark"
    # It waits for no lock and makes no checkpoint, which both would hold the loop.
    drives = "PRAGMA busy_timeout = 0", "PRAGMA wal_autocheckpoint = 0"
    joins = False
    claim = staticmethod(leases.claim)
    sweep_leases = staticmethod(leases.sweep)
    name = staticmethod(peers.name)

    def at(self, version: int) -> SQLite:
        return self

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        replies: list[ReadReply] = [EMPTY if read.data else None for read in reads]
        for data in (False, True):
            places = [place for place, read in enumerate(reads) if read.data is data]
            for some in _chunks(places):
                sql = _SQL[_room_for(len(some))]
                keys = _filled([reads[place].key for place in some])
                rows = yield Statement(sql.read_data if data else sql.read_states, (*keys, scope.alias))
                for index, value in rows:
                    replies[some[index]] = value
        return replies

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, free: bool = False
    ) -> Plan[list[WriteReply]]:
        found: Rows = []
        for some in _chunks(writes):
            keys = _filled([write.key for write in some])
            rows = yield Statement(_SQL[len(keys)].select, (*keys, scope.alias))
            found += rows[: len(some)]
        fences = {write.fence for write in writes if write.fence is not None}
        lost = (yield from leases.lost(fences, scope)) if fences else fences
        work = Work(scope, found[0][0])
        replies: list[WriteReply] = [
            LeaseLost(write.fence.key)
            if write.fence is not None and write.fence in lost
            else work.add(write, Row(*row))
            for write, row in zip(writes, found, strict=True)
        ]
        yield from _statements(work)
        return replies

    def sweep(
        self, scope: Scope, limit: int, spared: Spared = NOTHING_SPARED, as_of: AsOf | None = None
    ) -> Plan[Sweep]:
        place = due_until(scope, as_of)
        is_spared = spared.states is None, _json(spared.states or ())
        rows = yield Statement(_EXPIRED_STATES, (*place, *is_spared, limit))
        states = [Expired(*row) for row in rows]
        if states:
            if scope.history != "off":
                yield from _rows("transition", [row.transition("state", scope) for row in states])
            yield Statement(_CLEAR_STATES, (_ids(states),))
        rows = yield Statement(_EXPIRED_DATA, (*place, spared.data, *is_spared, limit))
        data = [Expired(*row) for row in rows]
        lost = [row for row in data if row.data != EMPTY]
        if scope.history == "full" and lost:
            yield from _rows("transition", [row.transition("data", scope) for row in lost])
        deleted = (yield Statement(_DELETE_IDLE, (_ids(data),))) if data else []
        if data:
            yield Statement(_CLEAR_DATA, (_ids(data),))
        lapsed = lapsed_of(states, lost, {row[0] for row in deleted}) if scope.tells else ()
        return Sweep(len(states), len(lost), len(deleted), lapsed)

    def session(self, timeout: float) -> Sequence[str]:
        # WAL stays with the file: readers and the writer no longer wait for one another. The wait
        # for a lock is cut in pieces, so that a thread that shall give up is not stuck in one.
        # Checkpoints come four times as late as by default, which makes writes a tenth faster.
        # What a statement of many rows keeps to undo itself goes to memory: a file costs half of its time.
        return (
            "PRAGMA journal_mode = WAL",
            f"PRAGMA wal_autocheckpoint = {LOG_PAGES}",
            "PRAGMA temp_store = MEMORY",
            f"PRAGMA busy_timeout = {int(min(timeout, 1.0) * 1000)}",
        )

    def lock_limits(self, timeout: float) -> tuple[Sequence[str], Sequence[str]]:
        return (), ()

    def is_lock_timeout(self, code: str | None, message: str) -> bool:
        return False

    def has_stale_plan(self, code: str | None) -> bool:
        return False

    def is_pooled(self, code: str | None) -> bool:
        return False

    def is_transient(self, code: str | None, message: str) -> bool:
        return "locked" in message or "busy" in message

    def is_missing_table(self, code: str | None, message: str) -> bool:
        return "no such table" in message or "no such column" in message or "has no column" in message


def _statements(work: Work) -> Plan[None]:
    yield from _rows("insert", work.inserts)
    yield from _rows("update_state", work.state_updates)
    yield from _rows("update_all", work.updates)
    yield from _rows("transition", work.transitions)


def _rows(statement: str, rows: Sequence[tuple[Any, ...]]) -> Plan[None]:
    """Write the rows by one of the statements of `_Sql`."""
    for some in _chunks(rows):
        size = _room_for(len(some))
        params = list(chain.from_iterable(some))
        params += [None] * ((size - len(some)) * len(some[0]))
        yield Statement(getattr(_SQL[size], statement), params)


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + MAX_ROWS] for start in range(0, len(values), MAX_ROWS))


def _filled(keys: list[str]) -> list[str | None]:
    """Return the keys, and as many NULLs as the statement has room for beyond them."""
    return [*keys, *[None] * (_room_for(len(keys)) - len(keys))]


def _ids(rows: Sequence[Expired]) -> str:
    return _json([row.id for row in rows])


dialect = SQLite()
