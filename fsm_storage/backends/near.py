"""Connections that an event loop drives itself, because to wake another thread takes longer than the work.

The worker thread opens and closes them, and does whatever they are not for: it has the retries, the errors,
and the patience.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from fsm_storage.backends.forks import left_behind
from fsm_storage.backends.here import Here
from fsm_storage.dialects import Dialect, Plan

Done = Callable[[Any], None]

MAX_CONNECTIONS = 8
"""So many at a time; event loops that find none use the worker thread."""
PAUSE_SECONDS = 30.0
"""How long it takes until another is tried where the last one was of no use."""


class Driven(Protocol):
    """A connection that is lent to one event loop at a time."""

    is_usable: bool

    def start(self, plan: Plan[Any], begin: str | None, done: Done) -> bool:
        """Begin to carry `plan` out, in a transaction that the statement `begin` opens.

        Say whether that is so: then `done` is called, at once or later, with the replies; with None if there was
        an error of any kind, for the worker thread to meet too.
        """

    def may_serve(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Say whether it may be lent to `loop`."""

    def close(self) -> None:
        """Close it, from any thread, while it is not lent; where its loop is running, in the loop's next turn."""


class Near:
    """The connections of one storage, lent to whichever event loop has something to do."""

    def __init__(self, database: str, timeout: float) -> None:
        self._database, self._timeout = database, timeout
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._closing, self._opening = threading.Lock(), threading.Lock()
        self._idle: list[tuple[Driven, float]] = []
        self._lent: dict[Driven, asyncio.AbstractEventLoop] = {}
        self._generation = 0
        self._not_before = 0.0
        self._is_wanted = True
        self.dialect: Dialect | None = None
        """That of the server; None until there has been a connection."""
        self.is_held = False
        """The worker thread is writing, or waits for the lock to."""

    @property
    def _opened(self) -> int:
        return len(self._idle) + len(self._lent)

    def start(self, plan: Plan[Any], begin: str | None, done: Done) -> bool:
        """Begin to carry out a plan as `Driven.start` does, if there is a connection for it."""
        loop = asyncio.get_running_loop()
        with self._closing:
            found = self._take(loop)
            generation = self._generation
        if found is None:
            return False
        connection, until = found
        if until < time.monotonic() or not connection.is_usable:
            connection.close()
            self._is_wanted = True
            return False

        def finished(replies: Any) -> None:
            self._take_back(connection, until, generation)
            done(replies)

        self._lent[connection] = loop
        if connection.start(plan, begin, finished):
            return True
        self._take_back(connection, until, generation)
        return False

    def _take(self, loop: asyncio.AbstractEventLoop) -> tuple[Driven, float] | None:
        for place, (connection, _) in enumerate(self._idle):
            if connection.may_serve(loop):
                return self._idle.pop(place)
        self._is_wanted = True
        return None

    def _take_back(self, connection: Driven, until: float, generation: int) -> None:
        self._lent.pop(connection, None)
        self._add(connection, until, generation)

    def _add(self, connection: Driven, until: float, generation: int) -> None:
        """Put it with the idle ones, unless it is of no use or they were closed since `generation`."""
        with self._closing:
            if generation == self._generation and connection.is_usable:
                self._idle.append((connection, until))
                return
        connection.close()

    def open(
        self,
        dialect: Dialect,
        guard: Callable[[], AbstractContextManager[Any]],
        *,
        prepares: Callable[[BaseDatabaseWrapper], bool],
    ) -> None:
        """Open another connection, if a loop found none and the database is one for it. In a worker thread.

        `guard()` is held meanwhile.
        """
        if not self._is_wanted or dialect.drives is None or time.monotonic() < self._not_before:
            return
        if self._opening.acquire(blocking=False):  # else another worker thread is at it
            try:
                self._reclaim()
                if self._opened < MAX_CONNECTIONS:
                    with guard():
                        self._open(dialect, prepares)
            finally:
                self._opening.release()

    def _open(self, dialect: Dialect, prepares: Callable[[BaseDatabaseWrapper], bool]) -> None:
        generation, wrapper, connection = self._generation, None, None
        # Whatever it is: the worker's own connection meets the same, and says so.
        with suppress(Exception):
            wrapper = connections.create_connection(self._database)
            connection = self._connect(wrapper, dialect, prepares)
        if wrapper is None or connection is None:
            self._not_before = time.monotonic() + PAUSE_SECONDS
            if wrapper is not None:
                with suppress(Exception):
                    wrapper.close()
            return
        age = wrapper.settings_dict["CONN_MAX_AGE"]
        self._is_wanted = False
        self._add(connection, time.monotonic() + age if age else float("inf"), generation)

    def _connect(
        self,
        wrapper: BaseDatabaseWrapper,
        dialect: Dialect,
        prepares: Callable[[BaseDatabaseWrapper], bool],
    ) -> Driven | None:
        """Return a connection that any thread may use; None where it would be of no use."""
        # A pool wants its connections back, and has none to spare. Who watches the queries shall see them.
        if wrapper.settings_dict["OPTIONS"].get("pool") or wrapper.queries_logged:
            return None
        wrapper.ensure_connection()
        if wrapper.execute_wrappers:
            return None
        wrapper.set_autocommit(True)
        with wrapper.cursor() as cursor:
            for sql in (*dialect.session(self._timeout), *(dialect.drives or ())):
                cursor.execute(sql)
        self.dialect = dialect.at(getattr(wrapper, "pg_version", 0))
        if dialect.binds_on_server:
            from fsm_storage.backends.line import Line

            return Line(wrapper.connection, prepares=prepares(wrapper), timeout=self._timeout)
        return Here.on(wrapper.connection)

    def close(self) -> None:
        """Close the idle connections; those that are lent are closed when they come back. In any thread."""
        self._reclaim()
        with self._closing:
            self._generation += 1
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _reclaim(self) -> None:
        """Close what was lent to loops that were closed meanwhile."""
        for connection, loop in list(self._lent.items()):
            if loop.is_closed() and self._lent.pop(connection, None) is not None:
                connection.close()


_all: weakref.WeakSet[Near] = weakref.WeakSet()


def _start_anew() -> None:
    for near in list(_all):
        left_behind.extend((near._idle, near._lent))
        near._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
