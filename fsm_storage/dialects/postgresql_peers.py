"""PostgreSQL's names of chats and users."""

from __future__ import annotations

from collections.abc import Sequence

from fsm_storage.dialects import Naming, Plan, Statement

# What is known already is not locked, which would write its row. A row that somebody else holds is
# left out: the worker thread must stay free for what handlers wait for.
_NAME = """
WITH input AS (
    SELECT i.* FROM set_config('lock_timeout', '100', true), unnest(
        %s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[]
    ) AS i(peer_id, title, username, title_key, rest_key, username_key)
), changed AS (
    SELECT p.peer_id FROM fsm_storage_peer p JOIN input i ON i.peer_id = p.peer_id
    WHERE p.title <> i.title OR p.username <> i.username
    ORDER BY p.peer_id FOR UPDATE OF p SKIP LOCKED
), updated AS (
    UPDATE fsm_storage_peer p SET title = i.title, username = i.username, title_key = i.title_key,
        rest_key = i.rest_key, username_key = i.username_key, updated_at = statement_timestamp()
    FROM changed c JOIN input i ON i.peer_id = c.peer_id WHERE p.peer_id = c.peer_id
    RETURNING p.peer_id
), inserted AS (
    INSERT INTO fsm_storage_peer (peer_id, title, username, title_key, rest_key, username_key, updated_at)
    SELECT i.*, statement_timestamp() FROM input i
    WHERE NOT EXISTS (SELECT FROM fsm_storage_peer p WHERE p.peer_id = i.peer_id)
    ORDER BY i.peer_id ON CONFLICT DO NOTHING
    RETURNING peer_id
)
SELECT peer_id, true FROM updated UNION ALL SELECT peer_id, true FROM inserted UNION ALL
SELECT p.peer_id, false FROM fsm_storage_peer p JOIN input i ON i.peer_id = p.peer_id
WHERE p.title = i.title AND p.username = i.username
"""


def name(namings: Sequence[Naming]) -> Plan[list[bool | None]]:
    columns = zip(*(naming.columns() for naming in namings), strict=True)
    news: dict[int, bool] = dict((yield Statement(_NAME, [list(column) for column in columns])))
    return [news.get(naming.key) for naming in namings]
