"""The texts of MariaDB's and MySQL's statements; `mysql` says which is used when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fsm_storage.dialects import TOGETHER, Rows, Statement

# NOW() is the time of the session's zone.
_NOW = "UTC_TIMESTAMP(6)"

READ_STATES = f"""
SELECT `key`, CASE WHEN state_expires_at <= {_NOW} THEN NULL ELSE state END
FROM fsm_storage_record WHERE alias = %s AND `key` IN %s
"""
READ_DATA = f"""
SELECT `key`, CASE WHEN data_expires_at <= {_NOW} THEN '{{}}' ELSE data END
FROM fsm_storage_record WHERE alias = %s AND `key` IN %s
"""
# The index of the keys gives, and locks, the rows in the order of their keys; whoever locks in one order
# cannot deadlock. The outer join says what time it is where there is no row. A CAST keeps the instants texts.
SELECT = f"""
SELECT @@max_allowed_packet, LOCATE('MariaDB', VERSION()) = 0, r.`key`,
    CAST({_NOW} AS CHAR), r.id, r.version, r.state, r.data,
    CAST(r.state_expires_at AS CHAR), CAST(r.data_expires_at AS CHAR)
FROM (SELECT 1) one LEFT JOIN fsm_storage_record r ON r.alias = %s AND r.`key` IN %s
ORDER BY r.`key` FOR UPDATE
"""
EXISTING = "SELECT `key` FROM fsm_storage_record WHERE alias = %s AND `key` IN %s"
# Fails at once where somebody is about to make one of them, or to delete it; the INSERT would wait.
NOBODY_MAKES = f"{EXISTING} FOR UPDATE NOWAIT"

_EXPIRED = """
SELECT id, `key`, bot_id, chat_id, user_id, thread_id, business_connection_id, destiny, version, state, data,
    CAST({part}_expires_at AS CHAR), @@max_allowed_packet
FROM fsm_storage_record
WHERE {part}_expires_at <= coalesce(CAST(%s AS DATETIME(6)), {now}) AND alias = %s AND version < %s {unless}
ORDER BY {part}_expires_at LIMIT %s FOR UPDATE SKIP LOCKED
"""
# Its parameters: whether every state is spared, and a list of those that are.
_IS_SPARED = "(%s OR coalesce(state IN %s, 0))"
EXPIRED_STATES = _EXPIRED.format(part="state", now=_NOW, unless=f"AND NOT {_IS_SPARED}")
EXPIRED_DATA = _EXPIRED.format(
    part="data",
    now=_NOW,
    unless=f"""AND NOT (%s AND CAST(data AS CHAR) <> '{{}}') AND NOT (coalesce(state_expires_at
        <= data_expires_at + INTERVAL {TOGETHER} SECOND, 0) AND {_IS_SPARED})""",
)
CLEAR_STATES = f"""
UPDATE fsm_storage_record SET state = NULL, state_expires_at = NULL, version = version + 1, updated_at = {_NOW},
    data_expires_at = CASE WHEN CAST(data AS CHAR) = '{{}}' THEN {_NOW} ELSE data_expires_at END
WHERE id IN %s
"""
DELETE = "DELETE FROM fsm_storage_record WHERE id IN %s"
CLEAR_DATA = f"""
UPDATE fsm_storage_record SET data = '{{}}', data_expires_at = NULL, version = version + 1, updated_at = {_NOW}
WHERE id IN %s
"""


class Many(NamedTuple):
    """A statement that takes any number of rows: what goes before them, each of them, and after them."""

    head: str
    row: str
    tail: str = ""

    def statement(self, rows: Rows, *, is_quiet: bool = False) -> Statement:
        text = f"{self.head} VALUES {', '.join([self.row] * len(rows))} {self.tail}"
        return Statement(text, [value for row in rows for value in row], is_quiet)


def _row(columns: int, rest: str = "") -> str:
    return f"({', '.join(['%s'] * columns)}{rest})"


def _update(columns: Sequence[str]) -> Many:
    """An UPDATE of rows that exist and are locked, by their ids.

    Written as an INSERT, since no other statement gives each row values of its own on both servers: it always
    meets the row with its id, so what it would insert elsewhere is of no account. VALUES() is what both know.
    """
    name, value = ("", "") if "data" in columns else (", data", ", '{}'")
    return Many(
        f"""INSERT INTO fsm_storage_record ({", ".join(columns)}, id, alias, `key`, bot_id, chat_id, user_id,
            destiny{name})""",
        _row(len(columns) + 1, f", '', '', 0, 0, 0, ''{value}"),
        f"ON DUPLICATE KEY UPDATE {', '.join(f'{column} = VALUES({column})' for column in columns)}",
    )


_CHANGING = ("state", "state_expires_at", "data_expires_at", "version", "updated_at")
UPDATE_STATE, UPDATE_ALL = _update(_CHANGING), _update((*_CHANGING, "data"))
INSERT = Many(
    """INSERT INTO fsm_storage_record (alias, `key`, bot_id, chat_id, user_id, thread_id, business_connection_id,
    destiny, state, data, state_expires_at, data_expires_at, version, created_at, updated_at)""",
    _row(15),
)
TRANSITION = Many(
    """INSERT INTO fsm_storage_transition (alias, `key`, bot_id, chat_id, user_id, from_state, to_state, at,
    source, actor, data_before, data_after)""",
    _row(12),
)
