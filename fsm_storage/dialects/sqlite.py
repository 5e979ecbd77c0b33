"""SQLite: one writer at a time, no round trips. Reads the rows, patches them in Python, writes them back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fsm_storage.dialects import (
    NOTHING_SPARED,
    TOGETHER,
    Plan,
    Read,
    ReadReply,
    Scope,
    Spared,
    Statement,
    Sweep,
    Write,
    WriteReply,
)
from fsm_storage.dialects import sqlite_leases as leases
from fsm_storage.dialects import sqlite_peers as peers
from fsm_storage.dialects.rows import Expired, Row, Work, lapsed_of
from fsm_storage.patches import EMPTY

# Django keeps an instant as text in UTC; two such texts compare as the instants do.
_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"

# The keys or rows of a batch are one JSON parameter, not executemany(): sqlite3 gives the interpreter
# away at each execution, and with a busy event loop beside it may wait 5 ms to get it back, row by row.
# A lone one is bound as it is, which is twice as fast for one.
_KEYS = "json_each(?)"
_LONE_KEY = "(SELECT 0 AS key, ? AS value)"


def _values(columns: int, *, lone: bool) -> str:
    """Return a SELECT of so many columns for each row of a parameter."""
    if lone:
        return "SELECT " + ", ".join("?" * columns)
    return f"SELECT {', '.join(map(_column, range(columns)))} FROM json_each(?) j"


def _column(index: int) -> str:
    return f"json_extract(j.value, '$[{index}]')"


def _update(columns: tuple[str, ...], *, lone: bool) -> str:
    """Return an UPDATE of these columns; the row's id comes last."""
    if lone:
        return f"UPDATE fsm_storage_record SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?"
    assignments = ", ".join(f"{name} = {_column(index)}" for index, name in enumerate(columns))
    return f"""
        UPDATE fsm_storage_record SET {assignments} FROM json_each(?) j
        WHERE fsm_storage_record.id = {_column(len(columns))}
    """


# CROSS and LEFT JOIN keep the order of the loops: left to itself, SQLite may read all records for
# each key. `|| ''` hides a column's declared type from Django's converters, which would parse it.
_SELECT = f"""
SELECT {_NOW}, r.id, r.version, r.state, r.data, r.state_expires_at || '', r.data_expires_at || ''
FROM {{keys}} k LEFT JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.value
"""
_READ_STATES = f"""
SELECT k.key, CASE WHEN r.state_expires_at <= {_NOW} THEN NULL ELSE r.state END
FROM {{keys}} k CROSS JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.value
"""
_READ_DATA = f"""
SELECT k.key, CASE WHEN r.data_expires_at <= {_NOW} THEN '{{{{}}}}' ELSE r.data END
FROM {{keys}} k CROSS JOIN fsm_storage_record r ON r.alias = ? AND r.key = k.value
"""
_INSERT = """
INSERT INTO fsm_storage_record (alias, key, bot_id, chat_id, user_id, thread_id, business_connection_id,
    destiny, state, data, state_expires_at, data_expires_at, version, created_at, updated_at)
"""
_TRANSITION = """
INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
    source, actor, data_before, data_after)
"""
_CHANGING = ("state", "state_expires_at", "data_expires_at", "version", "updated_at")


class _Sql:
    """The statements in one of their two spellings."""

    def __init__(self, *, lone: bool) -> None:
        keys = _LONE_KEY if lone else _KEYS
        self.select = _SELECT.format(keys=keys)
        self.read_states, self.read_data = _READ_STATES.format(keys=keys), _READ_DATA.format(keys=keys)
        self.insert = _INSERT + _values(15, lone=lone)
        self.update_state = _update(_CHANGING, lone=lone)
        self.update_all = _update((*_CHANGING, "data"), lone=lone)
        self.transition = _TRANSITION + _values(12, lone=lone)


_BATCH, _LONE = _Sql(lone=False), _Sql(lone=True)
_EXPIRED = """
SELECT id, key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny, version, state, data,
    {part}_expires_at || '' FROM fsm_storage_record
WHERE {part}_expires_at <= {now} AND alias = ? {unless} ORDER BY {part}_expires_at LIMIT ?
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

    reads_apart = False
    write_begin = "BEGIN IMMEDIATE"
    binds_on_server = False
    claim = staticmethod(leases.claim)
    sweep_leases = staticmethod(leases.sweep)
    name = staticmethod(peers.name)

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        replies: list[ReadReply] = [EMPTY if read.data else None for read in reads]
        for data in (False, True):
            places = [place for place, read in enumerate(reads) if read.data is data]
            if places:
                sql, keys = _for_keys([reads[place].key for place in places])
                rows = yield Statement(sql.read_data if data else sql.read_states, (keys, scope.alias))
                for index, value in rows:
                    replies[places[index]] = value
        return replies

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, lone: bool = False
    ) -> Plan[list[WriteReply]]:
        sql, keys = _for_keys([write.key for write in writes])
        rows = yield Statement(sql.select, (keys, scope.alias))
        work = Work(scope, rows[0][0])
        replies = [work.add(write, Row(*row)) for write, row in zip(writes, rows, strict=True)]
        yield from _statements(work)
        return replies

    def sweep(self, scope: Scope, limit: int, spared: Spared = NOTHING_SPARED) -> Plan[Sweep]:
        is_spared = spared.states is None, _json(spared.states or ())
        rows = yield Statement(_EXPIRED_STATES, (scope.alias, *is_spared, limit))
        states = [Expired(*row) for row in rows]
        if states:
            if scope.history != "off":
                noted = [row.transition("state", scope) for row in states]
                yield Statement(_BATCH.transition, (_json(noted),))
            yield Statement(_CLEAR_STATES, (_ids(states),))
        rows = yield Statement(_EXPIRED_DATA, (scope.alias, spared.data, *is_spared, limit))
        data = [Expired(*row) for row in rows]
        lost = [row for row in data if row.data != EMPTY]
        if scope.history == "full" and lost:
            noted = [row.transition("data", scope) for row in lost]
            yield Statement(_BATCH.transition, (_json(noted),))
        deleted = (yield Statement(_DELETE_IDLE, (_ids(data),))) if data else []
        if data:
            yield Statement(_CLEAR_DATA, (_ids(data),))
        lapsed = lapsed_of(states, lost, {row[0] for row in deleted}) if scope.tells else ()
        return Sweep(len(states), len(lost), len(deleted), lapsed)

    def session(self, timeout: float) -> Sequence[str]:
        # WAL stays with the file: readers and the writer no longer wait for one another. The wait
        # for a lock is cut in pieces, so that a thread that shall give up is not stuck in one.
        # Checkpoints come four times as late as by default (16 MB), which makes writes a tenth faster.
        return (
            "PRAGMA journal_mode = WAL",
            "PRAGMA wal_autocheckpoint = 4000",
            f"PRAGMA busy_timeout = {int(min(timeout, 1.0) * 1000)}",
        )

    def lock_limits(self, timeout: float) -> Sequence[str]:
        return ()

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
    for name, rows in (
        ("insert", work.inserts),
        ("update_state", work.state_updates),
        ("update_all", work.updates),
        ("transition", work.transitions),
    ):
        if len(rows) == 1:
            yield Statement(getattr(_LONE, name), rows[0])
        elif rows:
            yield Statement(getattr(_BATCH, name), (_json(rows),))


def _for_keys(keys: list[str]) -> tuple[_Sql, str]:
    return (_LONE, keys[0]) if len(keys) == 1 else (_BATCH, _json(keys))


def _ids(rows: Sequence[Expired]) -> str:
    return _json([row.id for row in rows])


dialect = SQLite()
