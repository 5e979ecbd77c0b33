"""Commands to Redis and replies from it, over connections that redis-py makes. Knows no queue and no storage.

Each wire has a connection of its own, made as the client's pool makes them (TLS, Sentinel, unix sockets,
passwords), and speaks on it alone. Once redis-py has greeted the server, the bytes are ours: its own way
to read a reply takes three times as long as all the rest of a round trip. Whenever a question does not
end well, by an error, a timeout or a cancellation, the connection is dropped with what was in it, so that
a reply can only be that of its question.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, cast

import hiredis
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fsm_storage.backends.writing import Command

Done: TypeAlias = Callable[[list[Any] | Exception], None]
"""Gets a reply for each command; where Redis refused it, the error. Or why there are no replies."""

_NOT_ALL: Final = object()


_open: dict[AbstractConnection, asyncio.AbstractEventLoop] = {}
"""What is connected. Held here, or the child of a fork would destroy what its parent's threads had: that closes
the stream, which takes the socket out of the epoll that the two processes share, and the parent hears no more.
"""


class Wire(Protocol):
    """Asks Redis. `one_key`: each command may have the keys of one Cluster slot only."""

    one_key: bool

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Return a reply for each command; where Redis refused it, the error. Raises when the line breaks."""
        ...

    async def hang_up(self) -> None:
        """Let go of the connection."""
        ...


class LineWire(Wire, Protocol):
    """A wire with a short way: once `ask` has connected, `line` can be asked without a coroutine."""

    @property
    def line(self) -> Line | None: ...

    @property
    def patience(self) -> float | None:
        """Seconds after which the client's settings call an answer late."""


def wire_for(redis: Redis | RedisCluster) -> LineWire:
    return ClusterWire(redis) if isinstance(redis, RedisCluster) else SingleWire(redis)


class Line(asyncio.Protocol):
    """A connection that is open: questions go out as they come, answers come in the same order."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=_refusal, notEnoughData=_NOT_ALL
        )
        self._questions: deque[tuple[int, list[Any], Done]] = deque()
        self.is_open = not transport.is_closing()
        transport.set_protocol(self)

    def ask(self, commands: Sequence[Command], done: Done) -> None:
        """Send commands; `done` is called once, from the event loop or from `close`."""
        packed = b"".join([hiredis.pack_command(command) for command in commands])
        self._questions.append((len(commands), [], done))
        self._transport.write(packed)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while self._questions:
                count, replies, done = self._questions[0]
                while len(replies) < count:
                    reply = self._reader.gets()
                    if reply is _NOT_ALL:
                        return
                    if not isinstance(reply, hiredis.PushNotification):
                        replies.append(reply)
                self._questions.popleft()
                done(replies)
        except RedisError as error:  # this is no RESP
            self.close(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.close(error or RedisConnectionError("Redis closed the connection"))

    def close(self, error: Exception) -> None:
        """Drop the connection. Those who wait get `error`, the last one first."""
        self.is_open = False
        self._transport.abort()
        while self._questions:
            self._questions.pop()[2](error)


class SingleWire:
    """One connection, to a server alone or to the one that Sentinel names."""

    one_key = False

    def __init__(self, redis: Redis) -> None:
        self._pool = redis.connection_pool
        self._connection: AbstractConnection | None = None
        self._line: Line | None = None
        self.patience: float | None = None

    @property
    def line(self) -> Line | None:
        line = self._line
        return line if line is not None and line.is_open else None

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        try:
            line = self.line or await self._connect()
            answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            line.ask(commands, lambda outcome: _settle(answer, outcome))
            async with asyncio.timeout(self.patience):
                replies = await answer
        except BaseException:
            await self.hang_up()
            raise
        if any(isinstance(reply, ResponseError) and "READONLY" in str(reply) for reply in replies):
            await self.hang_up()  # Sentinel may know of another master by now
        return replies

    async def _connect(self) -> Line:
        await self.hang_up()
        connection = self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        connection.retry = Retry(NoBackoff(), 0)  # who asks has a deadline, and tries again by itself
        await connection.connect()
        for other in [other for other, loop in list(_open.items()) if loop.is_closed()]:
            _open.pop(other, None)
        _open[connection] = asyncio.get_running_loop()
        self.patience = connection.socket_timeout
        self._line = Line(connection._writer.transport)
        return self._line

    async def hang_up(self) -> None:
        connection, self._connection = self._connection, None
        line, self._line = self._line, None
        if line is not None:
            line.close(RedisConnectionError("the connection was dropped"))
        if connection is not None:
            _open.pop(connection, None)
            await connection.disconnect(nowait=True)


def _settle(answer: asyncio.Future[list[Any]], outcome: list[Any] | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _refusal(text: str) -> ResponseError:
    return NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)


class ClusterWire:
    """A Cluster: redis-py finds the node of each key, and follows it when it moves."""

    one_key = True
    line = patience = None

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        replies = await asyncio.gather(*(self._ask_one(command) for command in commands))
        return list(replies)

    async def _ask_one(self, command: Command) -> Any:
        try:
            return await self._redis.execute_command(*command, **{NEVER_DECODE: True})
        except ResponseError as error:
            return error

    async def hang_up(self) -> None:
        """Keep the client: it belongs to the storage, and mends its connections by itself."""


async def run_script(ask: Callable[[bool], Awaitable[list[Any]]]) -> list[Any]:
    """Run a script, by its text if Redis does not have it: a new server, or one after SCRIPT FLUSH."""
    (reply,) = await ask(False)
    if isinstance(reply, NoScriptError):
        (reply,) = await ask(True)
    if isinstance(reply, Exception):
        raise reply
    return cast("list[Any]", reply)


def is_passing(error: BaseException) -> bool:
    """Say whether the same question may get an answer a little later."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    if isinstance(error, RedisConnectionError | RedisTimeoutError | InvalidResponse | OSError | TimeoutError):
        return True
    # A script's error carries that of the command in its text. READONLY: a master became a replica.
    words = ("READONLY", "MASTERDOWN", "LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "UNBLOCKED")
    return isinstance(error, RedisError) and any(word in str(error) for word in words)
