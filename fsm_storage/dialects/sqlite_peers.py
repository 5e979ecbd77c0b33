"""SQLite's names of chats and users."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fsm_storage.dialects import Naming, Plan, Statement

_COLUMNS = ("peer_id", "title", "username", "title_key", "rest_key", "username_key")
_NAME = f"""
INSERT INTO fsm_storage_peer AS p ({", ".join(_COLUMNS)}, updated_at)
SELECT {", ".join(f"json_extract(j.value, '$[{index}]')" for index in range(len(_COLUMNS)))},
    strftime('%Y-%m-%d %H:%M:%f', 'now')
FROM json_each(?) j WHERE true
ON CONFLICT (peer_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in (*_COLUMNS[1:], "updated_at"))}
WHERE p.title <> excluded.title OR p.username <> excluded.username
RETURNING peer_id
"""


def name(namings: Sequence[Naming]) -> Plan[list[bool | None]]:
    rows = json.dumps([naming.columns() for naming in namings], ensure_ascii=False)
    written = yield Statement(_NAME, (rows,))
    news = {peer_id for (peer_id,) in written}
    return [naming.key in news for naming in namings]
