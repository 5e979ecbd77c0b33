"""SQLite's leases: a statement for what a batch takes, one for what it renews, one for what it gives back."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from fsm_storage.dialects import Claim, Fence, Plan, Scope, Statement

_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
_MICROSECONDS = "CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000"

# A claim is a JSON array: key, owner, SQLite's spelling of its seconds, token.
_KEY, _OWNER, _SECONDS, _TOKEN = (f"json_extract(c.value, '$[{index}]')" for index in range(4))
_EXPIRES_AT = f"strftime('%Y-%m-%d %H:%M:%f', 'now', {_SECONDS})"
# SQLite's clock has milliseconds, in which a lease may be given back and taken again. AUTOINCREMENT
# remembers the largest id after its row is gone, so the token is the id, and REPLACE makes a new one.
_TAKE = f"""
INSERT OR REPLACE INTO fsm_storage_lease (id, alias, key, owner, token, expires_at)
SELECT t.first + c.key, ?, {_KEY}, {_OWNER}, t.first + c.key, {_EXPIRES_AT}
FROM json_each(?) c CROSS JOIN (
    SELECT max({_MICROSECONDS}, 1 + coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'fsm_storage_lease'), 0))
    AS first
) t LEFT JOIN fsm_storage_lease l ON l.alias = ? AND l.key = {_KEY}
WHERE l.id IS NULL OR l.expires_at <= {_NOW} OR l.owner = {_OWNER}
RETURNING key, token
"""
_OWN = f"""
    FROM json_each(?) c CROSS JOIN fsm_storage_lease l ON l.alias = ? AND l.key = {_KEY}
    WHERE l.owner = {_OWNER} AND coalesce({_TOKEN}, l.token) = l.token
"""
_RENEW = f"""
UPDATE fsm_storage_lease SET expires_at = own.expires_at
FROM (SELECT l.id, {_EXPIRES_AT} AS expires_at {_OWN}) own WHERE fsm_storage_lease.id = own.id
RETURNING key, token
"""
_RELEASE = f"DELETE FROM fsm_storage_lease WHERE id IN (SELECT l.id {_OWN}) RETURNING key, token"
_LOST = f"""
SELECT {_KEY}, json_extract(c.value, '$[1]') FROM json_each(?) c
LEFT JOIN fsm_storage_lease l ON l.alias = ? AND l.key = {_KEY} AND l.token = json_extract(c.value, '$[1]')
WHERE l.id IS NULL
"""
_SWEEP = f"""
DELETE FROM fsm_storage_lease WHERE id IN (
    SELECT id FROM fsm_storage_lease WHERE alias = ? AND expires_at <= {_NOW} LIMIT ?
) RETURNING id
"""

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def claim(claims: Sequence[Claim], scope: Scope) -> Plan[list[int | None]]:
    tokens: dict[str, int] = {}
    taken = [one for one in claims if one.seconds and one.token is None]
    renewed = [one for one in claims if one.seconds and one.token is not None]
    released = [one for one in claims if not one.seconds]
    if taken:
        tokens.update((yield Statement(_TAKE, (scope.alias, _rows(taken), scope.alias))))
    if renewed:
        tokens.update((yield Statement(_RENEW, (_rows(renewed), scope.alias))))
    if released:
        tokens.update((yield Statement(_RELEASE, (_rows(released), scope.alias))))
    return [tokens.get(one.key) for one in claims]


def _rows(claims: Sequence[Claim]) -> str:
    return _json([(one.key, one.owner, f"+{one.seconds:.3f} seconds", one.token) for one in claims])


def lost(fences: Collection[Fence], scope: Scope) -> Plan[set[Fence]]:
    """Return those of `fences` whose lease is another's by now."""
    rows = yield Statement(_LOST, (_json(list(fences)), scope.alias))
    return {Fence(*row) for row in rows}


def sweep(scope: Scope, limit: int) -> Plan[int]:
    rows = yield Statement(_SWEEP, (scope.alias, limit))
    return len(rows)
