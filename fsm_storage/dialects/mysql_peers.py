"""MariaDB's and MySQL's names of chats and users."""

from __future__ import annotations

from collections.abc import Sequence

from fsm_storage.dialects import Naming, Plan, Statement
from fsm_storage.dialects.mysql_sql import Many

_KNOWN = "SELECT peer_id, title, username FROM fsm_storage_peer WHERE peer_id IN %s"
# A row that somebody else holds is left out: the worker thread must stay free for what handlers wait for.
_FREE = "SELECT peer_id FROM fsm_storage_peer WHERE peer_id IN %s ORDER BY peer_id FOR UPDATE SKIP LOCKED"
_COLUMNS = ("title", "username", "title_key", "rest_key", "username_key", "updated_at")
_NAME = Many(
    f"INSERT INTO fsm_storage_peer (peer_id, {', '.join(_COLUMNS)})",
    "(%s, %s, %s, %s, %s, %s, UTC_TIMESTAMP(6))",
    f"ON DUPLICATE KEY UPDATE {', '.join(f'{name} = VALUES({name})' for name in _COLUMNS)}",
)


def name(namings: Sequence[Naming]) -> Plan[list[bool | None]]:
    rows = yield Statement(_KNOWN, ([naming.key for naming in namings],))
    known = {row[0]: row[1:] for row in rows}
    news = [naming for naming in namings if known.get(naming.key) != (naming.title, naming.username)]
    changed = [naming.key for naming in news if naming.key in known]
    free = {row[0] for row in (yield Statement(_FREE, (changed,)))} if changed else set()
    written = [naming for naming in news if naming.key not in known or naming.key in free]
    if written:
        columns = sorted(naming.columns() for naming in written)  # locked in one order
        yield _NAME.statement(columns, is_quiet=True)
    held = set(changed) - free
    news_keys = {naming.key for naming in written}
    return [None if naming.key in held else naming.key in news_keys for naming in namings]
