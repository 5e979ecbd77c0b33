"""What waits for the batcher's thread, and which of it makes the next batch. Knows no SQL."""

from __future__ import annotations

import asyncio
import queue
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from fsm_storage.exceptions import StorageTimeout
from fsm_storage.lanes import Lane, call, set_done

# An operation on its way: itself, who waits for it, until when. A plain tuple, because there are
# tens of thousands in a second.
Item = tuple[Any, Lane, "asyncio.Future[Any]", float]


class Backlog:
    """A bounded queue from any number of event loops to one thread.

    `key(operation)` is what at most one operation of a batch may have; None never collides. What is put off, for
    that or because its row was locked, comes with a later batch. `timeout` is what callers are told of it.
    """

    def __init__(
        self, key: Callable[[Any], Hashable | None], *, timeout: float, max_pending: int, batch_size: int
    ) -> None:
        self._key, self._timeout = key, timeout
        self._max_pending, self._batch_size = max_pending, batch_size
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._room: deque[tuple[Lane, asyncio.Future[None]]] = deque()
        self._put_off: deque[tuple[float, Item]] = deque()
        self._attempts: dict[asyncio.Future[Any], int] = {}
        self.is_ending = False
        """Nothing comes any more, but for what raced with `end`."""
        self.size = self._queue.qsize

    @property
    def is_empty(self) -> bool:
        return self._queue.empty() and not self._put_off

    def put(self, item: Item) -> None:
        """Add an operation, also past the bound: who may have to wait for room asks `size` before."""
        self._queue.put(item)

    def end(self) -> None:
        """Say that nothing comes any more, and let go of all who wait for room."""
        self._queue.put(None)
        self._make_room(len(self._room))

    async def wait_for_room(self, lane: Lane, deadline: float) -> None:
        """Wait until it may be worth another look. Raises `StorageTimeout` at the deadline."""
        room: asyncio.Future[None] = lane.loop.create_future()
        self._room.append((lane, room))
        if self.size() < self._max_pending:  # it was made before this one stood in line
            self._make_room(1)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await room
        except TimeoutError as error:
            self._leave_line(lane, room)
            raise StorageTimeout(
                self._timeout, f"{self._max_pending} operations are waiting already"
            ) from error
        except asyncio.CancelledError:
            self._leave_line(lane, room)
            raise

    def _leave_line(self, lane: Lane, room: asyncio.Future[None]) -> None:
        """Take a waiter out; if it had its turn already, the turn goes to the next one."""
        try:
            self._room.remove((lane, room))
        except ValueError:
            self._make_room(1)

    def _make_room(self, count: int) -> None:
        for _ in range(count):
            try:
                lane, room = self._room.popleft()
            except IndexError:
                return
            call(lane, set_done, room)

    # From here on: the thread.

    def take(self, patience: float) -> list[Item]:
        """Return the next batch; an empty one if nothing came for `patience` seconds, or all that came is put off."""
        batch: dict[Hashable, Item] = {}
        now = time.monotonic()
        for _ in range(len(self._put_off)):
            ready_at, item = self._put_off.popleft()
            if ready_at <= now:
                self._add(batch, item)
            else:
                self._put_off.append((ready_at, item))
        while len(batch) < self._batch_size and len(self._put_off) < self._max_pending:
            try:
                found = self._queue.get_nowait() if batch else self._wait(now, patience)
            except queue.Empty:
                break
            if found is None:
                self.is_ending = True
            else:
                self._add(batch, found)
        if self._room:
            self._make_room(self._max_pending - self.size())
        return list(batch.values())

    def _wait(self, now: float, patience: float) -> Item | None:
        if self._room:  # what was in the queue had been given up, all of it
            self._make_room(self._max_pending - self.size())
        if not self._put_off:
            return self._queue.get_nowait() if self.is_ending else self._queue.get(timeout=patience)
        first = min(ready_at for ready_at, _ in self._put_off)
        return self._queue.get(timeout=max(first - now, 0.0005))

    def _add(self, batch: dict[Hashable, Item], item: Item) -> None:
        if item[2].done():  # nobody waits for it any more, and nothing has been done
            self.forget(item[2])
            return
        key = self._key(item[0])
        if key is None:
            batch[id(item)] = item
        elif key in batch or len(batch) >= self._batch_size:
            self._put_off.append((0.0, item))
        else:
            batch[key] = item

    def put_off(self, item: Item) -> None:
        """Bring it again a little later, each time after a longer while."""
        attempts = self._attempts.get(item[2], 0)
        self._attempts[item[2]] = attempts + 1
        delay = min(0.001 * 2**attempts, 0.05) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
        self._put_off.append((time.monotonic() + delay, item))

    def forget(self, future: asyncio.Future[Any]) -> None:
        """Forget how often an operation was put off: it is answered, or given up."""
        if self._attempts:
            self._attempts.pop(future, None)
