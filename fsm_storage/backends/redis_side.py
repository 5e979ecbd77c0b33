"""What one event loop has of a `RedisStorage`: its way to Redis for reads, writes and merges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from fsm_storage.backends.merging import Merger
from fsm_storage.backends.pipeline import Pipeline
from fsm_storage.backends.wire import Wire, is_passing, run_script, wire_for
from fsm_storage.backends.writing import (
    BATCH_BYTES,
    BATCH_SIZE,
    LOST,
    READ,
    READ_IN_SCRIPT,
    Command,
    Outbox,
    Write,
    write_command,
)
from fsm_storage.codec import WireCodec
from fsm_storage.exceptions import CorruptData, LeaseLost, RedisUnavailable
from fsm_storage.outbox import DATA, Part
from fsm_storage.patches import KEEP

_MEASURE_SECONDS = 0.5


class Side:
    """Two pipelines with a connection each, and the merges of one event loop.

    Reads have their own, so that they need not wait for a batch of writes.
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        codec: WireCodec,
        outbox: Outbox | None,
        alias: str,
        limits: tuple[float, int, int],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        timeout, max_pending, outbox_bytes = limits
        self._alias, self._outbox, self._outbox_bytes = alias, outbox, outbox_bytes
        self._measure_at, self._sent = 0.0, 0
        self.reads: Pipeline[tuple[str, Part]] = Pipeline(
            wire_for(redis), self._read, alias=alias, timeout=timeout, max_pending=max_pending,
            batch_size=BATCH_SIZE, batch_bytes=BATCH_SIZE, size=lambda _: 0,
        )  # fmt: skip
        self.writes: Pipeline[Write] = Pipeline(
            wire_for(redis), self._carry_out, alias=alias, timeout=timeout, max_pending=max_pending,
            batch_size=BATCH_SIZE, batch_bytes=BATCH_BYTES, size=_size,
        )  # fmt: skip
        self.merger = Merger(self, codec, timeout)

    def read(self, name: str, deadline: float) -> Awaitable[Any]:
        return self.reads.submit((name, DATA), deadline)

    def write(self, write: Write, deadline: float) -> Awaitable[Any]:
        return self.writes.submit(write, deadline)

    async def close(self) -> None:
        await asyncio.gather(self.reads.close(), self.writes.close())

    def shut(self) -> None:
        self.reads.shut()
        self.writes.shut()

    async def _read(self, wire: Wire, reads: Sequence[tuple[str, Part]]) -> Sequence[Any]:
        names = [name for name, _ in reads]
        replies: Sequence[Any]
        if wire.one_key or len(reads) < READ_IN_SCRIPT:
            replies = await wire.ask([("GET", name) for name in names])
        else:
            replies = await run_script(lambda whole: wire.ask([READ.command(names, whole=whole)]))
        return self._sorted_out(reads, replies)

    async def _carry_out(self, wire: Wire, writes: Sequence[Write]) -> Sequence[Any]:
        replies: Sequence[Any]
        if wire.one_key:  # each node has scripts of its own: with the text, nothing need be known of them
            answers = await wire.ask([write_command([write], None, whole=True) for write in writes])
            replies = [answer if isinstance(answer, Exception) else answer[0] for answer in answers]
        else:
            replies = await run_script(
                lambda whole: self._ask(wire, write_command(writes, self._outbox, whole=whole))
            )
            self._sent += sum(map(_size, writes))
        replies = self._sorted_out([(write.name, write.record.part) for write in writes], replies)
        if LOST not in replies:
            return replies
        return [
            LeaseLost(write.fence.key) if reply == LOST and write.fence is not None else reply
            for write, reply in zip(writes, replies, strict=True)
        ]

    def _sorted_out(self, keys: Sequence[tuple[str, Part]], replies: Sequence[Any]) -> Sequence[Any]:
        """Turn refusals into errors that name the key; raise one that the whole batch should be sent again for."""
        if not any(isinstance(reply, Exception) for reply in replies):
            return replies
        for reply in replies:
            if isinstance(reply, Exception) and is_passing(reply):
                raise reply
        return [
            _refusal(self._alias, key, reply) if isinstance(reply, Exception) else reply
            for key, reply in zip(keys, replies, strict=True)
        ]

    async def _ask(self, wire: Wire, command: Command) -> list[Any]:
        """Ask, and now and then, or after many bytes, also how large the outbox has become."""
        outbox, now = self._outbox, time.monotonic()
        if outbox is None or (now < self._measure_at and self._sent < self._outbox_bytes // 64):
            return await wire.ask([command])
        self._measure_at, self._sent = now + _MEASURE_SECONDS, 0
        reply, used = await wire.ask([command, ("MEMORY", "USAGE", outbox.stream)])
        # None: there is no outbox yet. An error: this Redis does not tell, and there is no limit.
        self._outbox = outbox._replace(is_full=isinstance(used, int) and used >= self._outbox_bytes)
        return [reply]


def _refusal(alias: str, key: tuple[str, Part], cause: Exception) -> Exception:
    name, part = key
    error: Exception
    if "WRONGTYPE" in str(cause):
        error = CorruptData(name, "the Redis key holds another type than a string", part)
    else:
        error = RedisUnavailable(alias, cause)
    error.__cause__ = cause
    return error


def _size(write: Write) -> int:
    """Return about how many bytes `write` is on its way."""
    record, expected = write.record, write.expected
    size = len(record.value) + 100 if record.value else 100
    return size if expected is None or expected is KEEP else size + len(expected)
