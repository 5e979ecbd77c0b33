"""What one event loop has of a `RedisStorage`: its way to Redis for reads, writes and merges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from fsm_storage.backends.merging import Merger
from fsm_storage.backends.pipeline import Pipeline
from fsm_storage.backends.wire import is_passing, wire_for
from fsm_storage.backends.writing import (
    BATCH_BYTES,
    BATCH_SIZE,
    DONE,
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

MEASURE_SECONDS: Final = 0.5


class Reads:
    """Reads, each of one part, in Redis's words."""

    def __init__(self, alias: str, *, one_key: bool) -> None:
        self._alias, self._one_key = alias, one_key

    def size(self, read: tuple[str, Part]) -> int:
        return 0

    def commands(self, reads: Sequence[tuple[str, Part]], *, whole: bool = False) -> list[Command]:
        if self._is_script(reads):
            return [READ.command([name for name, _ in reads], whole=whole)]
        return [("GET", name) for name, _ in reads]

    def conclude(self, reads: Sequence[tuple[str, Part]], replies: Sequence[Any]) -> Sequence[Any]:
        if self._is_script(reads):
            replies = _of_script(replies[0])
        return _sorted_out(self._alias, reads, replies)

    def _is_script(self, reads: Sequence[tuple[str, Part]]) -> bool:
        return len(reads) >= READ_IN_SCRIPT and not self._one_key


class Writes:
    """Writes with their outbox entry, in Redis's words. Now and then it asks how large the outbox has become."""

    def __init__(self, alias: str, outbox: Outbox | None, outbox_bytes: int, *, one_key: bool) -> None:
        self._alias, self._outbox, self._outbox_bytes, self._one_key = alias, outbox, outbox_bytes, one_key
        self._measure_at, self._unmeasured = 0.0, 0

    def size(self, write: Write) -> int:
        record, expected = write.record, write.expected
        size = len(record.value) + 100 if record.value else 100
        return size if expected is None or expected is KEEP else size + len(expected)

    def commands(self, writes: Sequence[Write], *, whole: bool = False) -> list[Command]:
        if self._one_key:  # each node has scripts of its own: with the text, nothing need be known of them
            return [write_command([write], None, whole=True) for write in writes]
        command = write_command(writes, self._outbox, whole=whole)
        if self._outbox is None:
            return [command]
        now = time.monotonic()
        self._unmeasured += sum(map(self.size, writes))
        if now < self._measure_at and self._unmeasured < self._outbox_bytes // 64:
            return [command]
        self._measure_at, self._unmeasured = now + MEASURE_SECONDS, 0
        return [command, ("MEMORY", "USAGE", self._outbox.stream)]

    def conclude(self, writes: Sequence[Write], replies: Sequence[Any]) -> Sequence[Any]:
        if self._one_key:
            replies = [reply if isinstance(reply, Exception) else reply[0] for reply in replies]
        else:
            if len(replies) > 1 and self._outbox is not None:
                used = replies[1]
                # None: there is no outbox yet. An error: this Redis does not tell, and there is no limit.
                is_full = isinstance(used, int) and used >= self._outbox_bytes
                self._outbox = self._outbox._replace(is_full=is_full)
            replies = _of_script(replies[0])
        if replies.count(DONE) == len(replies):
            return replies
        replies = _sorted_out(self._alias, [(write.name, write.record.part) for write in writes], replies)
        return [
            LeaseLost(write.fence.key) if reply == LOST and write.fence is not None else reply
            for write, reply in zip(writes, replies, strict=True)
        ]


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
        wires = wire_for(redis), wire_for(redis)
        one_key = wires[0].one_key
        self.reads: Pipeline[tuple[str, Part]] = Pipeline(
            wires[0], Reads(alias, one_key=one_key), alias=alias, timeout=timeout, max_pending=max_pending,
            batch_size=BATCH_SIZE, batch_bytes=BATCH_SIZE,
        )  # fmt: skip
        self.writes: Pipeline[Write] = Pipeline(
            wires[1], Writes(alias, outbox, outbox_bytes, one_key=one_key), alias=alias, timeout=timeout,
            max_pending=max_pending, batch_size=BATCH_SIZE, batch_bytes=BATCH_BYTES,
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


def _of_script(reply: Any) -> Sequence[Any]:
    if isinstance(reply, Exception):
        raise reply
    found: Sequence[Any] = reply
    return found


def _sorted_out(alias: str, keys: Sequence[tuple[str, Part]], replies: Sequence[Any]) -> Sequence[Any]:
    """Turn refusals into errors that name the key; raise one that the whole batch should be sent again for."""
    if not any(isinstance(reply, Exception) for reply in replies):
        return replies
    for reply in replies:
        if isinstance(reply, Exception) and is_passing(reply):
            raise reply
    return [
        _refusal(alias, key, reply) if isinstance(reply, Exception) else reply
        for key, reply in zip(keys, replies, strict=True)
    ]


def _refusal(alias: str, key: tuple[str, Part], cause: Exception) -> Exception:
    name, part = key
    error: Exception
    if "WRONGTYPE" in str(cause):
        error = CorruptData(name, "the Redis key holds another type than a string", part)
    else:
        error = RedisUnavailable(alias, cause)
    error.__cause__ = cause
    return error
