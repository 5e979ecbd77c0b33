"""PostgreSQL driven by the event loop: a statement is sent, and the loop goes on until there are rows to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from psycopg import OperationalError
from psycopg.errors import LockNotAvailable

from fsm_storage.backends.libpq import Bound, Prepared
from fsm_storage.dialects import Plan, Statement

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGresult


class Line(Prepared):
    """A connection of psycopg that carries out one plan at a time. See `Driven`.

    After any error but a lock that was not free, it is of no more use. `timeout`: seconds that a plan may take.
    """

    def __init__(self, connection: Connection[Any], *, prepares: bool, timeout: float) -> None:
        super().__init__(connection, prepares=prepares)
        self._connection, self._timeout = connection, timeout
        self._pgconn.nonblocking = 1
        self._socket = self._pgconn.socket
        self.is_usable = True
        # Of the plan at hand:
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle
        self._plan: Plan[Any]
        self._done: Callable[[Any], None]
        self._bound: Bound
        self._preparing: bytes | None = None
        self._result: PGresult | None = None
        self._has_writer = False

    def start(self, plan: Plan[Any], begin: str | None, operations: int, done: Callable[[Any], None]) -> bool:
        """See `Driven.start`. No `begin` is needed: a statement commits itself."""
        self._loop = asyncio.get_running_loop()
        try:
            self._loop.add_reader(self._socket, self._on_readable)
        except NotImplementedError:  # Windows' own event loop has no such thing
            return False
        self._plan, self._done = plan, done
        self._timer = self._loop.call_later(self._timeout, self._fail, TimeoutError())
        try:
            self._send(next(plan))
        except Exception as error:
            self._fail(error)
        return True

    def close(self) -> None:
        self._connection.close()

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
        if self._has_writer:
            self._flush()
        while not self._pgconn.is_busy():
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
            self._loop.add_writer(self._socket, self._on_writable)
        elif self._has_writer and not has_more:
            self._loop.remove_writer(self._socket)
        self._has_writer = has_more

    def _fail(self, error: Exception) -> None:
        # Whatever it is: the worker thread meets it too, and knows what to do.
        self.is_usable = isinstance(error, LockNotAvailable)
        self._preparing = self._result = None
        self._finish(None)

    def _finish(self, replies: Any) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        if self._has_writer:
            self._loop.remove_writer(self._socket)
            self._has_writer = False
        self._plan.close()
        done = self._done
        del self._plan, self._done, self._loop, self._timer
        done(replies)
