"""SQLite on the event loop's own thread. A statement on a file that the system has in memory takes microseconds.

What may take longer is left to the worker thread: waiting for another process's lock, a commit that waits for the
disk, a checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fsm_storage.backends.forks import at_work, close_before_forks
from fsm_storage.dialects import Plan
from fsm_storage.dialects.sqlite import LOG_PAGES

SLOW_SECONDS = 0.01
PAUSE_SECONDS = 30.0
"""After calls that took so long on average, the worker thread does all, for so long."""
_STEP_PAGES = 250
"""When the log has `LOG_PAGES`, the worker thread carries out the next batch, and SQLite makes a checkpoint with it.
Where a reader keeps the log from beginning anew, each time that it has grown by so many more."""
_LOOK_SECONDS = 0.002
"""It is looked how long the log is after so much work: that does not fill many pages, and the look costs 8 µs."""
_FRAME_HEADER = 24
_NORMAL = 1


class Here:
    """A connection of `sqlite3`, for plans that are carried out where they are asked for. See `Driven`."""

    is_usable = True

    def __init__(self, connection: Any, *, may_write: bool, log: str, page: int) -> None:
        self._connection, self._may_write = connection, may_write
        self._log, self._frame = log, page + _FRAME_HEADER
        self._length, self._due_length = 0, LOG_PAGES * self._frame
        self._worked, self._pace, self._paused_until = 0.0, 0.0, 0.0
        close_before_forks(self)

    @classmethod
    def on(cls, connection: Any) -> Here | None:
        """Return the driver of a connection; None without a write-ahead log, where reads wait for writes."""
        mode, synchronous, page = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "page_size")
        )
        if mode != "wal":
            return None
        # The first to write when the log begins anew cuts it to this.
        connection.execute(f"PRAGMA journal_size_limit = {LOG_PAGES * page}")
        *_, file = connection.execute("PRAGMA database_list").fetchone()
        return cls(connection, may_write=synchronous <= _NORMAL, log=f"{file}-wal", page=page)

    def start(self, plan: Plan[Any], begin: str | None, done: Callable[[Any], None]) -> bool:
        with at_work.guard():
            replies = self._answer(plan, begin)
        if replies is None:
            return False
        done(replies)
        return True

    def _answer(self, plan: Plan[Any], begin: str | None) -> Any:
        """Return the replies; None if there are none, or not now."""
        began = time.monotonic()
        if not self.is_usable or began < self._paused_until or (begin is not None and not self._may_begin()):
            return None
        replies = None
        try:
            # Whatever it is: the thread meets it too, and knows what to do.
            with suppress(Exception):
                replies = self._carried_out(plan, begin)
        finally:
            plan.close()
            if self._connection.in_transaction:
                self._roll_back()
        worked = time.monotonic() - began
        self._worked += worked
        self._pace += (worked - self._pace) / 8
        if self._pace > SLOW_SECONDS:
            self._pace, self._paused_until = 0.0, time.monotonic() + PAUSE_SECONDS
        return replies

    def may_serve(self, loop: asyncio.AbstractEventLoop) -> bool:
        return True

    def close(self) -> None:
        with at_work.guard():
            self.is_usable = False
            self._connection.close()

    def _may_begin(self) -> bool:
        return self._may_write and not self._is_checkpoint_due()

    def _is_checkpoint_due(self) -> bool:
        """Say whether the log is too long; where a reader keeps it so, once for each `_STEP_PAGES` that it grows."""
        if self._worked < _LOOK_SECONDS:
            return False
        self._worked = 0.0
        try:
            length = os.stat(self._log).st_size
        except OSError:  # it cannot be looked at; the thread's commits look after it by themselves
            return True
        if length < self._length:  # it was cut
            self._due_length = LOG_PAGES * self._frame
        self._length = length
        if length <= self._due_length:
            return False
        self._due_length = length + _STEP_PAGES * self._frame
        return True

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
