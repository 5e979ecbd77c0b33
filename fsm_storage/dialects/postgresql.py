"""PostgreSQL: each round trip counts. One statement locks, patches, writes the history and commits a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from fsm_storage.dialects import (
    LOCKED,
    Plan,
    Read,
    ReadReply,
    Scope,
    Statement,
    Write,
    WriteReply,
    Written,
)
from fsm_storage.exceptions import CorruptData, VersionConflict
from fsm_storage.patches import EMPTY, KEEP, Patch

_READ_STATES = """
SELECT key, CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END
FROM fsm_storage_record WHERE alias = %s AND key = """
_READ_DATA = """
SELECT key, CASE WHEN data_expires_at <= statement_timestamp() THEN '{}' ELSE data::text END
FROM fsm_storage_record WHERE alias = %s AND key = """
# A single key by itself, not as an array of one: half the time.
_ONE, _ANY = "%s", "ANY(%s::text[])"

# The columns of a batch: name, type, and what a write has there.
_COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("key", "text", lambda w: w.key),
    ("bot_id", "bigint", lambda w: w.parts.bot_id),
    ("chat_id", "bigint", lambda w: w.parts.chat_id),
    ("user_id", "bigint", lambda w: w.parts.user_id),
    ("thread_id", "bigint", lambda w: w.parts.thread_id),
    ("business_connection_id", "text", lambda w: w.parts.business_connection_id),
    ("destiny", "text", lambda w: w.parts.destiny),
    ("sets_state", "boolean", lambda w: w.patch.state is not KEEP),
    ("state", "text", lambda w: None if w.patch.state is KEEP else w.patch.state),
    ("state_ttl", "float8", lambda w: w.state_ttl.seconds),
    ("keeps_state_expiry", "boolean", lambda w: w.state_ttl.keep),
    ("renews_state", "boolean", lambda w: w.state_ttl.renew),
    ("base", "text", lambda w: None if w.patch.data is KEEP else exact(w.patch.data)),
    ("over", "text", lambda w: w.over),
    ("data_ttl", "float8", lambda w: w.data_ttl.seconds),
    ("keeps_data_expiry", "boolean", lambda w: w.data_ttl.keep),
    ("renews_data", "boolean", lambda w: w.data_ttl.renew),
    ("if_version", "bigint", lambda w: w.if_version),
)
_KEY_COLUMNS = "key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny"

# `old` locks the rows in the order of their keys; whoever locks in one order cannot deadlock.
# A row that another process creates meanwhile is met by DO NOTHING, which neither waits for a lock
# nor overwrites: the write is answered with LOCKED and tried again on the row that is there then.
# Data that a write leaves alone is not passed through, so that large values stay in TOAST.
_WRITE = """
WITH input AS (
    SELECT {names} FROM unnest({arrays}) AS i({names})
), old AS (
    SELECT id, key, version, state, data, state_expires_at, data_expires_at,
        CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END AS live_state,
        CASE WHEN data_expires_at <= statement_timestamp() THEN '{{}}' ELSE data END AS live_data
    FROM fsm_storage_record WHERE alias = %(alias)s AND key = ANY(%(key)s::text[])
    ORDER BY key FOR UPDATE {skip}
), changed AS (
    SELECT i.*, o.id, o.version, o.live_state, o.live_data, o.state AS raw_state,
        o.state_expires_at, o.data_expires_at,
        i.sets_state OR i.renews_state AS touches_state,
        i.base IS NOT NULL OR i.over IS NOT NULL OR i.renews_data AS touches_data,
        CASE WHEN i.sets_state THEN i.state WHEN i.renews_state THEN o.live_state ELSE o.state END AS new_state,
        CASE
            WHEN i.base IS NOT NULL AND i.over IS NOT NULL THEN i.base::jsonb || i.over::jsonb
            WHEN i.base IS NOT NULL THEN i.base::jsonb
            WHEN jsonb_typeof(o.live_data) <> 'object' AND i.over IS NOT NULL THEN NULL
            WHEN i.over IS NOT NULL THEN coalesce(o.live_data, '{{}}') || i.over::jsonb
            WHEN i.renews_data THEN coalesce(o.live_data, '{{}}')
            ELSE coalesce(o.data, '{{}}')
        END AS new_data,
        coalesce(i.if_version IS DISTINCT FROM o.version AND i.if_version IS NOT NULL, false) AS is_stale
    FROM input i LEFT JOIN old o ON o.key = i.key
), new AS (
    SELECT *,
        new_data IS NULL AS is_corrupt,
        id IS NULL AND new_state IS NULL AND new_data = '{{}}' AS is_nothing,
        CASE
            WHEN NOT touches_state THEN state_expires_at
            WHEN new_state IS NULL THEN NULL
            WHEN keeps_state_expiry AND live_state IS NOT NULL THEN state_expires_at
            ELSE statement_timestamp() + state_ttl * interval '1 second'
        END AS new_state_expires_at,
        CASE
            WHEN new_data = '{{}}' THEN CASE WHEN new_state IS NULL THEN statement_timestamp() END
            WHEN NOT touches_data THEN data_expires_at
            WHEN keeps_data_expiry AND live_data <> '{{}}' THEN data_expires_at
            ELSE statement_timestamp() + data_ttl * interval '1 second'
        END AS new_data_expires_at
    FROM changed
), updated AS (
    UPDATE fsm_storage_record r SET
        state = n.new_state, state_expires_at = n.new_state_expires_at,
        data = CASE WHEN n.touches_data THEN n.new_data ELSE r.data END,
        data_expires_at = n.new_data_expires_at,
        version = r.version + 1, updated_at = statement_timestamp()
    FROM new n WHERE r.id = n.id AND NOT n.is_stale AND NOT n.is_corrupt
    RETURNING r.key, r.version
), inserted AS (
    INSERT INTO fsm_storage_record (alias, {key_columns}, state, data, state_expires_at, data_expires_at,
        version, created_at, updated_at)
    SELECT %(alias)s, {key_columns}, new_state, new_data, new_state_expires_at, new_data_expires_at,
        (extract(epoch FROM statement_timestamp()) * 1000000)::bigint, statement_timestamp(), statement_timestamp()
    FROM new WHERE id IS NULL AND NOT is_nothing AND NOT is_stale
    ORDER BY key
    ON CONFLICT DO NOTHING
    RETURNING key, version
), done AS (
    SELECT key, version FROM updated UNION ALL SELECT key, version FROM inserted
){history}
SELECT n.key, n.version, d.version, n.is_stale, n.is_corrupt, n.is_nothing,
    CASE WHEN n.over IS NOT NULL THEN n.new_data::text END
FROM new n LEFT JOIN done d ON d.key = n.key
"""
_HISTORY = """, history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, n.key, n.bot_id, n.chat_id, n.user_id, t.from_state, t.to_state, t.at,
        t.source, t.actor, t.data_before, t.data_after
    FROM new n JOIN done d ON d.key = n.key CROSS JOIN LATERAL (
        SELECT 0 AS place, n.raw_state AS from_state, NULL AS to_state, n.state_expires_at AS at,
            'expiry' AS source, '' AS actor, {unchanged} AS data_before, {unchanged} AS data_after
        WHERE n.touches_state AND n.raw_state IS NOT NULL AND n.live_state IS NULL
        UNION ALL
        SELECT 1, n.live_state, CASE WHEN n.touches_state THEN n.new_state ELSE n.live_state END,
            statement_timestamp(), %(source)s, %(actor)s, {before}, {after}
        WHERE (n.touches_state AND n.live_state IS DISTINCT FROM n.new_state){or_data}
    ) t
    ORDER BY n.key, t.place
)"""
_BEFORE = "coalesce(n.live_data, '{}')"
_AFTER = f"CASE WHEN n.touches_data THEN n.new_data ELSE {_BEFORE} END"


def _write_sql(history: str, *, wait: bool) -> str:
    names = ", ".join(name for name, _, _ in _COLUMNS)
    arrays = ", ".join(f"%({name})s::{type_}[]" for name, type_, _ in _COLUMNS)
    note = ""
    if history == "states":
        note = _HISTORY.format(unchanged="NULL::jsonb", before="NULL::jsonb", after="NULL::jsonb", or_data="")
    elif history == "full":
        or_data = f" OR (n.touches_data AND {_BEFORE} <> n.new_data)"
        note = _HISTORY.format(unchanged=_BEFORE, before=_BEFORE, after=_AFTER, or_data=or_data)
    return _WRITE.format(
        names=names,
        arrays=arrays,
        key_columns=_KEY_COLUMNS,
        skip="" if wait else "SKIP LOCKED",
        history=note,
    )


_WRITES = {
    (history, wait): _write_sql(history, wait=wait)
    for history in ("off", "states", "full")
    for wait in (False, True)
}

# A lone write needs no lock before its upsert, which is half of the cost. It waits for a locked row
# for a tenth of a second at most: the worker thread must stay free for everybody else.
_LONE_TIMEOUT_MS = 100
_LONE = f"""
INSERT INTO fsm_storage_record AS r (alias, {_KEY_COLUMNS}, state, data, state_expires_at, data_expires_at,
    version, created_at, updated_at)
SELECT %(alias)s, %(key)s, %(bot_id)s, %(chat_id)s, %(user_id)s, %(thread_id)s::bigint,
    %(business_connection_id)s, %(destiny)s, {{insert}},
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint, statement_timestamp(), statement_timestamp()
FROM set_config('lock_timeout', '{_LONE_TIMEOUT_MS}', true)
ON CONFLICT (alias, key) DO UPDATE SET {{update}},
    version = r.version + 1, updated_at = excluded.updated_at
"""
_LONE_STATE = _LONE.format(
    insert="%(state)s, '{}'::jsonb, statement_timestamp() + %(ttl)s::float8 * interval '1 second', NULL",
    update="""state = excluded.state, state_expires_at = excluded.state_expires_at,
    data_expires_at = CASE WHEN r.data = '{}' THEN NULL ELSE r.data_expires_at END""",
)
_LONE_REPLACE = _LONE.format(
    insert="NULL, %(data)s::jsonb, NULL, statement_timestamp() + %(ttl)s::float8 * interval '1 second'",
    update="data = excluded.data, data_expires_at = excluded.data_expires_at",
)
_LONE_MERGE = (
    _LONE.format(
        insert="NULL, %(data)s::jsonb, NULL, statement_timestamp() + %(ttl)s::float8 * interval '1 second'",
        update="""
    data = CASE WHEN r.data_expires_at <= statement_timestamp() THEN '{}' ELSE r.data END || excluded.data,
    data_expires_at = excluded.data_expires_at""",
    )
    + "WHERE jsonb_typeof(r.data) = 'object'"
)
_LONE_RETURNING = "RETURNING r.version"
_LONE_MERGE_RETURNING = "RETURNING r.version, r.data::text"
_LONE_STATE_NOTED = f"""
WITH old AS MATERIALIZED (
    SELECT version, state, state_expires_at,
        CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END AS live_state
    FROM fsm_storage_record WHERE alias = %(alias)s AND key = %(key)s
), done AS (
    {_LONE_STATE} WHERE r.version = (SELECT version FROM old)
    RETURNING r.version
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source, actor)
    SELECT %(alias)s, %(key)s, %(bot_id)s, %(chat_id)s, %(user_id)s, t.from_state, t.to_state, t.at, t.source, t.actor
    FROM done LEFT JOIN old o ON true CROSS JOIN LATERAL (
        SELECT o.state AS from_state, NULL AS to_state, o.state_expires_at AS at, 'expiry' AS source, '' AS actor
        WHERE o.state IS NOT NULL AND o.live_state IS NULL
        UNION ALL
        SELECT o.live_state, %(state)s::text, statement_timestamp(), %(source)s::text, %(actor)s::text
        WHERE o.live_state IS DISTINCT FROM %(state)s::text
    ) t
)
SELECT version FROM done
"""

_SWEEP_STATES = """
WITH due AS (
    SELECT id, key, bot_id, chat_id, user_id, state, data, state_expires_at
    FROM fsm_storage_record WHERE state_expires_at <= statement_timestamp() AND alias = %(alias)s
    ORDER BY state_expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), cleared AS (
    UPDATE fsm_storage_record r SET state = NULL, state_expires_at = NULL,
        data_expires_at = CASE WHEN r.data = '{{}}' THEN statement_timestamp() ELSE r.data_expires_at END,
        version = r.version + 1, updated_at = statement_timestamp()
    FROM due WHERE r.id = due.id
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, key, bot_id, chat_id, user_id, state, NULL, state_expires_at, 'expiry', '', {data}, {data}
    FROM due WHERE %(noted)s
)
SELECT count(*) FROM due
"""
_SWEEP_DATA = """
WITH due AS (
    SELECT id, key, bot_id, chat_id, user_id, state, data, data_expires_at
    FROM fsm_storage_record WHERE data_expires_at <= statement_timestamp() AND alias = %(alias)s
    ORDER BY data_expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM fsm_storage_record r USING due WHERE r.id = due.id AND r.state IS NULL RETURNING r.id
), cleared AS (
    UPDATE fsm_storage_record r SET data = '{}', data_expires_at = NULL,
        version = r.version + 1, updated_at = statement_timestamp()
    FROM due WHERE r.id = due.id AND r.state IS NOT NULL
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, key, bot_id, chat_id, user_id, state, state, data_expires_at, 'expiry', '', data, '{}'
    FROM due WHERE %(noted)s AND data <> '{}'
)
SELECT count(*) FILTER (WHERE data <> '{}'), (SELECT count(*) FROM deleted) FROM due
"""

# 40001 serialization failure, 40P01 deadlock, 55P03 lock not available, 57P0x the server is going
# down or coming up, 53300 too many connections, 08xxx the connection; 25006 after a failover.
# 0A000 is a prepared plan that a migration has overtaken, 26000 and 42P05 are a pooler that gives
# each transaction another connection, which does not have what was prepared, or has it already.
_TRANSIENT = re.compile(r"40001|40P01|55P03|57P0[1-5]|53300|08...|25006|0A000|26000|42P05")

_STRING_OR_EXPONENT = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?[eE]\+?\d{1,3}(?!\d)')
_HAS_EXPONENT = re.compile(r"\d[eE]\+?\d")


def exact(text: str) -> str:
    """Write out the exponents of large floats, with a fraction.

    jsonb keeps decimal numbers, so 1e+23 would come back as the integer 10**23, which is not the
    float 1e+23. With a fraction it comes back as a float, and reads as the same one.
    """
    if not _HAS_EXPONENT.search(text):
        return text
    return _STRING_OR_EXPONENT.sub(_without_exponent, text)


def _without_exponent(match: re.Match[str]) -> str:
    text = match[0]
    if text.startswith('"'):
        return text
    plain = format(Decimal(text), "f")
    return plain if "." in plain else f"{plain}.0"


class _Batched(NamedTuple):
    """A write whose merges were made one."""

    key: str
    parts: Any
    patch: Patch
    state_ttl: Any
    data_ttl: Any
    if_version: int | None
    over: str | None


class PostgreSQL:
    """See `Dialect`."""

    reads_apart = True
    write_begin = None
    binds_on_server = True
    prepares = True

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        found: dict[bool, dict[str, Any]] = {}
        for data in (False, True):
            keys = [read.key for read in reads if read.data is data]
            if keys:
                sql = _READ_DATA if data else _READ_STATES
                lone = len(keys) == 1
                rows = yield Statement(
                    sql + (_ONE if lone else _ANY), (scope.alias, keys[0] if lone else keys)
                )
                found[data] = dict(rows)
        return [found[read.data].get(read.key, EMPTY if read.data else None) for read in reads]

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, lone: bool = False
    ) -> Plan[list[WriteReply]]:
        short = _lone(writes[0], scope) if lone else None
        if short is not None:
            rows = yield short
            if rows:  # else the row is not what the short way is for
                return [Written(*rows[0])]
        batch = [_Batched(*write, _over(write.patch, scope)) for write in writes]
        params: dict[str, Any] = {name: [get(write) for write in batch] for name, _, get in _COLUMNS}
        params.update(alias=scope.alias, source=scope.cause.source, actor=scope.cause.actor)
        rows = yield Statement(_WRITES[scope.history, wait], params)
        by_key = {row[0]: row for row in rows}
        return [_reply(write, by_key[write.key]) for write in writes]

    def sweep(self, scope: Scope, limit: int) -> Plan[tuple[int, int, int]]:
        full = scope.history == "full"
        params = {"alias": scope.alias, "limit": limit, "noted": scope.history != "off"}
        sql = _SWEEP_STATES.format(data="data" if full else "NULL::jsonb")
        states = yield Statement(sql, params)
        data = yield Statement(_SWEEP_DATA, {**params, "noted": full})
        return states[0][0], *data[0]

    def session(self, timeout: float) -> Sequence[str]:
        return ()

    def lock_limits(self, timeout: float) -> Sequence[str]:
        return (f"SET LOCAL lock_timeout = {int(timeout * 1000)}",)

    def is_lock_timeout(self, code: str | None, message: str) -> bool:
        return code == "55P03"

    def has_stale_plan(self, code: str | None) -> bool:
        return code == "0A000"

    def is_pooled(self, code: str | None) -> bool:
        return code in {"26000", "42P05"}

    def is_transient(self, code: str | None, message: str) -> bool:
        return code is None or bool(_TRANSIENT.fullmatch(code))

    def is_missing_table(self, code: str | None, message: str) -> bool:
        return code in {"42P01", "42703"}


def _over(patch: Patch, scope: Scope) -> str | None:
    if not patch.merge:
        return None
    return exact(patch.merge[0] if len(patch.merge) == 1 else scope.codec.fold("", EMPTY, patch.merge))


def _lone(write: Write, scope: Scope) -> Statement | None:
    """Return the one upsert that does `write`, if it is plain enough for one."""
    key, parts, patch, state_ttl, data_ttl, if_version = write
    if if_version is not None or state_ttl.renew or data_ttl.renew or state_ttl.keep or data_ttl.keep:
        return None
    ttl, data = (state_ttl if patch.state is not KEEP else data_ttl).seconds, None
    if isinstance(patch.state, str) and not patch.touches_data and scope.history != "full":
        sql = _LONE_STATE_NOTED if scope.history == "states" else _LONE_STATE + _LONE_RETURNING
    elif patch.state is not KEEP or scope.history == "full":
        return None
    elif patch.data is not KEEP and patch.data != EMPTY and not patch.merge:
        sql, data = _LONE_REPLACE + _LONE_RETURNING, exact(patch.data)
    elif patch.data is KEEP and len(patch.merge) == 1 and patch.merge[0] != EMPTY:
        sql, data = _LONE_MERGE + _LONE_MERGE_RETURNING, exact(patch.merge[0])
    else:
        return None
    params = {
        **vars(parts), "alias": scope.alias, "key": key, "ttl": ttl, "state": patch.state, "data": data,
        "source": scope.cause.source, "actor": scope.cause.actor,
    }  # fmt: skip
    if patch.state is KEEP:
        del params["state"]
    return Statement(sql, params)


def _reply(write: Write, row: tuple[Any, ...]) -> WriteReply:
    _, found, version, is_stale, is_corrupt, is_nothing, data = row
    if version is not None:
        return Written(version, data)
    if is_stale:
        return VersionConflict(write.key, write.if_version or 0, found)
    if is_corrupt:
        return CorruptData(write.key, "no JSON object")
    if is_nothing:
        return Written(None, data)
    return LOCKED


dialect = PostgreSQL()
