"""The lease under which the code that runs now works. Writes carry it, so that a late one is refused."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from fsm_storage.dialects import Fence


class Hold(Protocol):
    """A lock that a handler is in."""

    def fence(self, database: str, alias: str) -> Fence | None:
        """Return what a write to a storage must find in its table, if it can be found there.

        None once the lock was left: tasks that the handler started may outlive it. Raises `LeaseLost`.
        """


HOLD: ContextVar[Hold | None] = ContextVar("fsm_storage_hold", default=None)
