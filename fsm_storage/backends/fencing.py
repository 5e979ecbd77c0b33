"""The lease under which the code that runs now works. Writes carry it, so that a late one is refused."""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from typing import Protocol

from fsm_storage.dialects import Fence


class Hold(Protocol):
    """A lock that a handler is in."""

    def fence(self, place: Hashable | None) -> Fence | None:
        """Return what a write to `place` must find, if it can be found there: see `LeasingStorage`.

        None once the lock was left: tasks that the handler started may outlive it. Raises `LeaseLost`.
        """


HOLD: ContextVar[Hold | None] = ContextVar("fsm_storage_hold", default=None)
