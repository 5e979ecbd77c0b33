"""Operations of one event loop on their way to Redis, many at a time. Knows neither keys nor values.

There is no delay: an operation goes as soon as the loop has run what it was running, with all that were
submitted meanwhile. While one batch is on its way, the next one gathers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Any, Generic, TypeVar

from fsm_storage.backends.wire import Wire, is_passing
from fsm_storage.batching import Lane
from fsm_storage.exceptions import RedisUnavailable, StorageClosed, StorageTimeout

Op = TypeVar("Op")

logger = logging.getLogger("fsm_storage")

_LONGEST_PAUSE = 0.5


class Pipeline(Generic[Op]):
    """Carries operations out in batches, in their order, one batch at a time.

    `carry_out(wire, operations)` returns a reply for each, an exception where one failed alone, and
    raises where all did; it may be called again with the same operations. `size(operation)` is in bytes.
    A batch that Redis did not take for a passing reason (it is away, it is loading, it has become a
    replica) is sent again, until nobody waits for it any more.
    """

    def __init__(
        self,
        wire: Wire,
        carry_out: Callable[[Wire, Sequence[Op]], Awaitable[Sequence[Any]]],
        *,
        alias: str,
        timeout: float,
        max_pending: int,
        batch_size: int,
        batch_bytes: int,
        size: Callable[[Op], int],
    ) -> None:
        self._wire, self._carry_out, self._size = wire, carry_out, size
        self._alias, self._timeout, self._max_pending = alias, timeout, max_pending
        self._batch_size, self._batch_bytes = batch_size, batch_bytes
        self._lane = Lane(asyncio.get_running_loop(), self._give_up)
        self._queue: deque[tuple[Op, asyncio.Future[Any]]] = deque()
        self._room: deque[asyncio.Future[None]] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._trouble: BaseException | None = None
        self.closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._lane.loop

    def submit(self, op: Op, deadline: float | None = None) -> Awaitable[Any]:
        """Return what to await for the reply to `op`, or for the error that it met.

        Raises `RedisUnavailable` or `StorageTimeout` at the deadline (by `time.monotonic`), `StorageClosed`
        after `close()`. A cancelled caller stops waiting: its operation is left out if it still waits
        itself, else it is carried out whole.
        """
        if deadline is None:
            deadline = time.monotonic() + self._timeout
        if len(self._queue) >= self._max_pending:
            return self._submit_later(op, deadline)
        return self._submit_now(op, deadline)

    def _submit_now(self, op: Op, deadline: float) -> asyncio.Future[Any]:
        if self.closed:
            raise StorageClosed
        future = self._lane.expect(deadline)
        self._queue.append((op, future))
        if self._wake is not None:
            _set_done(self._wake)
        elif self._worker is None or self._worker.done():
            # In an empty context, or it would keep that of the first caller alive.
            self._worker = self.loop.create_task(
                self._run(), name=f"fsm_storage {self._alias}", context=Context()
            )
        return future

    async def _submit_later(self, op: Op, deadline: float) -> Any:
        while len(self._queue) >= self._max_pending and not self.closed:
            room: asyncio.Future[None] = self.loop.create_future()
            self._room.append(room)
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await room
            except TimeoutError:
                self._pass_on(room)
                reason = f"{self._max_pending} operations are waiting already"
                raise StorageTimeout(self._timeout, reason) from self._trouble
            except asyncio.CancelledError:
                self._pass_on(room)
                raise
        return await self._submit_now(op, deadline)

    def _pass_on(self, room: asyncio.Future[None]) -> None:
        """Leave the line; a turn that had come already goes to the next one."""
        if room in self._room:
            self._room.remove(room)
        else:
            self._make_room(1)

    def _make_room(self, count: int) -> None:
        while count > 0 and self._room:
            _set_done(self._room.popleft())
            count -= 1

    async def close(self) -> None:
        """Refuse what comes later, finish what was accepted for as long as the timeout, and hang up."""
        worker = self.shut()
        if worker is not None:
            _, late = await asyncio.wait([worker], timeout=self._timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def shut(self) -> asyncio.Task[None] | None:
        """Refuse what comes later; return the task that finishes and hangs up, if there is one."""
        self.closed = True
        self._make_room(len(self._room))
        if self._wake is not None:
            _set_done(self._wake)
        return None if self._worker is None or self._worker.done() else self._worker

    async def _run(self) -> None:
        batch: list[tuple[Op, asyncio.Future[Any]]] = []
        try:
            while True:
                if not self._queue:
                    if self.closed:
                        return
                    self._wake = self.loop.create_future()
                    await self._wake
                    self._wake = None
                    continue
                batch = self._take()
                if self._room:
                    self._make_room(self._max_pending - len(self._queue))
                await self._answer(batch)
        except asyncio.CancelledError:  # the loop is ending, or `close` has waited long enough
            for _, future in [*batch, *self._queue]:
                future.cancel()
            self._queue.clear()
            raise
        finally:
            self._wake = None
            await self._wire.hang_up()

    def _take(self) -> list[tuple[Op, asyncio.Future[Any]]]:
        batch: list[tuple[Op, asyncio.Future[Any]]] = []
        queue, room, space = self._queue, self._batch_size, self._batch_bytes
        while queue and room > 0 and space > 0:
            item = queue.popleft()
            if item[1].done():  # nobody waits for it any more, and nothing has been done
                continue
            batch.append(item)
            room -= 1
            space -= self._size(item[0])
        return batch

    async def _answer(self, batch: list[tuple[Op, asyncio.Future[Any]]]) -> None:
        failures = 0
        while batch:
            replies: Sequence[Any]
            try:
                async with asyncio.timeout(self._timeout):
                    replies = await self._carry_out(self._wire, [op for op, _ in batch])
                self._trouble = None
            except Exception as error:
                if is_passing(error):
                    self._trouble = error
                    await self._pause(failures)
                    failures += 1
                    batch = [item for item in batch if not item[1].done()]
                    continue
                logger.debug("a batch of %d operations failed as a whole", len(batch), exc_info=error)
                replies = [_refused(self._alias, error) for _ in batch]
            self._lane.deliver([(future, reply) for (_, future), reply in zip(batch, replies, strict=True)])
            return

    async def _pause(self, failures: int) -> None:
        """Wait before the next try; not at the first failure, which is most often an idle connection's end."""
        await self._wire.hang_up()
        if failures:
            longest = min(0.01 * 2**failures, _LONGEST_PAUSE)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    def _give_up(self) -> Exception:
        if self._trouble is not None:
            return _refused(self._alias, self._trouble)
        return StorageTimeout(self._timeout, "Redis is busy or away; a write may still be carried out")


def _refused(alias: str, cause: BaseException) -> RedisUnavailable:
    error = RedisUnavailable(alias, cause)
    error.__cause__ = cause
    return error


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
