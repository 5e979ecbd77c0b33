"""Commands to Redis and replies from it, over redis-py's connections. Knows no queue and no storage.

Each wire has a connection of its own, made as the client's pool makes them (TLS, Sentinel, unix sockets,
passwords), and speaks on it alone: a reply can only be that of the last question. Whenever a question
does not end well, by an error, a timeout or a cancellation, the connection is dropped with what was in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fsm_storage.backends.writing import Command


class Wire(Protocol):
    """Asks Redis. `one_key`: each command may have the keys of one Cluster slot only."""

    one_key: bool

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Return a reply for each command; where Redis refused it, the error. Raises when the line breaks."""
        ...

    async def hang_up(self) -> None:
        """Let go of the connection."""
        ...


def wire_for(redis: Redis | RedisCluster) -> Wire:
    return ClusterWire(redis) if isinstance(redis, RedisCluster) else SingleWire(redis)


class SingleWire:
    """One connection, to a server alone or to the one that Sentinel names."""

    one_key = False

    def __init__(self, redis: Redis) -> None:
        self._pool = redis.connection_pool
        self._connection: AbstractConnection | None = None

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            connection.retry = Retry(NoBackoff(), 0)  # who asks has a deadline, and tries again by itself
        try:
            if not connection.is_connected:
                await connection.connect()
            await connection.send_packed_command(_packed(commands))
            return [await _reply(connection) for _ in commands]
        except BaseException:
            await self.hang_up()
            raise

    async def hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _packed(commands: Sequence[Command]) -> bytes:
    """Return commands as they go to Redis. redis-py's own packing takes three times as long for many arguments."""
    pieces: list[bytes] = []
    for command in commands:
        pieces.append(b"*%d\r\n" % len(command))
        for argument in command:
            data = argument if isinstance(argument, bytes) else str(argument).encode()
            pieces.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(pieces)


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class ClusterWire:
    """A Cluster: redis-py finds the node of each key, and follows it when it moves."""

    one_key = True

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
    if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError | TimeoutError):
        return True
    # A script's error carries that of the command in its text. READONLY: a master became a replica.
    words = ("READONLY", "MASTERDOWN", "LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "UNBLOCKED")
    return isinstance(error, RedisError) and any(word in str(error) for word in words)
