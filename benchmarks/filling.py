"""Fills the tables with made-up conversations, in the database itself, without their indexes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection

_TABLES = ("fsm_storage_record", "fsm_storage_transition")
_ALL = (
    *_TABLES,
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
    began + s * (interval '5 seconds' + interval '10 minutes' * pg_temp.chance(n, s + 10) ^ 3),
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


def fill(records: int, transitions: int) -> None:
    """Empty the tables, and make so many rows of each. A step of the same seed is the same in every run."""
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE " + ", ".join(_ALL))
        cursor.execute("ALTER SEQUENCE fsm_storage_transition_id_seq RESTART")
        cursor.execute(_FLOWS)
        cursor.execute("SET work_mem = '512MB'")
        cursor.execute("SET maintenance_work_mem = '1GB'")
        with _without_indexes():
            for start in range(1, records + 1, 1_000_000):
                cursor.execute(_RECORDS, [start, min(start + 999_999, records)])
            people = int(transitions / _PER_CONVERSATION)
            cursor.execute(_TRANSITIONS, [people, people, transitions])
        cursor.execute("DROP FUNCTION pg_temp.flow, pg_temp.chance")
        for table in _TABLES:
            cursor.execute(f"VACUUM ANALYZE {table}")


@contextmanager
def _without_indexes() -> Iterator[None]:
    """Drop what is no constraint, and make it again: a tenth of the time."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = ANY(%s) AND indexname NOT IN"
            " (SELECT conname FROM pg_constraint)",
            [list(_TABLES)],
        )
        indexes = cursor.fetchall()
        for name, _definition in indexes:
            cursor.execute(f'DROP INDEX "{name}"')
        yield
        for _name, definition in indexes:
            cursor.execute(definition)
