"""`DjangoEventIsolation`: one handler at a time works on a key, over all processes.

Those who wait in one process stand in a line in memory; the first of it takes the lease on the key.
How leases are kept is in `leases`.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Protocol, cast, runtime_checkable

from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey

from fsm_storage.backends.fencing import HOLD
from fsm_storage.conf import storages
from fsm_storage.dialects import Fence
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidStorageError,
    LeaseLost,
    LeaseTimeout,
    StorageClosed,
    StorageTimeout,
)
from fsm_storage.leases import Lease, LeaseKeeper, LeaseTable
from fsm_storage.patches import ttl_seconds

FIRST_PAUSE, LONGEST_PAUSE = 0.004, 0.1
"""Seconds between two looks at a lease that another process has, at first and at the most."""
TURN_SECONDS = 1.0
"""For so long a process hands a lease on in its own line. Then it lets others have a look."""


@runtime_checkable
class LeasingStorage(LeaseTable, Protocol):
    """A storage that keeps leases: `DjangoStorage` in its table, `RedisStorage` in Redis."""

    alias: str
    timeout: float

    @property
    def lease_place(self) -> Hashable | None:
        """Where writes find the leases, equal for storages that write there. None: they cannot."""

    def lease_key(self, key: StorageKey) -> str:
        """Return the text by which the lease on `key` is known."""


class DjangoEventIsolation(BaseEventIsolation):
    """Lets one handler at a time work on a key, in any number of processes on one database, or one Redis.

        Dispatcher(storage=storage, events_isolation=storage.create_isolation())

    - `alias`: the storage whose database or Redis, and whose keys, are used; or `storage`: that storage itself.
    - `lease`: seconds or timedelta: how long a key stays locked after its process died. It is renewed
      while the handler runs, however long.
    - `timeout`: seconds or timedelta: how long a handler may wait for its turn.

    Who waits in one process is served in the order of coming. A handler runs only with the lease:
    entering raises `LeaseTimeout` when the key stays locked, `StorageTimeout` or `StorageUnavailable`
    when the database or Redis does not answer. A waiter that is cancelled leaves nothing behind.

    A handler whose lease could not be renewed in time is cancelled, and the lock raises `LeaseLost`
    when it is left. So does each write through the storage that is made under a lost lease.

    `close()` gives all leases back. Nothing is kept for a key that nobody works on. One object serves
    any number of threads and event loops, also after a fork.
    """

    def __init__(
        self,
        alias: str = "default",
        *,
        lease: timedelta | float = 30.0,
        timeout: timedelta | float = 60.0,
        storage: LeasingStorage | None = None,
    ) -> None:
        self.alias = alias if storage is None else storage.alias
        self.lease, self.timeout = _seconds("lease", lease), _seconds("timeout", timeout)
        self.closed = False
        self._given = storage
        self._places: tuple[LeasingStorage, Lines] | None = None
        self._starting = threading.Lock()

    def lock(self, key: StorageKey) -> AbstractAsyncContextManager[None]:  # type: ignore[override] # more general
        """Return a context in which nobody else works on `key`: see the class."""
        storage, lines = self._open()
        return Lock(storage, lines, storage.lease_key(key))

    async def close(self) -> None:
        """Give all leases back. Who still works under one is cancelled; who waits gets `StorageClosed`."""
        self.closed = True
        if self._places is not None:
            await self._places[1].close()

    def _open(self) -> tuple[LeasingStorage, Lines]:
        """Return the storage and the lines before it. Raises `InvalidStorageError`, `StorageClosed`."""
        if self.closed:
            raise StorageClosed("isolation")
        places = self._places
        if places is None or (self._given is None and places[0].closed):
            with self._starting:
                storage: object = self._given or storages[self.alias]
                if not isinstance(storage, LeasingStorage):
                    name = type(storage).__name__
                    raise InvalidStorageError(
                        "DjangoEventIsolation needs a storage that keeps leases, DjangoStorage or "
                        f"RedisStorage, but {self.alias!r} is a {name}"
                    )
                keeper = LeaseKeeper(storage, self.lease)
                places = self._places = storage, Lines(keeper, self.timeout, storage.timeout)
        return places


class Lines:
    """Those of this process who wait for a key, or work on it: a line for each such key.

    `timeout`: seconds that one may wait in all; `patience`: seconds in which the table answers, or raises.
    """

    def __init__(self, keeper: LeaseKeeper, timeout: float, patience: float) -> None:
        self.keeper, self.timeout, self.patience = keeper, timeout, patience
        self._start()
        _all_lines.add(self)

    def _start(self) -> None:
        self._mutex = threading.Lock()
        self._lines: dict[str, _Line] = {}

    async def enter(self, key: str) -> Lease:
        """Wait for this task's turn in the line, then for the lease."""
        deadline, waiter = time.monotonic() + self.timeout, None
        with self._mutex:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line()
            else:
                waiter = _Waiter()
                line.waiters.append(waiter)
        lease = None if waiter is None else await self._wait(key, waiter, deadline)
        if lease is not None and not lease.is_over():
            return lease
        try:
            if line.pause:
                await asyncio.sleep(line.pause)
                line.pause = 0.0
            return await self._take(key, deadline)
        except BaseException:
            self.leave(key, None)
            raise

    def leave(self, key: str, lease: Lease | None) -> None:
        """Give the turn to the next in line, with the lease if it is fit for that; else give it back."""
        offer = None
        with self._mutex:
            line = self._lines.get(key)
            if line is None:  # in the child of a fork
                return
            if lease is not None and not lease.is_over() and not lease.is_older_than(TURN_SECONDS):
                offer = lease
            elif lease is not None:
                line.pause = LONGEST_PAUSE
            while line.waiters and not line.waiters[0].give(offer, partial(self.leave, key, offer)):
                line.waiters.popleft()
            if line.waiters:
                line.waiters.popleft()
            else:
                del self._lines[key]
                offer = None
        if lease is not None and offer is None:
            self.keeper.release(lease)

    async def close(self) -> None:
        with self._mutex:
            waiters = [waiter for line in self._lines.values() for waiter in line.waiters]
        for waiter in waiters:
            waiter.refuse(StorageClosed("isolation"))
        await self.keeper.close()

    async def _wait(self, key: str, waiter: _Waiter, deadline: float) -> Lease | None:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await waiter.turn
        except BaseException as error:
            if not self._step_out(key, waiter) and waiter.has_turn():
                self.leave(key, waiter.turn.result())
            if isinstance(error, TimeoutError):
                raise LeaseTimeout(key, self.timeout) from None
            raise

    def _step_out(self, key: str, waiter: _Waiter) -> bool:
        """Take a waiter out of its line; False if it has left it for its turn."""
        with self._mutex:
            line = self._lines.get(key)
            if line is None or waiter not in line.waiters:
                return False
            line.waiters.remove(waiter)
            return True

    async def _take(self, key: str, deadline: float) -> Lease:
        """Take the lease, asking again while another process has it."""
        pause, is_known = FIRST_PAUSE, False
        while True:
            left = deadline - time.monotonic()
            ask = self.keeper.acquire(key) if left > self.patience else self._ask(key, left, is_known)
            lease, is_known = await ask, True
            if lease is not None:
                return lease
            left = deadline - time.monotonic()
            if left <= 0:
                raise LeaseTimeout(key, self.timeout)
            await asyncio.sleep(min(pause * random.uniform(0.5, 1.0), left))  # noqa: S311 - jitter
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _ask(self, key: str, left: float, is_known: bool) -> Lease | None:
        """Ask, for the little time that is left. `is_known`: whether the key was locked before."""
        try:
            async with asyncio.timeout(left):
                return await self.keeper.acquire(key)
        except TimeoutError as error:
            if isinstance(error, FSMStorageError):
                raise
            if is_known:
                raise LeaseTimeout(key, self.timeout) from None
            raise StorageTimeout(self.timeout, "it is not known whether the key is free") from None


class _Line:
    """Who waits behind the one whose turn it is."""

    __slots__ = ("pause", "waiters")

    def __init__(self) -> None:
        self.waiters: deque[_Waiter] = deque()
        # Seconds that the next one waits before it asks, so that other processes get to ask.
        self.pause = 0.0


class _Waiter:
    """One who waits, in an event loop that may be another than that of who calls."""

    __slots__ = ("turn",)

    def __init__(self) -> None:
        self.turn: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()

    def has_turn(self) -> bool:
        turn = self.turn
        return turn.done() and not turn.cancelled() and turn.exception() is None

    def give(self, lease: Lease | None, give_up: Callable[[], None]) -> bool:
        """Say that it is its turn; False if it waits no more. If it turns out later: `give_up()`."""
        return not self.turn.done() and self._call(self._set, lease, give_up)

    def _set(self, lease: Lease | None, give_up: Callable[[], None]) -> None:
        if self.turn.done():
            give_up()
        else:
            self.turn.set_result(lease)

    def refuse(self, error: Exception) -> None:
        self._call(self._fail, error)

    def _fail(self, error: Exception) -> None:
        if not self.turn.done():
            self.turn.set_exception(error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> bool:
        try:
            self.turn.get_loop().call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop was closed, and nobody waits there any more
            return False
        return True


class Lock(AbstractAsyncContextManager[None]):
    """One handler's time with a key. Cancels the handler if the lease is lost."""

    __slots__ = (
        "_before",
        "_cancelling",
        "_has_cancelled",
        "_is_left",
        "_lease",
        "_task",
        "key",
        "lines",
        "storage",
    )

    def __init__(self, storage: LeasingStorage, lines: Lines, key: str) -> None:
        self.storage, self.lines, self.key = storage, lines, key

    async def __aenter__(self) -> None:
        self._lease = await self.lines.enter(self.key)
        self._is_left = self._has_cancelled = False
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelling = self._task.cancelling()
        self._before = HOLD.get()
        HOLD.set(self)
        self._lease.on_lost = self._lose
        if self._lease.is_lost:  # before it knew whom to tell
            self._lose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        HOLD.set(self._before)
        lease, self._lease.on_lost = self._lease, None
        self._is_left, is_lost = True, lease.is_over()
        self.lines.leave(self.key, lease)
        if is_lost:
            # As asyncio.timeout() does: only its own cancellation becomes another error.
            is_ours = self._has_cancelled and self._task.uncancel() <= self._cancelling
            if error is None or (is_ours and isinstance(error, asyncio.CancelledError)):
                raise LeaseLost(self.key) from error

    def fence(self, place: Hashable | None) -> Fence | None:
        """See `fencing.Hold`."""
        if self._is_left:
            return None
        if self._lease.is_over():
            raise LeaseLost(self.key)
        if place is None or place != self.storage.lease_place:
            return None
        return Fence(self.key, self._lease.token)

    def _lose(self) -> None:
        """Called in the thread that renews."""
        with suppress(RuntimeError):  # the loop was closed
            self._task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if not self._is_left and not self._has_cancelled:
            self._has_cancelled = True
            self._task.cancel(f"the lease on {self.key!r} is lost")


def _seconds(name: str, value: timedelta | float) -> float:
    try:
        seconds = ttl_seconds(value)
    except (TypeError, ValueError) as error:
        raise InvalidStorageError(f"{name} of DjangoEventIsolation {error}") from error
    if seconds is None:
        raise InvalidStorageError(f"{name} of DjangoEventIsolation must be seconds or a timedelta, not None")
    return seconds


_all_lines: weakref.WeakSet[Lines] = weakref.WeakSet()


def _start_anew() -> None:
    """In the child of a fork: who waits and who works is in its parent."""
    for lines in list(_all_lines):
        lines._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
