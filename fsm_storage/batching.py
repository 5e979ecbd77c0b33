"""The one seam between event loops and a database thread. Knows no SQL.

Operations of all event loops of the process go into one queue. A thread takes what is there, up
to a limit, hands it to `commit` and sends the replies back. There is no delay: while the thread
is busy, operations gather by themselves, and the next batch takes them all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar

from fsm_storage.backlog import Backlog, Item
from fsm_storage.exceptions import StorageClosed, StorageTimeout
from fsm_storage.lanes import Asked, Lane, call, set_done

Op = TypeVar("Op")
Reply = TypeVar("Reply")

logger = logging.getLogger("fsm_storage")

IDLE_SECONDS = 30.0
"""The thread ends, and its connection with it, when nothing came for so long."""


class Again(Enum):
    """The type of `AGAIN`."""

    AGAIN = "again"


AGAIN: Final = Again.AGAIN
"""The reply of `commit` for an operation that found its row locked: ask again a little later."""

Replies = Sequence[Reply | BaseException | Literal[Again.AGAIN]]
Done = Callable[[Replies[Reply] | None], None]
Drive = Callable[[Sequence[Op], Done[Reply]], bool]


_running_loop, _now = asyncio.get_running_loop, time.monotonic

_Part = TypeVar("_Part", bound=tuple[Any, ...])


class Batcher(Generic[Op, Reply]):
    """Groups the operations of any number of event loops and threads into batches.

    `commit(operations, deadline)` runs in the batcher's thread and returns one reply for each:
    a value, an exception, or `AGAIN`. `deadline` (monotonic) is when its last caller gives up.
    The operations are all of one type. Those of a batch that are of the type `first` come first, and
    their replies are sent off before the others are begun: their callers go on meanwhile.
    `drive(operations, done)` is asked first, on the event loop's own thread, with what came in one turn of the loop:
    whether it begins to answer them. Then it calls `done`, at once or later, with the replies, as `commit` returns
    them, or with None if the thread shall do it. It never raises, and does not hold the loop.
    `key(operation)` is what at most one operation of a batch may have; None never collides.
    `after()` runs in the thread when a batch is answered; it never raises.
    `release()` runs in the thread before it ends; `name` is the thread's; `server` is who may not answer.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Op], float], Replies[Reply]],
        *,
        key: Callable[[Op], Hashable | None],
        release: Callable[[], None],
        name: str,
        timeout: float,
        max_pending: int,
        batch_size: int,
        first: type | None = None,
        drive: Drive[Op, Reply] | None = None,
        after: Callable[[], None] | None = None,
        server: str = "database",
    ) -> None:
        self._server, self._first = server, first
        self._commit, self._key, self._release, self._name = commit, key, release, name
        self._drive, self._after = drive, after
        self._timeout, self._max_pending, self._batch_size = timeout, max_pending, batch_size
        self.closed = False
        self._start()
        _batchers.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._backlog = Backlog(
            self._key, timeout=self._timeout, max_pending=self._max_pending, batch_size=self._batch_size
        )
        self._driven_at = 0.0
        self._lanes: dict[asyncio.AbstractEventLoop, Lane] = {}
        self._thread: threading.Thread | None = None

    def submit(self, op: Op) -> Awaitable[Reply]:
        """Return what to await for the reply to `op`, or for the error that it met.

        Raises `StorageTimeout` when there is none within the timeout, `StorageClosed` after
        `close()`. A cancelled caller stops waiting: its operation is left out if it still waits
        itself, else it is carried out whole, because nobody could say whether it was taken back.

        No coroutine of its own: one less for each operation that waits is a tenth of its cost.
        """
        lane = self._lanes.get(_running_loop()) or self._add_lane()
        deadline = _now() + self._timeout
        if self._backlog.size() >= self._max_pending:
            return self._submit_later(op, lane, deadline)
        return self._submit_now(op, lane, deadline)

    def ask(self, op: Op) -> Awaitable[Reply]:
        """Do what `submit` does, but let the loop's own connection answer, if there is one.

        The operation is begun in the next turn of the loop; where there is none any more, it is left out.
        """
        lane = self._lanes.get(_running_loop()) or self._add_lane()
        if self._drive is None or self._backlog.size() + len(lane.asked) >= self._max_pending:
            return self.submit(op)
        if self.closed:
            raise StorageClosed
        future: asyncio.Future[Reply] = lane.new_future()
        if lane.driven:  # which may take its time
            lane.wait_for(future, _now() + self._timeout)
        elif not lane.asked:
            lane.loop.call_soon(self._hand_over, lane)
        lane.asked.append((op, future))
        return future

    def _submit_now(self, op: Op, lane: Lane, deadline: float) -> asyncio.Future[Reply]:
        if self.closed:
            raise StorageClosed
        future = lane.expect(deadline)
        self._backlog.put((op, lane, future, deadline))
        if self._thread is None:
            self._start_thread()
        return future

    async def _submit_later(self, op: Op, lane: Lane, deadline: float) -> Reply:
        while self._backlog.size() >= self._max_pending and not self.closed:
            await self._backlog.wait_for_room(lane, deadline)
        return await self._submit_now(op, lane, deadline)

    async def close(self) -> None:
        """Finish what was accepted, for as long as the timeout, and refuse what comes later."""
        deadline = _now() + self._timeout
        self.shut()
        await self.settle()
        thread = self.shut()  # it may have been started meanwhile
        if thread is not None:
            left = max(0.0, deadline - _now())
            await asyncio.get_running_loop().run_in_executor(None, thread.join, left)

    def shut(self) -> threading.Thread | None:
        """Refuse what comes later; return the thread that is finishing, if there is one."""
        with suppress(
            RuntimeError
        ):  # no event loop here; another one's operations go to the thread, which comes back
            self._hand_over_all(self._lanes.get(_running_loop()))
        with self._lock:
            if not self.closed:
                self.closed = True
                self._backlog.end()
            return self._thread

    def _hand_over(self, lane: Lane) -> None:
        """Answer what came in this turn of the loop; what has the key of another one is for the next turn."""
        if lane.driven:  # it is for when that is done
            return
        asked, lane.asked = lane.asked, []
        batch: dict[Hashable, Asked] = {}
        for item in asked:
            if item[1].done():  # its caller was cancelled, and nothing has been done
                continue
            key = self._key(item[0])
            if len(batch) >= self._batch_size or (key is not None and key in batch):
                lane.asked.append(item)
            else:
                batch[id(item) if key is None else key] = item
        for part in self._parts(list(batch.values())):
            self._hand_over_part(part, lane)
        if lane.asked and not lane.driven:
            lane.loop.call_soon(self._hand_over, lane)
        elif lane.asked:  # behind what may take its time
            deadline = _now() + self._timeout
            for _, future in lane.asked:
                lane.wait_for(future, deadline)

    def _hand_over_part(self, part: list[Asked], lane: Lane) -> None:
        """Let the loop's own connection answer, or else the thread."""
        is_late = is_done = False

        def done(replies: Replies[Reply] | None) -> None:
            nonlocal is_done
            is_done = True
            lane.driven -= 1
            if lane.at_rest is not None and not lane.driven:
                set_done(lane.at_rest)
            if replies is None:
                self._queue_up(part, lane)
            else:
                self._deliver(part, replies, lane)
            if is_late and lane.asked:
                self._hand_over(lane)

        lane.driven += 1
        try:
            is_begun = self._drive is not None and self._drive([op for op, _ in part], done)
        except Exception:  # a fault of ours: its callers must not wait for ever
            logger.exception("a batch of %d operations could not be begun", len(part))
            is_begun = is_done
        if not is_begun:
            lane.driven -= 1
            self._queue_up(part, lane)
            return
        self._driven_at = now = _now()
        if lane.driven:
            is_late = True
            deadline = now + self._timeout
            for _, future in part:
                lane.wait_for(future, deadline)

    def _deliver(self, part: list[Asked], replies: Replies[Reply], lane: Lane) -> None:
        letters: list[tuple[asyncio.Future[Any], Any]] = []
        again: list[Asked] = []
        for item, reply in zip(part, replies, strict=True):
            if reply is AGAIN:
                again.append(item)
            else:
                letters.append((item[1], reply))
        lane.deliver(letters)
        self._queue_up(again, lane)

    def _queue_up(self, asked: list[Asked], lane: Lane) -> None:
        """Leave it to the thread."""
        deadline = _now() + self._timeout
        for op, future in asked:
            if future.done():
                continue
            self._backlog.put((op, lane, future, lane.wait_for(future, deadline)))
        if asked and self._thread is None:  # also after `close()`: it was accepted before
            self._start_thread()

    def _hand_over_all(self, lane: Lane | None) -> None:
        while lane is not None and lane.asked and not lane.driven:
            self._hand_over(lane)
        if lane is not None:
            asked, lane.asked = lane.asked, []
            self._queue_up(asked, lane)

    async def settle(self) -> None:
        """Wait, for as long as the timeout, for what the loop's own connection is at."""
        lane = self._lanes.get(_running_loop())
        if lane is not None and lane.driven:
            if lane.at_rest is None or lane.at_rest.done():
                lane.at_rest = lane.new_future()
            await asyncio.wait([lane.at_rest], timeout=self._timeout)

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _add_lane(self) -> Lane:
        loop = asyncio.get_running_loop()
        with self._lock:
            # Short-lived loops (async_to_sync) leave their lanes behind.
            for old in [old for old in self._lanes if old.is_closed()]:
                del self._lanes[old]
            return self._lanes.setdefault(loop, Lane(loop, self._give_up))

    def _give_up(self) -> StorageTimeout:
        reason = f"the {self._server} is busy or away; a write may still be carried out"
        return StorageTimeout(self._timeout, reason)

    # From here on: the batcher's thread.

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                for part in self._parts(batch):
                    self._answer(part)
                if self._after is not None:
                    self._after()
        finally:
            self._release()

    def _take(self) -> list[Item] | None:
        """Return the next batch, maybe an empty one; None when the thread shall end."""
        batch = self._backlog.take(IDLE_SECONDS)
        return batch if batch or not self._backlog.is_empty else self._end_if_idle()

    def _end_if_idle(self) -> list[Item] | None:
        if not self._backlog.is_ending and _now() - self._driven_at < IDLE_SECONDS:
            return []  # the loops' connections would end with the thread
        # In this order: whoever puts something in after the second look has seen that there is no thread.
        with self._lock:
            self._thread = None
            if self._backlog.is_empty:
                return None
            self._thread = threading.current_thread()
            return []

    def _parts(self, batch: list[_Part]) -> list[list[_Part]]:
        """Sort a batch by the type of operation, which each item begins with."""
        parts: dict[type, list[_Part]] = {}
        for item in batch:
            kind = type(item[0])
            if kind in parts:
                parts[kind].append(item)
            else:
                parts[kind] = [item]
        first = parts.pop(self._first, None) if self._first else None
        return [first, *parts.values()] if first else list(parts.values())

    def _answer(self, batch: list[Item]) -> None:
        replies: Replies[Reply]
        try:
            replies = self._commit([item[0] for item in batch], max([item[3] for item in batch]))
        except BaseException as error:  # a fault of ours: its callers must not wait for ever
            logger.exception("a batch of %d operations failed as a whole", len(batch))
            replies = [error] * len(batch)
        mail: dict[Lane, list[tuple[asyncio.Future[Any], Any]]] = {}
        for item, reply in zip(batch, replies, strict=True):
            _, lane, future, _ = item
            if reply is AGAIN:
                self._backlog.put_off(item)
                continue
            letters = mail.get(lane)
            if letters is None:
                letters = mail[lane] = []
            letters.append((future, reply))
            self._backlog.forget(future)
        for lane, letters in mail.items():
            call(lane, lane.deliver, letters)


_batchers: weakref.WeakSet[Batcher[Any, Any]] = weakref.WeakSet()


def _start_anew() -> None:
    """In the child of a fork: it has neither the threads nor the loops that wait for them."""
    for batcher in list(_batchers):
        batcher._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
