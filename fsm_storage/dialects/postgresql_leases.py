"""PostgreSQL's leases: what a batch takes, renews and gives back is one statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fsm_storage.dialects import Claim, Plan, Scope, Statement

# Nothing waits for the disk: a write under a lease is a later commit, and takes the lease to the disk
# with it. What a server's crash loses is a lease under which nothing was written.
_SETTINGS = "set_config('lock_timeout', '100', true) a, set_config('synchronous_commit', 'off', true) b"

# The clock is read when the statement begins, so a lease never runs longer than its holder thinks,
# however long the statement waits. Rows are locked in the order of their keys: no deadlock.
# Nobody holds such a row for long; should one do it, the worker thread waits a tenth of a second.
_TAKE = f"""taken AS (
    INSERT INTO fsm_storage_lease AS l (alias, key, owner, token, expires_at)
    SELECT %(alias)s, i.key, i.owner, (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
        statement_timestamp() + i.seconds * interval '1 second'
    FROM {_SETTINGS},
        unnest(%(take_key)s::text[], %(take_owner)s::text[], %(take_seconds)s::float8[]) AS i(key, owner, seconds)
    ORDER BY i.key
    ON CONFLICT (alias, key) DO UPDATE SET
        owner = excluded.owner, token = greatest(excluded.token, l.token + 1), expires_at = excluded.expires_at
    WHERE l.expires_at <= statement_timestamp() OR l.owner = excluded.owner
    RETURNING key, token
)"""
_OWN = """{name}_own AS (
    SELECT l.id, i.seconds FROM {settings}, unnest(
        %({name}_key)s::text[], %({name}_owner)s::text[], %({name}_seconds)s::float8[], %({name}_token)s::bigint[]
    ) AS i(key, owner, seconds, token)
    JOIN fsm_storage_lease l ON l.alias = %(alias)s AND l.key = i.key
    WHERE l.owner = i.owner AND (i.token IS NULL OR l.token = i.token)
    ORDER BY l.key FOR UPDATE OF l
), """
_RENEW = (
    _OWN.format(name="renew", settings=_SETTINGS)
    + """renewed AS (
    UPDATE fsm_storage_lease l SET expires_at = statement_timestamp() + o.seconds * interval '1 second'
    FROM renew_own o WHERE l.id = o.id RETURNING l.key, l.token
)"""
)
_RELEASE = (
    _OWN.format(name="release", settings=_SETTINGS)
    + """released AS (
    DELETE FROM fsm_storage_lease l USING release_own o WHERE l.id = o.id RETURNING l.key, l.token
)"""
)
_PARTS = {"take": (_TAKE, "taken"), "renew": (_RENEW, "renewed"), "release": (_RELEASE, "released")}
_SWEEP = """
WITH due AS (
    SELECT id FROM fsm_storage_lease WHERE alias = %(alias)s AND expires_at <= statement_timestamp()
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM fsm_storage_lease l USING due WHERE l.id = due.id RETURNING l.id
)
SELECT count(*) FROM deleted
"""


def claim(claims: Sequence[Claim], scope: Scope) -> Plan[list[int | None]]:
    params: dict[str, Any] = {"alias": scope.alias}
    found: dict[str, list[Claim]] = {}
    for one in claims:
        found.setdefault(_kind(one), []).append(one)
    for name, some in found.items():
        for column in ("key", "owner", "seconds", "token"):
            params[f"{name}_{column}"] = [getattr(one, column) for one in some]
    parts = [part for name, part in _PARTS.items() if name in found]  # always in one order: few texts
    texts = ", ".join(text for text, _ in parts)
    rows = yield Statement(
        f"WITH {texts} {' UNION ALL '.join(f'SELECT key, token FROM {name}' for _, name in parts)}", params
    )
    tokens: dict[str, int] = dict(rows)
    return [tokens.get(one.key) for one in claims]


def _kind(claim: Claim) -> str:
    if not claim.seconds:
        return "release"
    return "take" if claim.token is None else "renew"


def sweep(scope: Scope, limit: int) -> Plan[int]:
    rows = yield Statement(_SWEEP, {"alias": scope.alias, "limit": limit})
    return int(rows[0][0])
