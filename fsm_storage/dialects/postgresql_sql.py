"""The texts of PostgreSQL's statements; `postgresql` says which is used when."""

from __future__ import annotations

from functools import cache

from fsm_storage.codec import MAX_DEPTH, MAX_LENGTH
from fsm_storage.dialects import TOGETHER

READ_STATES = """
SELECT key, CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END
FROM fsm_storage_record WHERE alias = %s AND key = """
READ_DATA = """
SELECT key, CASE WHEN data_expires_at <= statement_timestamp() THEN '{}' ELSE data::text END
FROM fsm_storage_record WHERE alias = %s AND key = """
# A single key by itself, not as an array of one: half the time.
ONE, ANY = "%s", "ANY(%s::text[])"

# The columns of a batch that differ from write to write: each an array.
VARYING = {
    "key": "text",
    "chat_id": "bigint",
    "user_id": "bigint",
    "sets_state": "boolean",
    "state": "text",
    "base": "text",
    "over": "text",
}
# Those that all writes of a batch nearly always have in common: then each is a single value, which
# saves a tenth of the time, here and in the server.
COMMON = {
    "bot_id": "bigint",
    "thread_id": "bigint",
    "business_connection_id": "text",
    "destiny": "text",
    "state_ttl": "float8",
    "keeps_state_expiry": "boolean",
    "renews_state": "boolean",
    "data_ttl": "float8",
    "keeps_data_expiry": "boolean",
    "renews_data": "boolean",
    "if_version": "bigint",
}
# What writes have that were made elsewhere before.
AS_OF = {
    "as_version": "bigint",
    "at": "float8",
    "seen_at": "float8",
    "state_until": "float8",
    "data_until": "float8",
    "leaves_trace": "boolean",
}
STEPS = {
    "step_key": "text",
    "step_state": "text",
    "step_version": "bigint",
    "step_at": "float8",
    "step_source": "text",
    "step_actor": "text",
}
KEY_COLUMNS = "key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny"

# Nothing is laid over what cannot be read afterwards: no object, or one that another program nested
# too deep. Five hundred levels take four kilobytes, if they are not compressed; others need no look.
READABLE = f"""
    jsonb_typeof({{data}}) = 'object' AND NOT (
        (pg_column_size({{data}}) > 3900 OR pg_column_compression({{data}}) IS NOT NULL)
        AND jsonb_path_exists({{data}}, '$.**{{{{{MAX_DEPTH + 1}}}}}')
    )
"""

# A text has at most eight characters for a byte of jsonb, so only what is large needs to be written out.
_MAY_BE_LONG = f"pg_column_size({{data}}) > {MAX_LENGTH // 8}"
# Nor may the result become longer than what may be written as a whole. Here there is a space after each comma
# and colon, which makes a text half as long again at the most.
_MAX_LENGTH = MAX_LENGTH * 3 // 2
MAY_MERGE = f"""
    CASE
        WHEN NOT ({READABLE.format(data="r.data")}) THEN false
        WHEN pg_column_size(r.data) + pg_column_size(excluded.data) < 1900 THEN true
        WHEN {_MAY_BE_LONG.format(data="(r.data || excluded.data)")}
            THEN length((r.data || excluded.data)::text) <= {_MAX_LENGTH}
        ELSE true
    END
"""

# `old` locks the rows in the order of their keys; whoever locks in one order cannot deadlock.
# A row that is locked is skipped, and then looks as if it were missing; NOT EXISTS keeps the insert
# away from it, which would wait. The write is answered with LOCKED and tried again later. The same
# goes for a row that another process creates meanwhile, but while that one's transaction is open
# even DO NOTHING waits, for a tenth of a second at the most. The worker thread must stay free.
# Data that a write leaves alone is not passed through, so that large values stay in TOAST.
_WRITE = """
WITH input AS (
    SELECT {names}{singles} FROM {limit}unnest({arrays}) AS i({names})
), old AS (
    SELECT id, key, version, state, data, state_expires_at, data_expires_at{live}
    FROM fsm_storage_record WHERE alias = %(alias)s AND key = ANY(%(key)s::text[])
    ORDER BY key FOR UPDATE {skip}
){fence}, changed AS (
    SELECT i.*, o.id, o.version, {live_state} AS live_state, {live_data} AS live_data, o.state AS raw_state,
        o.state_expires_at, o.data_expires_at,
        i.sets_state OR i.renews_state AS touches_state,
        i.base IS NOT NULL OR i.over IS NOT NULL OR i.renews_data AS touches_data,
        CASE WHEN i.sets_state THEN i.state WHEN i.renews_state THEN {live_state} ELSE o.state END AS new_state,
        CASE
            WHEN i.base IS NOT NULL AND i.over IS NOT NULL THEN i.base::jsonb || i.over::jsonb
            WHEN i.base IS NOT NULL THEN i.base::jsonb
            WHEN i.over IS NOT NULL AND NOT ({readable}) THEN NULL
            WHEN i.over IS NOT NULL THEN coalesce({live_data}, '{{}}') || i.over::jsonb
            WHEN i.renews_data THEN coalesce({live_data}, '{{}}')
            ELSE coalesce(o.data, '{{}}')
        END AS new_data,
        {stale} OR {is_lost} AS is_stale,
        {is_lost} AS is_lost
    FROM input i LEFT JOIN old o ON o.key = i.key
), new AS (
    SELECT *,
        new_data IS NULL AS is_corrupt,
        CASE WHEN over IS NOT NULL AND id IS NOT NULL AND {may_be_long} THEN
            nullif(greatest(length(new_data::text), {max_length}), {max_length})
        END AS excess,
        id IS NULL AND new_state IS NULL AND new_data = '{{}}'{untraced} AS is_nothing,
        CASE
            WHEN NOT touches_state THEN state_expires_at
            WHEN new_state IS NULL THEN NULL
            WHEN keeps_state_expiry AND live_state IS NOT NULL THEN state_expires_at
            ELSE {state_until}
        END AS new_state_expires_at,
        CASE
            WHEN new_data = '{{}}' THEN CASE WHEN new_state IS NULL THEN {now} END
            WHEN NOT touches_data THEN data_expires_at
            WHEN keeps_data_expiry AND live_data <> '{{}}' THEN data_expires_at
            ELSE {data_until}
        END AS new_data_expires_at
    FROM changed
), updated AS (
    UPDATE fsm_storage_record r SET
        state = n.new_state, state_expires_at = n.new_state_expires_at,
        data = CASE WHEN n.touches_data THEN n.new_data ELSE r.data END,
        data_expires_at = n.new_data_expires_at,
        version = {next_version}, updated_at = {at}
    FROM new n WHERE r.id = n.id AND NOT n.is_stale AND NOT n.is_corrupt AND n.excess IS NULL
    RETURNING r.key, r.version
), inserted AS (
    INSERT INTO fsm_storage_record (alias, {key_columns}, state, data, state_expires_at, data_expires_at,
        version, created_at, updated_at)
    SELECT %(alias)s, {key_columns}, new_state, new_data, new_state_expires_at, new_data_expires_at,
        {first_version}, {now}, {now}
    FROM new WHERE id IS NULL AND NOT is_nothing AND NOT is_stale{not_skipped}
    ORDER BY key
    ON CONFLICT DO NOTHING
    RETURNING key, version
), done AS (
    SELECT key, version FROM updated UNION ALL SELECT key, version FROM inserted
){history}
SELECT n.key, n.version, d.version, n.is_lost, n.is_stale, n.is_corrupt, n.excess, n.is_nothing,
    CASE WHEN n.over IS NOT NULL AND n.excess IS NULL THEN n.new_data::text END{told}
FROM new n LEFT JOIN done d ON d.key = n.key{old_too}
"""
_LIVE = """,
        CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END AS live_state,
        CASE WHEN data_expires_at <= statement_timestamp() THEN '{}' ELSE data END AS live_data"""
# What differs for writes that are made now, and for those that were made elsewhere.
_NOW = {
    "live": _LIVE,
    "live_state": "o.live_state",
    "live_data": "o.live_data",
    "now": "statement_timestamp()",
    "at": "statement_timestamp()",
    "state_until": "statement_timestamp() + state_ttl * interval '1 second'",
    "data_until": "statement_timestamp() + data_ttl * interval '1 second'",
    "untraced": "",
    "stale": "coalesce(i.if_version <> coalesce(o.version, 0), false)",
    "next_version": "r.version + 1",
    "first_version": "(extract(epoch FROM statement_timestamp()) * 1000000)::bigint",
}
_THEN = {
    "live": "",
    "live_state": "CASE WHEN o.state_expires_at <= to_timestamp(i.seen_at) THEN NULL ELSE o.state END",
    "live_data": "CASE WHEN o.data_expires_at <= to_timestamp(i.at) THEN '{}' ELSE o.data END",
    "now": "to_timestamp(at)",
    "at": "to_timestamp(n.at)",
    "state_until": "to_timestamp(state_until)",
    "data_until": "to_timestamp(data_until)",
    "untraced": " AND NOT leaves_trace",
    "stale": "coalesce(i.as_version <= o.version, false)",
    "next_version": "n.as_version",
    "first_version": "as_version",
}
# What was there before, for those who listen to the signals.
_DATA_EXPIRED = (
    "n.touches_data AND coalesce(o.data_expires_at <= statement_timestamp() AND o.data <> '{}', false)"
)
_TOLD = f""",
    n.live_state, CASE WHEN n.touches_state THEN n.new_state ELSE n.live_state END,
    n.touches_data AND coalesce(n.live_data, '{{}}') <> n.new_data,
    n.raw_state, n.touches_state AND n.raw_state IS NOT NULL AND n.live_state IS NULL, n.state_expires_at,
    {_DATA_EXPIRED}, n.data_expires_at
"""
_HISTORY = """, history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, n.key, n.bot_id, n.chat_id, n.user_id, t.from_state, t.to_state, t.at,
        t.source, t.actor, t.data_before, t.data_after
    FROM new n JOIN done d ON d.key = n.key{old_too} CROSS JOIN LATERAL (
        SELECT 0 AS place, n.raw_state AS from_state, NULL AS to_state, n.state_expires_at AS at,
            'expiry' AS source, '' AS actor, {unchanged} AS data_before, {unchanged} AS data_after
        WHERE n.touches_state AND n.raw_state IS NOT NULL AND n.live_state IS NULL
        {data_expired}UNION ALL
        SELECT 2, n.live_state, CASE WHEN n.touches_state THEN n.new_state ELSE n.live_state END,
            {at}, %(source)s, %(actor)s, {before}, {after}
        WHERE (n.touches_state AND n.live_state IS DISTINCT FROM n.new_state){or_data}
    ) t
    ORDER BY n.key, t.place
)"""
# The states that writes went through elsewhere, but for those that the record has seen.
_STEPS = f""", history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source, actor)
    SELECT %(alias)s, key, bot_id, chat_id, user_id, from_state, to_state, at, source, actor
    FROM (
        SELECT n.key, n.bot_id, n.chat_id, n.user_id, 0 AS place, n.raw_state AS from_state, NULL AS to_state,
            n.state_expires_at AS at, 'expiry' AS source, '' AS actor
        FROM new n JOIN done d ON d.key = n.key
        WHERE n.touches_state AND n.raw_state IS NOT NULL AND n.live_state IS NULL
        UNION ALL
        SELECT n.key, n.bot_id, n.chat_id, n.user_id, s.place,
            lag(s.state, 1, n.live_state) OVER (PARTITION BY s.key ORDER BY s.place), s.state,
            to_timestamp(s.at), s.source, s.actor
        FROM unnest({", ".join(f"%({name})s::{type_}[]" for name, type_ in STEPS.items())})
            WITH ORDINALITY AS s(key, state, version, at, source, actor, place)
        JOIN new n ON n.key = s.key JOIN done d ON d.key = n.key
        WHERE s.version > coalesce(n.version, 0)
    ) t
    WHERE from_state IS DISTINCT FROM to_state
    ORDER BY key, place
)"""
_NOTE_DATA_EXPIRED = f"""UNION ALL
        SELECT 1, n.live_state, n.live_state, n.data_expires_at, 'expiry', '', o.data, '{{}}' WHERE {_DATA_EXPIRED}
        """
_OLD_TOO = " LEFT JOIN old o ON o.key = n.key"
_BEFORE = "coalesce(n.live_data, '{}')"
_AFTER = f"CASE WHEN n.touches_data THEN n.new_data ELSE {_BEFORE} END"


# Who takes a lease over waits for the lock, so it begins after all that was written under the lease.
FENCE = {"fence_key": "text", "fence_token": "bigint"}
_FENCE = """, fence AS (
    SELECT key, token FROM fsm_storage_lease WHERE alias = %(alias)s AND key = ANY(%(fence_key)s::text[])
    ORDER BY key FOR SHARE
)"""
_IS_LOST = """(i.fence_key IS NOT NULL
            AND NOT EXISTS (SELECT FROM fence f WHERE f.key = i.fence_key AND f.token = i.fence_token))"""
_LONE_FENCE = """, (
    SELECT FROM fsm_storage_lease
    WHERE alias = %(alias)s AND key = %(fence_key)s AND token = %(fence_token)s::bigint FOR SHARE
) fence"""

_LOCK_LIMIT = "set_config('lock_timeout', '100', true)"
_NOT_SKIPPED = """
        AND NOT EXISTS (SELECT FROM fsm_storage_record e WHERE e.alias = %(alias)s AND e.key = new.key)"""


@cache
def write(
    history: str, *, wait: bool, tells: bool, alike: bool, fenced: bool, as_of: bool, steps: bool = False
) -> str:
    """Return the statement for a batch.

    `wait`: for locked rows. `tells`: what was there before. `alike`: the columns of `COMMON` are single values.
    `fenced`, `as_of`, `steps`: some write has a fence; all were made elsewhere; some went through states.
    """
    columns = VARYING if alike else VARYING | COMMON
    columns = columns | (FENCE if fenced else {}) | (AS_OF if as_of else {})
    when = _THEN if as_of else _NOW
    names = ", ".join(columns)
    arrays = ", ".join(f"%({name})s::{type_}[]" for name, type_ in columns.items())
    singles = "".join(f", %({name})s::{type_} AS {name}" for name, type_ in COMMON.items()) if alike else ""
    note = ""
    if history == "states" and as_of:
        note = _STEPS if steps else ""
    elif history == "states":
        null = "NULL::jsonb"
        note = _HISTORY.format(
            unchanged=null, before=null, after=null, or_data="", data_expired="", old_too="", at=when["at"]
        )
    elif history == "full":
        or_data = f" OR (n.touches_data AND {_BEFORE} <> n.new_data)"
        note = _HISTORY.format(
            unchanged=_BEFORE, before=_BEFORE, after=_AFTER, or_data=or_data,
            data_expired=_NOTE_DATA_EXPIRED.replace("statement_timestamp()", when["at"]), old_too=_OLD_TOO,
            at=when["at"],
        )  # fmt: skip
    return _WRITE.format(
        **when,
        names=names,
        arrays=arrays,
        singles=singles,
        key_columns=KEY_COLUMNS,
        readable=READABLE.format(data=when["live_data"]),
        may_be_long=_MAY_BE_LONG.format(data="new_data"),
        max_length=_MAX_LENGTH,
        skip="" if wait else "SKIP LOCKED",
        limit="" if wait else f"{_LOCK_LIMIT}, ",
        not_skipped="" if wait else _NOT_SKIPPED,
        history=note,
        fence=_FENCE if fenced else "",
        is_lost=_IS_LOST if fenced else "false",
        told=_TOLD.replace("statement_timestamp()", when["at"]) if tells else "",
        old_too=_OLD_TOO if tells else "",
    )


def fenced(lone: str) -> str:
    """Return the text of a lone write that does nothing once the lease of its fence is another's."""
    return lone.replace(_LOCK_LIMIT, _LOCK_LIMIT + _LONE_FENCE)


# A lone write needs no lock before its upsert, which is half of the cost. It waits for a locked row
# for a tenth of a second at most: the worker thread must stay free for everybody else.
_LONE = f"""
INSERT INTO fsm_storage_record AS r (alias, {KEY_COLUMNS}, state, data, state_expires_at, data_expires_at,
    version, created_at, updated_at)
SELECT %(alias)s, %(key)s, %(bot_id)s, %(chat_id)s, %(user_id)s, %(thread_id)s::bigint,
    %(business_connection_id)s, %(destiny)s, {{insert}},
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint, statement_timestamp(), statement_timestamp()
FROM {_LOCK_LIMIT}
ON CONFLICT (alias, key) DO UPDATE SET {{update}},
    version = r.version + 1, updated_at = excluded.updated_at
"""
LONE_STATE = _LONE.format(
    insert="%(state)s, '{}'::jsonb, statement_timestamp() + %(ttl)s::float8 * interval '1 second', NULL",
    update="""state = excluded.state, state_expires_at = excluded.state_expires_at,
    data_expires_at = CASE WHEN r.data = '{}' THEN NULL ELSE r.data_expires_at END""",
)
LONE_REPLACE = _LONE.format(
    insert="NULL, %(data)s::jsonb, NULL, statement_timestamp() + %(ttl)s::float8 * interval '1 second'",
    update="data = excluded.data, data_expires_at = excluded.data_expires_at",
)
LONE_MERGE = (
    _LONE.format(
        insert="NULL, %(data)s::jsonb, NULL, statement_timestamp() + %(ttl)s::float8 * interval '1 second'",
        update="""
    data = CASE WHEN r.data_expires_at <= statement_timestamp() THEN '{}' ELSE r.data END || excluded.data,
    data_expires_at = excluded.data_expires_at""",
    )
    + "WHERE "
    + MAY_MERGE
)
LONE_RETURNING = "RETURNING r.version"
LONE_MERGE_RETURNING = "RETURNING r.version, r.data::text"
LONE_STATE_NOTED = f"""
WITH old AS MATERIALIZED (
    SELECT version, state, state_expires_at,
        CASE WHEN state_expires_at <= statement_timestamp() THEN NULL ELSE state END AS live_state
    FROM fsm_storage_record WHERE alias = %(alias)s AND key = %(key)s
), done AS (
    {LONE_STATE} WHERE r.version = (SELECT version FROM old)
    RETURNING r.version, r.xmax = 0 AS is_new
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source, actor)
    SELECT %(alias)s, %(key)s, %(bot_id)s, %(chat_id)s, %(user_id)s, t.from_state, t.to_state, t.at, t.source, t.actor
    FROM done LEFT JOIN old o ON NOT done.is_new CROSS JOIN LATERAL (
        SELECT o.state AS from_state, NULL AS to_state, o.state_expires_at AS at, 'expiry' AS source, '' AS actor
        WHERE o.state IS NOT NULL AND o.live_state IS NULL
        UNION ALL
        SELECT o.live_state, %(state)s::text, statement_timestamp(), %(source)s::text, %(actor)s::text
        WHERE o.live_state IS DISTINCT FROM %(state)s::text
    ) t
)
SELECT version FROM done
"""

_EXPIRED = """
    SELECT id, key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny, version, state, data,
        {part}_expires_at FROM fsm_storage_record
    WHERE {part}_expires_at <= coalesce(to_timestamp(%(until)s::float8), statement_timestamp())
        AND alias = %(alias)s AND version < %(below)s {unless}
    ORDER BY {part}_expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
"""
# NULL stands for every state.
_IS_SPARED = "(%(spared_states)s::text[] IS NULL OR coalesce(state = ANY(%(spared_states)s::text[]), false))"
_EXPIRED_STATES = _EXPIRED.format(part="state", unless=f"AND NOT {_IS_SPARED}")
_EXPIRED_DATA = _EXPIRED.format(
    part="data",
    unless=f"""AND NOT (%(spares_data)s AND data <> '{{}}') AND NOT (
        coalesce(state_expires_at <= data_expires_at + interval '{TOGETHER} seconds', false) AND {_IS_SPARED})""",
)
_DUE = "key, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny, version, state"

SWEEP_STATES = f"""
WITH due AS ({_EXPIRED_STATES}), cleared AS (
    UPDATE fsm_storage_record r SET state = NULL, state_expires_at = NULL,
        data_expires_at = CASE WHEN r.data = '{{{{}}}}' THEN statement_timestamp() ELSE r.data_expires_at END,
        version = r.version + 1, updated_at = statement_timestamp()
    FROM due WHERE r.id = due.id
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, key, bot_id, chat_id, user_id, state, NULL, state_expires_at, 'expiry', '', {{data}}, {{data}}
    FROM due WHERE %(noted)s
)
SELECT {_DUE}, state_expires_at, false, false FROM due
"""
SWEEP_DATA = f"""
WITH due AS ({_EXPIRED_DATA}), deleted AS (
    DELETE FROM fsm_storage_record r USING due WHERE r.id = due.id AND r.state IS NULL RETURNING r.id
), cleared AS (
    UPDATE fsm_storage_record r SET data = '{{}}', data_expires_at = NULL,
        version = r.version + 1, updated_at = statement_timestamp()
    FROM due WHERE r.id = due.id AND r.state IS NOT NULL
), history AS (
    INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at,
        source, actor, data_before, data_after)
    SELECT %(alias)s, key, bot_id, chat_id, user_id, state, state, data_expires_at, 'expiry', '', data, '{{}}'
    FROM due WHERE %(noted)s AND data <> '{{}}'
)
SELECT {_DUE}, data_expires_at, id IN (SELECT id FROM deleted), data = '{{}}' FROM due
"""
