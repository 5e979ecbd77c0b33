"""SQLite: one writer at a time, no round trips. Reads the rows, patches them in Python, writes them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fsm_storage.codec import is_json
from fsm_storage.dialects import Plan, Read, ReadReply, Rows, Scope, Statement, Write, WriteReply, Written
from fsm_storage.exceptions import CorruptData, VersionConflict
from fsm_storage.patches import EMPTY, KEEP, Content, Seconds, apply

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
_EXPIRED_STATES = f"""
SELECT id, key, bot_id, chat_id, user_id, state, data, state_expires_at || '' FROM fsm_storage_record
WHERE state_expires_at <= {_NOW} AND alias = ? ORDER BY state_expires_at LIMIT ?
"""
_EXPIRED_DATA = f"""
SELECT id, key, bot_id, chat_id, user_id, state, data, data_expires_at || '' FROM fsm_storage_record
WHERE data_expires_at <= {_NOW} AND alias = ? ORDER BY data_expires_at LIMIT ?
"""
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


class _Row(NamedTuple):
    now: str
    id: int | None
    version: int
    state: str | None
    data: str
    state_expires_at: str | None
    data_expires_at: str | None


class _Clock:
    """The database's time, and the texts of instants. Most rows of a batch share theirs."""

    def __init__(self, now: str) -> None:
        self.text = now
        self.now = _seconds(now)
        self.version = int(self.now * 1_000_000)
        self._texts = {self.now: now}

    def write(self, instant: Seconds | None) -> str | None:
        if instant is None:
            return None
        text = self._texts.get(instant)
        if text is None:
            text = datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
            self._texts[instant] = text
        return text


def _seconds(text: str) -> Seconds:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class _Work:
    """Collects the rows to write."""

    def __init__(self, scope: Scope, now: str) -> None:
        self.scope, self.clock = scope, _Clock(now)
        self.inserts: list[tuple[Any, ...]] = []
        self.state_updates: list[tuple[Any, ...]] = []
        self.updates: list[tuple[Any, ...]] = []
        self.transitions: list[tuple[Any, ...]] = []

    def add(self, write: Write, row: _Row) -> WriteReply:
        """Note what `write` does to `row`, and return its reply."""
        if write.if_version is not None and row.version != write.if_version:
            return VersionConflict(write.key, write.if_version, row.version if row.id else None)
        old = (
            Content()
            if row.id is None
            else Content(
                row.state,
                row.data,
                None if row.state_expires_at is None else _seconds(row.state_expires_at),
                None if row.data_expires_at is None else _seconds(row.data_expires_at),
            )
        )
        merged: dict[str, Any] | None = None

        def fold(base: str, over: tuple[str, ...]) -> str:
            nonlocal merged
            text, merged = self.scope.codec.fold(write.key, base, over)
            return text

        try:
            new = apply(
                write.patch,
                old,
                self.clock.now,
                fold=fold,
                state_ttl=write.state_ttl,
                data_ttl=write.data_ttl,
            )
        except CorruptData as error:
            return error
        if row.id is None and new.state is None and new.data == EMPTY:
            return Written(None, merged=merged)
        version = self._save(write, row, new)
        if self.scope.history != "off":
            self._note(write, old, new)
        return Written(version, merged=merged)

    def _save(self, write: Write, row: _Row, new: Content) -> int:
        clock, parts = self.clock, write.parts
        expiries = clock.write(new.state_expires_at), clock.write(new.data_expires_at)
        if row.id is None:
            version = clock.version
            self.inserts.append(
                (
                    self.scope.alias, write.key, parts.bot_id, parts.chat_id, parts.user_id, parts.thread_id,
                    parts.business_connection_id, parts.destiny, new.state, new.data, *expiries, version,
                    clock.text, clock.text,
                )
            )  # fmt: skip
            return version
        version = row.version + 1
        if new.data is row.data:
            self.state_updates.append((new.state, *expiries, version, clock.text, row.id))
        else:
            self.updates.append((new.state, *expiries, version, clock.text, new.data, row.id))
        return version

    def _note(self, write: Write, old: Content, new: Content) -> None:
        """Note the transitions: of an expiry that nobody swept before it was overwritten, then the change."""
        now, full = self.clock.now, self.scope.history == "full"
        before, after = old.live_state(now), new.live_state(now)
        data_before, data_after = old.live_data(now), new.live_data(now)
        touches_state = write.patch.state is not KEEP or write.state_ttl.renew
        if touches_state and old.state is not None and before is None:
            data = _valid(data_before) if full else None
            at = self.clock.write(old.state_expires_at)
            self._add_transition(write, old.state, None, at, ("expiry", ""), data, data)
        if before != after or (full and _differ(data_before, data_after)):
            kept = (_valid(data_before), _valid(data_after)) if full else (None, None)
            self._add_transition(write, before, after, self.clock.text, self.scope.cause, *kept)

    def _add_transition(
        self, write: Write, before: str | None, after: str | None, at: str | None,
        cause: tuple[str, str], data_before: str | None, data_after: str | None,
    ) -> None:  # fmt: skip
        parts = write.parts
        self.transitions.append(
            (
                self.scope.alias, write.key, parts.bot_id, parts.chat_id, parts.user_id, before, after, at,
                *cause, data_before, data_after,
            )
        )  # fmt: skip

    def statements(self) -> Plan[None]:
        for name, rows in (
            ("insert", self.inserts),
            ("update_state", self.state_updates),
            ("update_all", self.updates),
            ("transition", self.transitions),
        ):
            if len(rows) == 1:
                yield Statement(getattr(_LONE, name), rows[0])
            elif rows:
                yield Statement(getattr(_BATCH, name), (_json(rows),))


class SQLite:
    """See `Dialect`."""

    reads_apart = False
    write_begin = "BEGIN IMMEDIATE"
    binds_on_server = False
    prepares = False

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
        work = _Work(scope, rows[0][0])
        replies = [work.add(write, _Row(*row)) for write, row in zip(writes, rows, strict=True)]
        yield from work.statements()
        return replies

    def sweep(self, scope: Scope, limit: int) -> Plan[tuple[int, int, int]]:
        states = yield Statement(_EXPIRED_STATES, (scope.alias, limit))
        if states:
            if scope.history != "off":
                yield Statement(_BATCH.transition, (_json([_state_expiry(row, scope) for row in states]),))
            yield Statement(_CLEAR_STATES, (_ids(states),))
        data = yield Statement(_EXPIRED_DATA, (scope.alias, limit))
        if not data:
            return len(states), 0, 0
        lost = [row for row in data if row[6] != EMPTY]
        if scope.history == "full" and lost:
            yield Statement(_BATCH.transition, (_json([_data_expiry(row, scope) for row in lost]),))
        deleted = yield Statement(_DELETE_IDLE, (_ids(data),))
        yield Statement(_CLEAR_DATA, (_ids(data),))
        return len(states), len(lost), len(deleted)

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


def _valid(text: str) -> str | None:
    """Return `text`, or None if it is no JSON, which the history's column does not take."""
    return text if is_json(text) else None


def _differ(one: str, other: str) -> bool:
    """Say whether two texts of data differ by more than the order of keys or the way a number is written."""
    return one != other and not (is_json(one) and is_json(other) and json.loads(one) == json.loads(other))


def _for_keys(keys: list[str]) -> tuple[_Sql, str]:
    return (_LONE, keys[0]) if len(keys) == 1 else (_BATCH, _json(keys))


def _ids(rows: Rows) -> str:
    return _json([row[0] for row in rows])


def _state_expiry(row: tuple[Any, ...], scope: Scope) -> tuple[Any, ...]:
    _, key, bot_id, chat_id, user_id, state, data, at = row
    kept = _valid(data) if scope.history == "full" else None
    return (scope.alias, key, bot_id, chat_id, user_id, state, None, at, "expiry", "", kept, kept)


def _data_expiry(row: tuple[Any, ...], scope: Scope) -> tuple[Any, ...]:
    _, key, bot_id, chat_id, user_id, state, data, at = row
    return (scope.alias, key, bot_id, chat_id, user_id, state, state, at, "expiry", "", _valid(data), EMPTY)


dialect = SQLite()
