"""SQLite on the event loop's own thread. A statement on a file that the system has in memory takes microseconds.

What may take longer is left to the worker thread: waiting for another process's lock, a commit that waits for the
disk, a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fsm_storage.dialects import Plan

SLOW_SECONDS = 0.01
PAUSE_SECONDS = 30.0
"""After calls that took so long on average, the worker thread does all, for so long."""
CHECKPOINT_PAGES = 4000
"""After some so many pages, the worker thread carries out a batch; if a checkpoint is due, SQLite makes it there."""
_NORMAL = 1


class Here:
    """A connection of `sqlite3`, for plans that are carried out where they are asked for. See `Driven`."""

    is_usable = True

    def __init__(self, connection: Any, *, may_write: bool) -> None:
        self._connection, self._may_write = connection, may_write
        self._pages, self._pace, self._paused_until = 0, 0.0, 0.0

    @classmethod
    def on(cls, connection: Any) -> Here | None:
        """Return the driver of a connection; None without a write-ahead log, where reads wait for writes."""
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        return cls(connection, may_write=synchronous <= _NORMAL) if mode == "wal" else None

    def start(self, plan: Plan[Any], begin: str | None, operations: int, done: Callable[[Any], None]) -> bool:
        began = time.monotonic()
        if began < self._paused_until or (begin is not None and not self._may_begin(operations)):
            return False
        replies = None
        try:
            # Whatever it is: the thread meets it too, and knows what to do.
            with suppress(Exception):
                replies = self._carried_out(plan, begin)
        finally:
            plan.close()
            if self._connection.in_transaction:
                self._roll_back()
        self._pace += (time.monotonic() - began - self._pace) / 8
        if self._pace > SLOW_SECONDS:
            self._pace, self._paused_until = 0.0, time.monotonic() + PAUSE_SECONDS
        if replies is None:
            return False
        done(replies)
        return True

    def close(self) -> None:
        self._connection.close()

    def _may_begin(self, operations: int) -> bool:
        self._pages += 8 + operations
        if self._pages >= CHECKPOINT_PAGES:
            self._pages = 0
            return False
        return self._may_write

    def _carried_out(self, plan: Plan[Any], begin: str | None) -> Any:
        execute = self._connection.execute
        try:
            if begin is not None:
                execute(begin)
            statement = next(plan)
            while True:
                statement = plan.send(execute(statement.sql, statement.params).fetchall())
        except StopIteration as stop:
            if begin is not None:
                execute("COMMIT")
            return stop.value

    def _roll_back(self) -> None:
        try:
            self._connection.execute("ROLLBACK")
        except Exception:
            self.is_usable = False
