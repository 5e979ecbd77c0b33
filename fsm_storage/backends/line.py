"""PostgreSQL driven by the event loop: a statement is sent, and the loop goes on until there are rows to read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from psycopg import OperationalError
from psycopg.errors import LockNotAvailable

from fsm_storage.backends.libpq import Bound, Prepared
from fsm_storage.dialects import Plan, Statement

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGresult

LOOK_AGAIN_SECONDS = 0.05
"""How long what has come over TLS may lie unread where no event tells of it. It seldom does: see `Line._must_wait`."""


class Line(Prepared):
    """A connection of psycopg that carries out one plan at a time. See `Driven`.

    It stays with the first event loop that it is lent to, which watches its socket until that loop is closed: to
    register it for each plan costs more than to read the reply. After any error but a lock that was not free, it
    is of no more use. `timeout`: seconds that a plan may take.
    """

    def __init__(self, connection: Connection[Any], *, prepares: bool, timeout: float) -> None:
        super().__init__(connection, prepares=prepares)
        self._connection, self._timeout = connection, timeout
        self._pgconn.nonblocking = 1
        self._is_encrypted = self._pgconn.ssl_in_use
        # A descriptor of our own for the loop to watch: libpq closes its own when the server goes away, and of a
        # closed one no loop can be told to forget it.
        self._socket = socket.fromfd(self._pgconn.socket, socket.AF_INET, socket.SOCK_STREAM)
        self.is_usable = True
        self._home: asyncio.AbstractEventLoop | None = None
        # One timer serves all plans: it looks whether the one at hand is late, and over TLS for what nobody tells of.
        self._timer: asyncio.TimerHandle | None = None
        # Of the plan at hand:
        self._plan: Plan[Any] | None = None
        self._due = 0.0
        self._done: Callable[[Any], None]
        self._bound: Bound
        self._preparing: bytes | None = None
        self._result: PGresult | None = None
        self._has_writer = False

    def may_serve(self, loop: asyncio.AbstractEventLoop) -> bool:
        """See `Driven.may_serve`."""
        return self._home is None or self._home is loop or self._home.is_closed()

    def start(self, plan: Plan[Any], begin: str | None, done: Callable[[Any], None]) -> bool:
        """See `Driven.start`. No `begin` is needed: a statement commits itself."""
        loop = asyncio.get_running_loop()
        if self._home is not loop:
            try:
                loop.add_reader(self._socket, self._on_readable)
            except Exception:  # Windows' own event loop has no such thing, another one may have no room
                return False
            self._home, self._timer = loop, None
        self._plan, self._done = plan, done
        self._due = loop.time() + self._timeout
        if self._timer is None:
            self._set_timer(loop)
        try:
            self._send(next(plan))
        except Exception as error:
            self._fail(error)
        return True

    def close(self) -> None:
        """See `Driven.close`."""
        if self._home is not None and self._home.is_running():
            with suppress(RuntimeError):  # it was closed meanwhile
                self._home.call_soon_threadsafe(self._leave)
                return
        self._leave()

    def _leave(self) -> None:
        if self._home is not None and not self._home.is_closed():
            self._home.remove_reader(self._socket)
        self._socket.close()
        self._connection.close()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        when = min(self._due, loop.time() + LOOK_AGAIN_SECONDS) if self._is_encrypted else self._due
        self._timer = loop.call_at(when, self._look_at_clock, loop)

    def _look_at_clock(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._plan is None:
            return
        if loop.time() >= self._due:
            self._fail(TimeoutError())
            return
        self._set_timer(loop)
        if self._is_encrypted:
            self._on_readable()

    def _on_readable(self) -> None:
        try:
            replies = self._read()
        except Exception as error:
            self._fail(error)
        else:
            if replies is not None:
                self._finish(replies)

    def _on_writable(self) -> None:
        try:
            self._flush()
        except Exception as error:
            self._fail(error)

    def _read(self) -> Any:
        """Take what has come, and go on as far as it lets; return the plan's replies if that was the end of it."""
        self._pgconn.consume_input()
        if self._plan is None:
            self._pgconn.is_busy()  # takes in that the server has changed a setting, or says goodbye
            return None
        if self._has_writer:
            self._flush()
        while not self._must_wait():
            result = self._pgconn.get_result()
            if result is not None:
                self._result = result
                continue
            if self._result is None:
                raise OperationalError("the server has sent no result")
            rows, self._result = self._rows(self._result), None
            if self._preparing is not None:
                self._execute(self._preparing)
                return None
            try:
                self._send(self._plan.send(rows))
            except StopIteration as stop:
                return stop.value
            return None
        return None

    def _must_wait(self) -> bool:
        """Say whether nothing can be read before the socket is readable again."""
        if not self._pgconn.is_busy():
            return False
        if not self._is_encrypted:
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK)
            return True
        except BlockingIOError:
            # An older libpq (18.0 is one, 18.6 is not) leaves in OpenSSL what it had no room for. Of a record that
            # comes just now it may do so once more; then it is the timer that asks for the rest.
            self._pgconn.consume_input()
            return bool(self._pgconn.is_busy())

    def _send(self, statement: Statement) -> None:
        self._bound = self.bound(*statement[:2])
        name = self._names.get(statement.sql)
        if not self._prepares:
            self._pgconn.send_query_params(self._bound.sql, self._bound.values)
            self._flush()
        elif name is not None:
            self._execute(name)
        else:
            self._preparing = self.name_of(self._bound)
            self._pgconn.send_prepare(self._preparing, self._bound.sql)
            self._flush()

    def _execute(self, name: bytes) -> None:
        if self._preparing is not None:
            self._names[self._bound.text] = name
            self._preparing = None
        self._pgconn.send_query_prepared(name, self._bound.values)
        self._flush()

    def _flush(self) -> None:
        """Send what the socket takes; what it does not take yet, the loop sends later."""
        has_more = bool(self._pgconn.flush())
        if has_more and not self._has_writer:
            asyncio.get_running_loop().add_writer(self._socket, self._on_writable)
        elif self._has_writer and not has_more:
            asyncio.get_running_loop().remove_writer(self._socket)
        self._has_writer = has_more

    def _fail(self, error: Exception) -> None:
        # Whatever it is: the worker thread meets it too, and knows what to do.
        self.is_usable = isinstance(error, LockNotAvailable)
        if not self.is_usable:  # the end of a stream can be read for ever
            asyncio.get_running_loop().remove_reader(self._socket)
        self._preparing = self._result = None
        self._finish(None)

    def _finish(self, replies: Any) -> None:
        if self._has_writer:
            asyncio.get_running_loop().remove_writer(self._socket)
            self._has_writer = False
        if self._plan is None:
            return
        self._plan.close()
        done = self._done
        self._plan = None
        del self._done
        done(replies)
