"""Conversations on their way from one place to another, as plain values. No database, no files.

`lines` writes and reads them as JSON lines, `importer` puts them into a storage; what other
storages left behind is read by the modules of `fsm_storage.sources`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from aiogram.fsm.storage.base import StorageKey


class Conversation(NamedTuple):
    """A record as it was in the place that it comes from. Instants know their time zone; None is never.

    `updated_at` None: that place does not tell when it was written. `alias` None: it knows no aliases.
    """

    key: StorageKey
    state: str | None
    data: dict[str, Any]
    state_expires_at: datetime | None = None
    data_expires_at: datetime | None = None
    alias: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def live_at(self, now: datetime) -> Conversation:
        """Return what is left of it at `now`: what has expired, or has no value, has no expiry either."""
        state, data, state_expires_at, data_expires_at = self[1:5]
        if state_expires_at is not None and state_expires_at <= now:
            state = None
        if data_expires_at is not None and data_expires_at <= now:
            data = {}
        return self._replace(
            state=state,
            data=data,
            state_expires_at=None if state is None else state_expires_at,
            data_expires_at=data_expires_at if data else None,
        )


class Step(NamedTuple):
    """A transition of the history. Its key is text too: a transition does not have all parts of it."""

    text: str
    key: StorageKey
    alias: str | None
    from_state: str | None
    to_state: str | None
    at: datetime
    source: str
    actor: str
    data_before: Any = None
    data_after: Any = None


class Refused(NamedTuple):
    """What cannot be read, and why."""

    reason: str


class Found(NamedTuple):
    """Something that a source holds, and where: "line 7", "key 'fsm:1:1:state'"."""

    place: str
    value: Conversation | Step | Refused
