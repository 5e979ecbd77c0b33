"""Keeps the leases of this process: takes them, renews them while they are held, gives them back.

Nobody waits here for a lease that another process holds; `isolation` does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from fsm_storage.batching import IDLE_SECONDS
from fsm_storage.dialects import Claim
from fsm_storage.exceptions import FSMStorageError, StorageClosed, StorageTimeout, StorageUnavailable

logger = logging.getLogger("fsm_storage")

_MAY_BE_GRANTED = (asyncio.CancelledError, StorageTimeout, StorageUnavailable)
"""After these nobody knows whether the claim was carried out."""


class LeaseTable(Protocol):
    """Where leases are kept: a storage that carries out claims."""

    @property
    def closed(self) -> bool: ...

    def submit(self, errand: Claim, /) -> Awaitable[Any]:
        """Carry out a claim in a batch with others; the result is the token, or None."""

    async def finish(self, errands: Sequence[Claim], /) -> None:
        """Carry out claims, also after the storage was closed."""


class Lease:
    """The right to work on a key, which its keeper renews until it is given back or lost."""

    __slots__ = ("deadline", "is_lost", "key", "on_lost", "since", "token")

    def __init__(self, key: str, on_lost: Callable[[], None] | None = None) -> None:
        self.key, self.on_lost = key, on_lost
        self.token = 0
        # By this machine's monotonic clock, which goes on while the process is stopped. Counted from
        # before the claim was sent, so it ends before the row in the database does.
        self.since = self.deadline = 0.0
        self.is_lost = False

    def is_over(self) -> bool:
        """Say whether another process may have it by now."""
        return self.is_lost or time.monotonic() >= self.deadline

    def is_older_than(self, seconds: float) -> bool:
        """Say whether it was taken so long ago."""
        return time.monotonic() - self.since > seconds


class LeaseKeeper:
    """The leases that one owner holds in a table.

    Serves any number of threads and event loops. A thread of its own renews, through the table's
    batches, so that a handler which blocks its event loop keeps its lease. A lease that could not be
    renewed in time is lost at the moment at which another process may take it.
    """

    def __init__(self, table: LeaseTable, seconds: float) -> None:
        self.seconds = seconds
        self._table = table
        self.closed = False
        self._start()
        _keepers.add(self)

    def _start(self) -> None:
        self.owner = f"{socket.gethostname()[:30]}:{os.getpid()}:{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._held: dict[str, Lease] = {}
        self._renewer: _Renewer | None = None
        self._on_the_way: dict[asyncio.AbstractEventLoop, set[asyncio.Future[Any]]] = {}

    @property
    def count(self) -> int:
        """How many leases are held, or on their way."""
        return len(self._held)

    async def acquire(self, key: str, on_lost: Callable[[], None] | None = None) -> Lease | None:
        """Take the lease on `key`; None if somebody holds it, also if this keeper does.

        `on_lost()` is called from another thread if the lease is lost. On cancellation or an error the
        lease is given back, in case it was granted.
        """
        if self.closed:
            raise StorageClosed("lease keeper")
        lease = Lease(key, on_lost)
        if self._held.setdefault(key, lease) is not lease:
            return None
        began = time.monotonic()
        try:
            token = await self._table.submit(Claim(key, self.owner, self.seconds))
        except BaseException as error:
            # In this order: behind the claim that gives back come those of whoever is next.
            if isinstance(error, _MAY_BE_GRANTED):
                self._send(Claim(key, self.owner, 0.0))
            self._held.pop(key, None)
            raise
        if token is None:
            self._held.pop(key, None)
            return None
        lease.token, lease.since, lease.deadline = token, began, began + self.seconds
        if self.closed:  # meanwhile
            self.release(lease)
            raise StorageClosed("lease keeper")
        if self._renewer is None:
            self._start_renewer()
        return lease

    async def try_acquire(self, keys: Iterable[str]) -> dict[str, Lease]:
        """Take the leases on those of `keys` that nobody holds, together. When it raises, none is kept."""
        found = await asyncio.gather(*map(self.acquire, dict.fromkeys(keys)), return_exceptions=True)
        leases = {lease.key: lease for lease in found if isinstance(lease, Lease)}
        for error in found:
            if isinstance(error, BaseException):
                for lease in leases.values():
                    self.release(lease)
                raise error
        return leases

    def release(self, lease: Lease) -> None:
        """Give a lease back, from a coroutine; does not wait until the database has done it."""
        self._send(Claim(lease.key, self.owner, 0.0, lease.token))
        self._forget(lease)

    async def close(self) -> None:
        """Give all leases back, also if the table's storage was closed first. Their holders lose them.

        Leases that cannot be given back run out by themselves.
        """
        self.closed = True
        if self._renewer is not None:
            self._renewer.wake()
        leases = self.held()
        for lease in leases:
            self.lose(lease)
        claims = [Claim(lease.key, self.owner, 0.0, lease.token) for lease in leases]
        try:
            if here := self._on_the_way.get(asyncio.get_running_loop()):
                await asyncio.wait(here)
            await self._table.finish(claims)
        except FSMStorageError as error:
            logger.warning("%d leases were not given back and will run out: %s", len(claims), error)

    def _send(self, claim: Claim) -> None:
        """Send a claim whose answer nobody waits for."""
        try:
            reply = asyncio.ensure_future(self._table.submit(claim))
        except FSMStorageError:  # the storage was closed first
            return
        self._of_loop(reply.get_loop()).add(reply)
        reply.add_done_callback(self._arrived)

    def _of_loop(self, loop: asyncio.AbstractEventLoop) -> set[asyncio.Future[Any]]:
        """Return the claims that are on their way from `loop`."""
        with self._lock:
            if loop not in self._on_the_way:
                # Short-lived loops (async_to_sync) leave behind what was not answered before they were closed.
                for old in [old for old in self._on_the_way if old.is_closed()]:
                    del self._on_the_way[old]
                self._on_the_way[loop] = set()
            return self._on_the_way[loop]

    def _arrived(self, reply: asyncio.Future[Any]) -> None:
        self._of_loop(reply.get_loop()).discard(reply)
        if not reply.cancelled() and (error := reply.exception()):
            logger.warning("a lease was not given back and will run out: %s", error)

    def _forget(self, lease: Lease) -> bool:
        with self._lock:
            if self._held.get(lease.key) is not lease:
                return False
            del self._held[lease.key]
            return True

    def _start_renewer(self) -> None:
        with self._lock:
            if self._renewer is None:
                self._renewer = _Renewer(self)
                self._renewer.start()

    # For the renewer, in its thread.

    def held(self) -> list[Lease]:
        """Return the leases that are held now, without those on their way."""
        return [lease for lease in list(self._held.values()) if lease.token]

    def lose(self, lease: Lease) -> None:
        """Tell the holder that the lease is lost, unless it was given back meanwhile."""
        if self._forget(lease):
            lease.is_lost = True
            if not self.closed:
                logger.error("the lease on %r is lost: it was not renewed in time", lease.key)
            if lease.on_lost is not None:
                lease.on_lost()

    async def renewed(self, lease: Lease) -> Any:
        """Renew a lease; None if somebody else has it."""
        return await self._table.submit(Claim(lease.key, self.owner, self.seconds, lease.token))

    def end_renewer(self, renewer: _Renewer) -> bool:
        """Let the renewer go if nothing is held; the next lease gets a new one."""
        with self._lock:
            if self._held and not self.closed:
                return False
            if self._renewer is renewer:
                self._renewer = None
            return True


class _Renewer(threading.Thread):
    """Renews the leases of a keeper, in an event loop of its own, until none were held for a while."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        super().__init__(name="fsm_storage leases", daemon=True)
        self.keeper = keeper
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None

    def run(self) -> None:
        asyncio.run(self._work())

    def wake(self) -> None:
        """Make it look at its keeper now."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        keeper, seconds, busy_at = self.keeper, self.keeper.seconds, time.monotonic()
        while True:
            now, held = time.monotonic(), keeper.held()
            if held:
                busy_at = now
                self._look_after(held, now)
            elif (keeper.closed or now - busy_at > IDLE_SECONDS) and keeper.end_renewer(self):
                return
            first = min((lease.deadline for lease in held), default=now + seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(seconds / 6, first - now))):
                    await self._wake.wait()
            self._wake.clear()

    def _look_after(self, held: Sequence[Lease], now: float) -> None:
        for lease in held:
            if lease.deadline <= now:
                self.keeper.lose(lease)
        due = [lease for lease in held if now < lease.deadline < now + self.keeper.seconds * 2 / 3]
        if due and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew(due))

    async def _renew(self, leases: Sequence[Lease]) -> None:
        began = time.monotonic()
        replies = await asyncio.gather(*map(self.keeper.renewed, leases), return_exceptions=True)
        for lease, reply in zip(leases, replies, strict=True):
            if isinstance(reply, BaseException):
                logger.warning("the lease on %r was not renewed yet: %s", lease.key, reply)
            elif reply is None:
                self.keeper.lose(lease)
            else:
                lease.deadline = began + self.keeper.seconds


_keepers: weakref.WeakSet[LeaseKeeper] = weakref.WeakSet()


def _start_anew() -> None:
    """In the child of a fork: the leases are its parent's."""
    for keeper in list(_keepers):
        keeper._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
