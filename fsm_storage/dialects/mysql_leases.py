"""The leases of MariaDB and MySQL: the rows of a batch are locked, judged here, and written back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from fsm_storage.dialects import Claim, Fence, Plan, Scope, Statement
from fsm_storage.dialects.mysql_sql import Many

_EPOCH = "TIMESTAMP('1970-01-01')"
# The clock is read when the statement begins, so a lease never runs longer than its holder thinks, however
# long the statement waits. Rows are locked in the order of their keys: no deadlock.
_SELECT = f"""
SELECT TIMESTAMPDIFF(MICROSECOND, {_EPOCH}, UTC_TIMESTAMP(6)), l.`key`,
    l.id, l.owner, l.token, l.expires_at <= UTC_TIMESTAMP(6)
FROM (SELECT 1) one LEFT JOIN fsm_storage_lease l ON l.alias = %s AND l.`key` IN %s
ORDER BY l.`key` FOR UPDATE
"""
_EXPIRES_AT = f"{_EPOCH} + INTERVAL %s MICROSECOND"
_INSERT = Many(
    "INSERT INTO fsm_storage_lease (alias, `key`, owner, token, expires_at)",
    f"(%s, %s, %s, %s, {_EXPIRES_AT})",
)
# It always meets the row with its id, as in `mysql_sql`.
_UPDATE = Many(
    "INSERT INTO fsm_storage_lease (id, owner, token, expires_at, alias, `key`)",
    f"(%s, %s, %s, {_EXPIRES_AT}, '', '')",
    "ON DUPLICATE KEY UPDATE owner = VALUES(owner), token = VALUES(token), expires_at = VALUES(expires_at)",
)
_DELETE = "DELETE FROM fsm_storage_lease WHERE id IN %s"
_EXPIRED = """
SELECT id FROM fsm_storage_lease WHERE alias = %s AND expires_at <= UTC_TIMESTAMP(6)
LIMIT %s FOR UPDATE SKIP LOCKED
"""
# Who takes a lease over waits for the lock, so it begins after all that was written under the lease.
_FENCED = """
SELECT `key`, token FROM fsm_storage_lease WHERE alias = %s AND `key` IN %s ORDER BY `key` LOCK IN SHARE MODE
"""


class _Held(NamedTuple):
    id: int
    owner: str
    token: int
    has_run_out: bool


def claim(claims: Sequence[Claim], scope: Scope) -> Plan[list[int | None]]:
    rows = yield Statement(_SELECT, (scope.alias, [one.key for one in claims]))
    now = rows[0][0]
    held = {row[1]: _Held(*row[2:]) for row in rows}
    inserts, updates, deletes, replies = [], [], [], []
    for one in claims:
        lease = held.get(one.key)
        expires_at, token = now + int(one.seconds * 1_000_000), _granted(one, lease, now)
        replies.append(token)
        if token is None:
            continue
        if lease is None:
            inserts.append((scope.alias, one.key, one.owner, token, expires_at))
        elif one.seconds:
            updates.append((lease.id, one.owner, token, expires_at))
        else:
            deletes.append(lease.id)
    if inserts:
        yield _INSERT.statement(inserts, is_quiet=True)
    if updates:
        yield _UPDATE.statement(updates, is_quiet=True)
    if deletes:
        yield Statement(_DELETE, (deletes,), is_quiet=True)
    return replies


def lost(fences: Collection[Fence], scope: Scope) -> Plan[set[Fence]]:
    """Return those of `fences` whose lease is another's by now."""
    rows = yield Statement(_FENCED, (scope.alias, [fence.key for fence in fences]))
    return set(fences) - {Fence(*row) for row in rows}


def _granted(one: Claim, lease: _Held | None, now: int) -> int | None:
    """Return the token that a claim gets, or gives back; None if it is refused."""
    if one.seconds and one.token is None:
        if lease is None:
            return now
        is_free = lease.has_run_out or lease.owner == one.owner
        return max(now, lease.token + 1) if is_free else None
    if lease is None or lease.owner != one.owner or one.token not in (None, lease.token):
        return None
    return lease.token


def sweep(scope: Scope, limit: int) -> Plan[int]:
    rows = yield Statement(_EXPIRED, (scope.alias, limit))
    if rows:
        yield Statement(_DELETE, ([row[0] for row in rows],), is_quiet=True)
    return len(rows)
