"""Operations of one event loop on their way to Redis, many at a time. Knows neither keys nor values.

There is no delay: an operation goes as soon as the loop has run what it was running, with all that were
submitted meanwhile. While one batch is on its way, the next one gathers.

There are two ways. The short one is taken while the connection stands: a batch goes from one callback of
the event loop, and its replies come in another; a task would take as long again for a lone operation. The
long one, a task, connects, sends again what Redis did not take, and hangs up in the end.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fsm_storage.backends.wire import LineWire, is_passing
from fsm_storage.backends.writing import Command
from fsm_storage.exceptions import RedisUnavailable, StorageClosed, StorageTimeout
from fsm_storage.lanes import Lane, set_done

Op = TypeVar("Op")
_Op = TypeVar("_Op", contravariant=True)

logger = logging.getLogger("fsm_storage")

_LONGEST_PAUSE = 0.5


class Work(Protocol[_Op]):
    """What operations are in Redis's words."""

    def size(self, op: _Op) -> int:
        """Return about how many bytes `op` is."""
        ...

    def commands(self, ops: Sequence[_Op], *, whole: bool = False) -> list[Command]:
        """Return the commands for a batch. `whole`: with the text of the script. May be asked again."""
        ...

    def conclude(self, ops: Sequence[_Op], replies: Sequence[Any]) -> Sequence[Any]:
        """Return a reply for each operation, an exception where one failed alone; raises where all did."""
        ...


class _Batch(Generic[Op]):
    """Operations that go together, and who waits for them."""

    __slots__ = ("futures", "ops", "sent_at")

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.futures: list[asyncio.Future[Any]] = []
        self.sent_at = 0.0


class Pipeline(Generic[Op]):
    """Carries operations out in batches, in their order, one batch at a time.

    A batch that Redis did not take for a passing reason (it is away, it is loading, it has become a
    replica) is sent again, until nobody waits for it any more.
    """

    def __init__(
        self,
        wire: LineWire,
        work: Work[Op],
        *,
        alias: str,
        timeout: float,
        max_pending: int,
        batch_size: int,
        batch_bytes: int,
    ) -> None:
        self._wire, self._work = wire, work
        self._alias, self._timeout, self._max_pending = alias, timeout, max_pending
        self._batch_size, self._batch_bytes = batch_size, batch_bytes
        self._lane = Lane(asyncio.get_running_loop(), self._give_up)
        self._queue: deque[tuple[Op, asyncio.Future[Any]]] = deque()
        self._room: deque[asyncio.Future[None]] = deque()
        self._on_way: _Batch[Op] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_stirring = self._is_mending = False
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
        if not self._is_stirring and self._on_way is None:
            self._is_stirring = True
            self.loop.call_soon(self._stir)
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
            set_done(self._room.popleft())
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
            set_done(self._wake)
        return None if self._worker is None or self._worker.done() else self._worker

    def _take(self) -> _Batch[Op]:
        batch: _Batch[Op] = _Batch()
        queue, size, room, space = self._queue, self._work.size, self._batch_size, self._batch_bytes
        while queue and room > 0 and space > 0:
            op, future = queue.popleft()
            if future.done():  # nobody waits for it any more, and nothing has been done
                continue
            batch.ops.append(op)
            batch.futures.append(future)
            room -= 1
            space -= size(op)
        if self._room:
            self._make_room(self._max_pending - len(queue))
        return batch

    def _settle(self, batch: _Batch[Op], outcome: list[Any] | Exception) -> Exception | None:
        """Hand out what came of the batch on its way.

        If it should be sent again, put it back, in front of what waits, and return why.
        """
        self._on_way = None
        try:
            if isinstance(outcome, Exception):
                raise outcome
            replies = self._work.conclude(batch.ops, outcome)
            self._trouble = None
        except Exception as error:
            if isinstance(error, NoScriptError) or is_passing(error):
                self._queue.extendleft(zip(reversed(batch.ops), reversed(batch.futures), strict=True))
                return error
            logger.debug("a batch of %d operations failed as a whole", len(batch.ops), exc_info=error)
            replies = [RedisUnavailable(self._alias, error) for _ in batch.ops]
        self._lane.deliver(list(zip(batch.futures, replies, strict=True)))
        return None

    # The short way

    def _stir(self) -> None:
        """Send what waits, if nothing is on its way."""
        self._is_stirring = False
        if self._on_way is not None or self._is_mending:  # whose end stirs again
            return
        line = self._wire.line
        if line is None:
            self._call_worker()
            return
        batch = self._take()
        if not batch.ops:
            return
        self._on_way, batch.sent_at = batch, self.loop.time()
        if self._watch is None:
            self._set_watch(self._limit)
        land = partial(self._land, batch)
        try:
            line.ask(self._work.commands(batch.ops), land)
        except Exception as error:  # nothing was sent
            land(error)

    def _land(self, batch: _Batch[Op], outcome: list[Any] | Exception) -> None:
        if batch is not self._on_way:  # the worker was cancelled, and with it those who waited
            return
        error = self._settle(batch, outcome)
        if error is not None or self.closed:
            self._call_worker()
        elif self._queue:
            self._stir()

    @property
    def _limit(self) -> float:
        patience = self._wire.patience
        return self._timeout if patience is None else min(self._timeout, patience)

    def _set_watch(self, seconds: float) -> None:
        self._watch = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Drop the connection if a batch has no answer for too long. One timer serves all."""
        self._watch = None
        if self._on_way is None:
            return
        rest = self._on_way.sent_at + self._limit - self.loop.time()
        if rest > 0:
            self._set_watch(rest)
        elif (line := self._wire.line) is not None:
            line.close(RedisTimeoutError("no answer in time"))

    # The long way

    def _call_worker(self) -> None:
        self._is_mending = True
        if self._wake is not None:
            set_done(self._wake)
        elif self._worker is None or self._worker.done():
            # In an empty context, or it would keep that of the first caller alive.
            self._worker = self.loop.create_task(
                self._run(), name=f"fsm_storage {self._alias}", context=Context()
            )

    async def _run(self) -> None:
        try:
            while True:
                await self._mend()
                if self.closed and not self._queue and self._on_way is None:
                    return
                self._wake = self.loop.create_future()
                await self._wake
                self._wake = None
        except asyncio.CancelledError:  # the loop is ending, or `close` has waited long enough
            waiting = self._on_way.futures if self._on_way is not None else []
            for future in [*waiting, *(future for _, future in self._queue)]:
                future.cancel()
            self._on_way = None
            self._queue.clear()
            raise
        finally:
            self._wake = None
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
            await self._wire.hang_up()

    async def _mend(self) -> None:
        """Carry out what waits, until the short way is open."""
        self._is_mending = True
        failures, whole = 0, False
        while self._queue and self._on_way is None:
            batch = self._take()
            if not batch.ops:
                break
            self._on_way = batch
            error = self._settle(batch, await self._ask(batch, whole=whole))
            whole = isinstance(error, NoScriptError)  # a new server, or one after SCRIPT FLUSH
            if error is None:
                failures = 0
                if self._wire.line is not None:
                    break
            elif not whole:
                self._trouble = error
                await self._pause(failures)
                failures += 1
        self._is_mending = False
        if self._queue:
            self._stir()

    async def _ask(self, batch: _Batch[Op], *, whole: bool) -> list[Any] | Exception:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._wire.ask(self._work.commands(batch.ops, whole=whole))
        except Exception as error:
            return error

    async def _pause(self, failures: int) -> None:
        """Wait before the next try; not at the first failure, which is most often an idle connection's end."""
        await self._wire.hang_up()
        if failures:
            longest = min(0.01 * 2**failures, _LONGEST_PAUSE)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    def _give_up(self) -> Exception:
        if self._trouble is not None:
            return RedisUnavailable(self._alias, self._trouble)
        return StorageTimeout(self._timeout, "Redis is busy or away; a write may still be carried out")
