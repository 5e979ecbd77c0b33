"""PostgreSQL's shorter way for a batch of plain writes: one upsert, at two thirds of the cost of locking first.

It waits for a locked row, for a moment; then it gives up, and the batch goes the other way, which leaves
locked rows out. With history "states" it needs PostgreSQL 18, which returns the old row.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import cache

from fsm_storage.dialects import Scope, Statement, Write
from fsm_storage.dialects.postgresql_sql import KEY_COLUMNS, LONE_STATE, MAY_MERGE
from fsm_storage.patches import EMPTY, KEEP

SETS_STATE, REPLACES, MERGES, MAKES = 1, 2, 4, 8
_FLAGS = 15

# What a write does travels in the lowest bits of the version that a new record gets, the microseconds of
# its birth: an upsert sees nothing of its source but the row to insert.
_HAS = "excluded.version & "
_STATE = f"CASE WHEN {_HAS}{SETS_STATE} > 0 THEN excluded.state ELSE r.state END"
_IS_GONE = "coalesce(r.data_expires_at <= statement_timestamp(), false)"
_STATE_UNTIL = "statement_timestamp() + %(state_ttl)s::float8 * interval '1 second'"
_DATA_UNTIL = "statement_timestamp() + %(data_ttl)s::float8 * interval '1 second'"

_UPSERT = f"""
INSERT INTO fsm_storage_record AS r (alias, {KEY_COLUMNS}, state, data, state_expires_at, data_expires_at,
    version, created_at, updated_at)
SELECT %(alias)s::text, i.key, %(bot_id)s::bigint, i.chat_id, i.user_id, %(thread_id)s::bigint,
    %(business_connection_id)s::text, %(destiny)s::text, i.state, i.data::jsonb,
    CASE WHEN i.state IS NOT NULL THEN {_STATE_UNTIL} END,
    CASE WHEN i.data <> '{{}}' THEN {_DATA_UNTIL} WHEN i.state IS NULL THEN statement_timestamp() END,
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint & ~{_FLAGS}::bigint | i.flags,
    statement_timestamp(), statement_timestamp()
FROM set_config('lock_timeout', '20', true), unnest(%(key)s::text[], %(chat_id)s::bigint[], %(user_id)s::bigint[],
    %(flags)s::bigint[], %(state)s::text[], %(data)s::text[]) AS i(key, chat_id, user_id, flags, state, data)
WHERE i.flags & {MAKES} > 0
    OR EXISTS (SELECT FROM fsm_storage_record e WHERE e.alias = %(alias)s::text AND e.key = i.key)
ORDER BY i.key
ON CONFLICT (alias, key) DO UPDATE SET
    state = {_STATE},
    state_expires_at = CASE WHEN {_HAS}{SETS_STATE} > 0 THEN excluded.state_expires_at ELSE r.state_expires_at END,
    data = CASE
        WHEN {_HAS}{REPLACES} > 0 THEN excluded.data
        WHEN {_HAS}{MERGES} > 0 THEN CASE WHEN {_IS_GONE} THEN '{{}}' ELSE r.data END || excluded.data
        ELSE r.data
    END,
    data_expires_at = CASE
        WHEN CASE
            WHEN {_HAS}{REPLACES} > 0 THEN excluded.data = '{{}}'
            WHEN {_HAS}{MERGES} > 0 THEN excluded.data = '{{}}' AND (r.data = '{{}}' OR {_IS_GONE})
            ELSE r.data = '{{}}'
        END THEN CASE WHEN ({_STATE}) IS NULL THEN statement_timestamp() END
        WHEN {_HAS}{REPLACES | MERGES} > 0 THEN {_DATA_UNTIL}
        ELSE r.data_expires_at
    END,
    version = r.version + 1, updated_at = excluded.updated_at
WHERE {_HAS}{MERGES} = 0 OR {_IS_GONE} OR ({MAY_MERGE})
"""
_MERGED = "CASE WHEN r.key = ANY(%(merged)s::text[]) THEN r.data::text END"
_RETURNING = f"RETURNING r.key, r.version, {_MERGED}"
_STATES = """r.alias, r.bot_id, r.chat_id, r.user_id,
        old.state AS old_state, old.state_expires_at AS old_until, new.state_expires_at AS new_until,
        CASE WHEN old.state_expires_at <= statement_timestamp() THEN NULL ELSE old.state END AS old_live,
        CASE WHEN new.state_expires_at <= statement_timestamp() THEN NULL ELSE new.state END AS new_live"""
# A state that was left alone keeps its expiry, so an expired one that has another expiry now was overwritten.
_HISTORY = """history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source, actor)
    SELECT d.alias, d.key, d.bot_id, d.chat_id, d.user_id, t.from_state, t.to_state, t.at, t.source, t.actor
    FROM done d CROSS JOIN LATERAL (
        SELECT 0 AS place, d.old_state AS from_state, NULL AS to_state, d.old_until AS at,
            'expiry' AS source, '' AS actor
        WHERE d.old_state IS NOT NULL AND d.old_live IS NULL AND d.old_until IS DISTINCT FROM d.new_until
        UNION ALL
        SELECT 1, d.old_live, d.new_live, statement_timestamp(), %(source)s::text, %(actor)s::text
        WHERE d.old_live IS DISTINCT FROM d.new_live
    ) t
    ORDER BY d.key, t.place
)"""
_NOTED = f"""
WITH done AS ({_UPSERT}
    RETURNING r.key, r.version, {_MERGED} AS merged, {_STATES}
), {_HISTORY}
SELECT key, version, merged FROM done
"""
LONE_STATE_NOTED = f"""
WITH done AS ({LONE_STATE}
    RETURNING r.key, r.version, {_STATES}
), {_HISTORY}
SELECT version FROM done
"""


def is_plain(write: Write) -> bool:
    """Say whether an upsert can do `write`."""
    state_ttl, data_ttl = write.state_ttl, write.data_ttl
    return (
        write.if_version is None
        and write.fence is None
        and write.as_of is None
        and len(write.patch.merge) <= 1
        and not (write.patch.merge and write.patch.data is not KEEP)
        and not (state_ttl.renew or data_ttl.renew or state_ttl.keep or data_ttl.keep)
    )


def flags(write: Write) -> int:
    """Return what `write` does, as bits."""
    state, data, merge = write.patch
    found = SETS_STATE if state is not KEEP else 0
    if data is not KEEP:
        found |= REPLACES
    if merge:
        found |= MERGES
    makes_state = state is not KEEP and state is not None
    makes_data = (data is not KEEP and data != EMPTY) or (merge and merge[0] != EMPTY)
    return found | MAKES if makes_state or makes_data else found


def makes_nothing(write: Write, done: Container[str]) -> bool:
    """Say whether `write` was left out because there is no record, and it would have made an empty one."""
    return write.key not in done and not flags(write) & (MAKES | MERGES)


@cache
def _text(history: str) -> str:
    return _NOTED if history == "states" else _UPSERT + _RETURNING


def upsert(writes: Sequence[Write], data: Sequence[str], scope: Scope) -> Statement:
    """Return the statement for plain writes that have all but their keys, chats and users in common.

    `data` are the texts to replace the data with, or to lay over it.
    """
    first, bits = writes[0], [flags(write) for write in writes]
    parts = first.parts
    params = {
        "alias": scope.alias, "source": scope.cause.source, "actor": scope.cause.actor,
        "bot_id": parts.bot_id, "thread_id": parts.thread_id,
        "business_connection_id": parts.business_connection_id, "destiny": parts.destiny,
        "state_ttl": first.state_ttl.seconds, "data_ttl": first.data_ttl.seconds,
        "key": [write.key for write in writes],
        "chat_id": [write.parts.chat_id for write in writes],
        "user_id": [write.parts.user_id for write in writes],
        "flags": bits,
        "state": [None if write.patch.state is KEEP else write.patch.state for write in writes],
        "data": list(data),
        "merged": [write.key for write, has in zip(writes, bits, strict=True) if has & MERGES],
    }  # fmt: skip
    return Statement(_text(scope.history), params)
