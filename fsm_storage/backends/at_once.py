"""Carries plans out on the event loop's own thread, where that takes less time than to wake another: SQLite.

A statement on a file that is in the system's memory takes microseconds. What may take longer is left to
the worker thread: waiting for another process's lock, a commit that waits for the disk, a checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

from django.db import Error, connections

from fsm_storage.dialects import Dialect, Plan

T = TypeVar("T")

MAX_CONNECTIONS = 8
"""As many event loops, in threads of their own, can be served at a time; others use the worker thread."""
SLOW_SECONDS = 0.01
PAUSE_SECONDS = 30.0
"""After calls that took so long on average, the worker thread does all, for so long."""
CHECKPOINT_PAGES = 4000
"""After some so many pages, the worker thread carries out a batch; if a checkpoint is due, SQLite makes it there."""
_NORMAL = 1


class AtOnce:
    """Connections that are lent to whichever event loop has something to do.

    The worker thread opens them when it was asked because there was none, and closes them when it
    closes its own.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._closing = threading.Lock()
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._idle: list[Any] = []
        self._opened = 0
        self._generation = 0
        self._may_write = False
        self._pace, self._paused_until = 0.0, 0.0
        self._pages = 0

    def run(self, plan: Plan[T], begin: str | None, operations: int) -> T | None:
        """Drive `plan` to its end and return its replies; None, and nothing was done, if the thread shall do it.

        `begin`: the statement that opens a transaction, if one is needed, for so many `operations`. Never raises.
        """
        if begin is not None:
            self._pages += 8 + operations
            if not self._may_write or self._pages >= CHECKPOINT_PAGES:
                self._pages = 0
                return None
        generation, began = self._generation, time.monotonic()
        if began < self._paused_until:
            return None
        try:
            connection = self._idle.pop()
        except IndexError:
            return None
        try:
            return _driven(connection, plan, begin)
        except Exception:  # whatever it is: the thread meets it too, and knows what to do
            return None
        finally:
            plan.close()
            self._give_back(connection, generation)
            self._pace += (time.monotonic() - began - self._pace) / 8
            if self._pace > SLOW_SECONDS:
                self._pace, self._paused_until = 0.0, time.monotonic() + PAUSE_SECONDS

    def open(self, dialect: Dialect) -> None:
        """Open another connection, if none is idle and the database is one for it. In the worker thread."""
        if self._idle or self._opened >= MAX_CONNECTIONS or not dialect.at_once:
            return
        connection = None
        with suppress(Error):  # the worker's own connection meets the same, and says so
            connection = self._connect(dialect.at_once)
        if connection is None:
            self._opened = MAX_CONNECTIONS  # not tried again before the worker's connection is another
        else:
            self._opened += 1
            self._idle.append(connection)

    def _connect(self, session: Sequence[str]) -> Any:
        """Return a connection of the driver's own, which any thread may use; None where it would be of no use."""
        wrapper = connections.create_connection(self._database)
        wrapper.connect()
        connection = wrapper.connection
        with wrapper.wrap_database_errors:
            for sql in session:
                connection.execute(sql)
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        self._may_write = synchronous <= _NORMAL
        # Without a write-ahead log, reads wait for writes. Who watches the queries shall see them.
        if mode == "wal" and not wrapper.execute_wrappers and not wrapper.queries_logged:
            return connection
        connection.close()
        return None

    def close(self) -> None:
        """Close the idle connections; those that are lent are closed when they come back."""
        with self._closing:
            self._generation += 1
            idle, self._idle, self._opened = self._idle, [], 0
        for connection in idle:
            connection.close()

    def _give_back(self, connection: Any, generation: int) -> None:
        with suppress(Exception):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        with self._closing:
            if generation == self._generation and not connection.in_transaction:
                self._idle.append(connection)
                return
        connection.close()


def _driven(connection: Any, plan: Plan[T], begin: str | None) -> T:
    execute = connection.execute
    try:
        if begin is not None:
            execute(begin)
        statement = next(plan)
        while True:
            statement = plan.send(execute(statement.sql, statement.params).fetchall())
    except StopIteration as stop:
        if begin is not None:
            execute("COMMIT")
        value: T = stop.value
        return value


_all: weakref.WeakSet[AtOnce] = weakref.WeakSet()
_left_behind: list[Any] = []
"""A forked child must neither use its parent's connections to SQLite nor close them."""


def _start_anew() -> None:
    for one in list(_all):
        _left_behind.extend(one._idle)
        one._closing = threading.Lock()
        one._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
