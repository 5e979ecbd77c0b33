"""Fills the tables with made-up conversations, in the database itself, without their indexes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection, connections
from django.db.backends.utils import CursorWrapper

_ROLLUP_TABLES = (
    "fsm_storage_run",
    "fsm_storage_hourly_move",
    "fsm_storage_hourly_path",
    "fsm_storage_rollup_mark",
)

# What people do: seven in ten order, two ask for help, one rates. How far each comes, and how it ends, is by chance.
_FLOWS = """
CREATE FUNCTION pg_temp.flow(number bigint) RETURNS text[] IMMUTABLE LANGUAGE sql AS $$
    SELECT CASE
        WHEN number % 10 < 7 THEN ARRAY['Order:item', 'Order:size', 'Order:amount', 'Order:address', 'Order:phone',
            'Order:payment', 'Order:confirmation']
        WHEN number % 10 < 9 THEN ARRAY['Support:topic', 'Support:description', 'Support:waiting']
        ELSE ARRAY['Feedback:rating', 'Feedback:comment']
    END
$$;
CREATE FUNCTION pg_temp.chance(number bigint, salt int) RETURNS float8 IMMUTABLE LANGUAGE sql AS $$
    SELECT (abs(hashint8(number * 31 + salt)::bigint) % 100000) / 100000.0::float8
$$
"""

_RECORDS = """
INSERT INTO fsm_storage_record (alias, key, bot_id, chat_id, user_id, destiny, state, data, version,
    state_expires_at, data_expires_at, created_at, updated_at)
SELECT 'default', '42:' || n || ':' || n, 42, n, n, 'default',
    CASE WHEN pg_temp.chance(n, 1) < 0.3
        THEN (pg_temp.flow(n))[1 + floor(pg_temp.chance(n, 2) * cardinality(pg_temp.flow(n)))::int]
    END,
    jsonb_build_object('name', 'Person ' || n, 'phone', '+1555' || lpad(n::text, 8, '0'), 'language', 'en',
        'cart', jsonb_build_object('item', (ARRAY['margherita', 'pepperoni', 'funghi'])[1 + n %% 3], 'amount', n %% 5)),
    1, NULL, NULL, now() - interval '60 days' * pg_temp.chance(n, 3), now() - interval '30 days' * pg_temp.chance(n, 4)
FROM generate_series(%s::bigint, %s::bigint) n
"""

# Each conversation has an entry, steps, and in two of three cases an end: about five transitions.
_TRANSITIONS = """
INSERT INTO fsm_storage_transition (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source)
SELECT 'default', '42:' || n || ':' || n, 42, n, n, flow[s],
    CASE WHEN s < depth THEN flow[s + 1] END,
    began + (s + 0.9 * pg_temp.chance(n, s + 10))
        * (interval '20 seconds' + interval '10 minutes' * pg_temp.chance(n, 8) ^ 3),
    CASE WHEN s = depth AND pg_temp.chance(n, 5) < 0.3 THEN 'expiry' ELSE 'bot' END
FROM (
    SELECT n, pg_temp.flow(n) AS flow,
        1 + floor(pg_temp.chance(n, 6) * cardinality(pg_temp.flow(n)))::int AS depth,
        now() - interval '30 days' * (1 - n / %s::float8) AS began
    FROM generate_series(1, %s::bigint) n
) people, generate_series(0, depth) s
WHERE s < depth OR pg_temp.chance(n, 7) < 0.66
ORDER BY 8, n, s
LIMIT %s
"""
_PER_CONVERSATION = 3.6


# What `fsm_storage.rollup` makes of these transitions, a hundred thousand times as fast as one by one. That it is the
# same is checked on the small tables, where both are made. (Paths have other numbers.)
_ROLLUPS = [
    """
    CREATE TEMP TABLE walked AS SELECT *, min(at) OVER run AS began, lag(at) OVER (run ORDER BY id) AS before
    FROM fsm_storage_transition WINDOW run AS (PARTITION BY key)
    """,
    "ANALYZE walked",
    """
    INSERT INTO fsm_storage_run (id, alias, key, bot_id, chat_id, user_id, started_at, state, moved_at, path, entries)
    SELECT min(id), 'default', key, 42, chat_id, user_id, began, (array_agg(to_state ORDER BY id DESC))[1], max(at),
        md5(string_agg(to_state, '>' ORDER BY id))::uuid,
        jsonb_agg(jsonb_build_array(to_state, extract(epoch FROM at - began)) ORDER BY id) FILTER (WHERE to_state <> '')
    FROM walked GROUP BY key, chat_id, user_id, began
    """,
    """
    INSERT INTO fsm_storage_hourly_path (id, alias, bot_id, hour, path, states, count)
    SELECT gen_random_uuid(), 'default', 42, hour, path, states, count(*)
    FROM (
        SELECT date_trunc('hour', started_at, 'UTC') AS hour, path, jsonb_path_query_array(entries, '$[*][0]') AS states
        FROM fsm_storage_run
    ) runs GROUP BY hour, path, states
    """,
    """
    INSERT INTO fsm_storage_hourly_move (id, kind, alias, bot_id, hour, from_state, to_state, span, count)
    SELECT gen_random_uuid(), kind, 'default', 42, date_trunc('hour', hour, 'UTC'), from_state, to_state, span, count(*)
    FROM (
        SELECT CASE WHEN to_state IS NULL AND source = 'expiry' THEN 'expiry' ELSE 'move' END AS kind, at AS hour,
            from_state, to_state, pg_temp.span(at - before) AS span
        FROM walked
        UNION ALL
        SELECT 'reach', one.began, one.to_state, later.to_state, pg_temp.span(later.at - one.at)
        FROM walked one JOIN walked later ON later.key = one.key AND later.id > one.id AND later.to_state IS NOT NULL
    ) moves GROUP BY kind, date_trunc('hour', hour, 'UTC'), from_state, to_state, span
    """,
    "INSERT INTO fsm_storage_rollup_mark (id, upto, gaps, rolled_at)"
    " SELECT 1, max(id), '[]', now() FROM fsm_storage_transition",
    "DROP TABLE walked",
]
_SPAN = """
CREATE FUNCTION pg_temp.span(stay interval) RETURNS int IMMUTABLE LANGUAGE sql AS $$
    SELECT CASE WHEN stay IS NULL THEN -1 WHEN stay < interval '1 second' THEN 0
        ELSE 1 + floor(ln(extract(epoch FROM stay)::float8) / ln(2::float8))::int END
$$
"""


def fill_records(rows: int, using: str = "default") -> None:
    """Make so many records anew."""
    with _filling("fsm_storage_record", using) as cursor:
        for start in range(1, rows + 1, 1_000_000):
            cursor.execute(_RECORDS, [start, min(start + 999_999, rows)])


def fill_transitions(rows: int) -> None:
    """Make so many transitions of the last thirty days anew, in the order of their time."""
    with _filling("fsm_storage_transition") as cursor:
        cursor.execute("ALTER SEQUENCE fsm_storage_transition_id_seq RESTART")
        people = int(rows / _PER_CONVERSATION)
        cursor.execute(_TRANSITIONS, [people, people, rows])


def fill_rollups() -> None:
    """Make what the sweep makes of the transitions."""
    empty_rollups()
    with connection.cursor() as cursor:
        cursor.execute(_SPAN)
        cursor.execute("SET work_mem = '512MB'")
        for statement in _ROLLUPS:
            cursor.execute(statement)
        cursor.execute("RESET work_mem")
        cursor.execute("DROP FUNCTION pg_temp.span")


def empty_rollups() -> None:
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE " + ", ".join(_ROLLUP_TABLES))


def rollups() -> list[tuple[object, ...]]:
    """Return what the sums say, for a comparison."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT kind, hour, from_state, to_state, span, count FROM fsm_storage_hourly_move"
            " UNION ALL SELECT 'path', hour, states::text, NULL, 0, count FROM fsm_storage_hourly_path"
            " ORDER BY 1, 2, 3, 4, 5"
        )
        return cursor.fetchall()


@contextmanager
def _filling(table: str, using: str = "default") -> Iterator[CursorWrapper]:
    """Empty a table, and give what fills it: a cursor, and the functions of chance; its indexes come afterwards."""
    with connections[using].cursor() as cursor:
        cursor.execute(f"TRUNCATE {table}")
        cursor.execute(_FLOWS)
        cursor.execute("SET work_mem = '512MB'")
        cursor.execute("SET maintenance_work_mem = '1GB'")
        with _without_indexes(table, using):
            yield cursor
        cursor.execute("DROP FUNCTION pg_temp.flow, pg_temp.chance")
        cursor.execute("RESET work_mem")
        cursor.execute(f"VACUUM ANALYZE {table}")


@contextmanager
def _without_indexes(table: str, using: str) -> Iterator[None]:
    """Drop what is no constraint, and make it again: a tenth of the time."""
    with connections[using].cursor() as cursor:
        cursor.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = %s AND indexname NOT IN"
            " (SELECT conname FROM pg_constraint)",
            [table],
        )
        indexes = cursor.fetchall()
        for name, _definition in indexes:
            cursor.execute(f'DROP INDEX "{name}"')
        yield
        for _name, definition in indexes:
            cursor.execute(definition)
