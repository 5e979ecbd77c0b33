"""The mirror at work: reads the outbox through a consumer group, and has it applied to the database.

Any number of mirrors may run, in bots and as `manage.py fsm_mirror`. One at a time applies, so that
everything comes in the stream's order; it holds a lease in the database, and the others stand by.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

from django.db.models import Max
from redis.exceptions import RedisError, ResponseError

from fsm_storage.backends.forks import at_work
from fsm_storage.backends.redis import RedisStorage
from fsm_storage.backends.wire import Wire, wire_for
from fsm_storage.backends.writing import Command
from fsm_storage.dialects import AsOf, Fence
from fsm_storage.exceptions import FSMStorageError, LeaseLost, StorageClosed
from fsm_storage.leases import Lease, LeaseKeeper
from fsm_storage.mirror.announcing import announce_missed
from fsm_storage.mirror.applying import Applier, Clock, Entry
from fsm_storage.mirror.stream import BATCH, BLOCK_MS, Found, Stream, checked
from fsm_storage.mirror.table import MirrorTable
from fsm_storage.models import FSMLease, FSMRecord, UtcNow
from fsm_storage.outbox import missed_name, stream_name, version_of

T = TypeVar("T")
logger = logging.getLogger("fsm_storage")

LEASE_KEY = "outbox"
LEASE_SECONDS = 10.0
STAND_BY_SECONDS = 3.0
SWEEP_EVERY = 60.0
MEASURE_EVERY = 10.0
MISSED_EVERY = 1.0
RETRY_SECONDS = 1.0
COMPLAIN_EVERY = 60.0
REST_SECONDS = 0.05
"""How long a mirror that keeps up rests at the most between two batches; it rests as long as the batch took."""
LAST_SECONDS = 2.0
"""How long a mirror that is stopped goes on, if there is something left in the outbox."""


class Progress(NamedTuple):
    """What a mirror has done since it was made."""

    entries: int = 0
    writes: int = 0
    poison: int = 0
    last_id: str = ""


class PatientWire:
    """A wire on which no question waits for much longer than `seconds`: a Redis that says nothing is away, too."""

    def __init__(self, wire: Wire, seconds: float) -> None:
        self._wire, self._seconds = wire, seconds
        self.one_key = wire.one_key

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        async with asyncio.timeout(self._seconds + BLOCK_MS / 1000):
            return await self._wire.ask(commands)

    async def hang_up(self) -> None:
        await self._wire.hang_up()


class Mirror:
    """Applies the outbox of one `RedisStorage` until it is stopped.

    `await run()` returns after `stop()`. A database or a Redis that is away is waited for: nothing is
    acknowledged before it is committed, so nothing is lost, and what comes twice does no harm.
    """

    def __init__(self, storage: RedisStorage) -> None:
        self.storage = storage
        self.progress = Progress()
        self.is_active = False
        self._table = MirrorTable(storage)
        self._applier = Applier(self._table, storage.history)
        self._keeper = LeaseKeeper(self._table, LEASE_SECONDS)
        self._consumer = f"{socket.gethostname()[:30]}:{os.getpid()}:{random.getrandbits(32):08x}"
        self._batch = BATCH
        self._stopping = asyncio.Event()
        self._last_at = math.inf
        # One thread for all that is asked of the database: it has one connection.
        self._thread = ThreadPoolExecutor(1, f"fsm_storage {storage.alias} mirror", at_work.join)
        self._sweep_at = self._missed_at = self._measure_at = self._complain_at = 0.0
        self._ahead: float | None = None
        self._complaint = ""

    def stop(self) -> None:
        """Apply what is in the outbox, for `LAST_SECONDS` at the most, and return from `run`. From its event loop."""
        self._last_at = time.monotonic() + LAST_SECONDS
        self._stopping.set()

    async def run(self, *, until_empty: bool = False) -> Progress:
        """Mirror until `stop()`, or with `until_empty` until nothing is left in the outbox."""
        wire = PatientWire(wire_for(self.storage.redis), self.storage.timeout)
        try:
            while not self._stopping.is_set():
                try:
                    if await self._take_turn(wire, until_empty=until_empty) and until_empty:
                        break
                    if until_empty and await self._is_empty(wire):  # by another mirror's work
                        break
                    await self._pause(STAND_BY_SECONDS * random.uniform(0.7, 1.0))  # noqa: S311 - jitter
                except LeaseLost:  # another mirror has taken over
                    continue
                except (RedisError, OSError, TimeoutError, FSMStorageError) as error:
                    self._complain(error)
                    await self._pause(RETRY_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
                except Exception:  # a fault of ours must not end what nobody would start again
                    logger.exception("the mirror of storage %r failed, and goes on", self.storage.alias)
                    await self._pause(RETRY_SECONDS)
        finally:
            await wire.hang_up()
            await self._keeper.close()
            await self._table.close()
            self._thread.shutdown(wait=False)
        return self.progress

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _ask(self, question: Callable[[RedisStorage], T]) -> T:
        """Ask the database something through the ORM, and again while it fails for a moment."""
        return await self._in_thread(self._table.retried, partial(question, self.storage))

    def _complain(self, error: Exception) -> None:
        """Log why it waits: once, and again after a while, for as long as the reason is the same."""
        now = time.monotonic()
        if str(error) != self._complaint or now >= self._complain_at:
            self._complaint, self._complain_at = str(error), now + COMPLAIN_EVERY
            logger.warning("the mirror of storage %r waits: %s", self.storage.alias, error)

    async def _take_turn(self, wire: Wire, *, until_empty: bool) -> bool:
        """Be the one who applies for as long as the lease holds; False if another one is."""
        lease = await self._keeper.acquire(LEASE_KEY)
        if lease is None:
            return False
        self.is_active = True
        try:
            await self._apply_all(wire, lease, until_empty=until_empty)
        finally:
            self.is_active = False
            with suppress(FSMStorageError):
                self._keeper.release(lease)
            await self._in_thread(self._table.release)
        return True

    async def _apply_all(self, wire: Wire, lease: Lease, *, until_empty: bool) -> None:
        stream = Stream(wire, self.storage.alias, self._consumer)
        await self._make_group(stream)
        await stream.take_over()
        start = "0"  # what this consumer was given and has not acknowledged
        while not lease.is_over() and time.monotonic() < self._last_at:
            ahead = await self._measured(wire)
            ends = until_empty or self._stopping.is_set()
            found = await self._read(stream, start, waits=start == ">" and not ends)
            if found.entries:
                began = time.monotonic()
                await self._carry_out(stream, lease, found.entries, Clock(found.now_ms, ahead))
                if (
                    found.all_until is not None and not ends
                ):  # let some more gather: many cost little more than one
                    await self._pause(min(time.monotonic() - began, REST_SECONDS))
            elif start == "0":
                start = ">"
                continue
            elif ends and not await self._announce_missed(wire):
                return
            until = found.all_until
            await self._look_after(wire, None if until is None else Clock(until, ahead))

    async def _read(self, stream: Stream, start: str, *, waits: bool) -> Found:
        try:
            found = await stream.read(start, self._batch)
            return await stream.wait(found) if waits and not found.entries else found
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._make_group(stream)  # Redis was wiped
            return Found(0)

    async def _make_group(self, stream: Stream) -> None:
        if await stream.make_group():
            await stream.go_on_behind(await self._ask(newest_version))

    async def _is_empty(self, wire: Wire) -> bool:
        alias = self.storage.alias
        length, missed = await wire.ask([("XLEN", stream_name(alias)), ("SCARD", missed_name(alias))])
        return not checked(length) and not checked(missed)

    async def _carry_out(self, stream: Stream, lease: Lease, entries: Sequence[Entry], clock: Clock) -> None:
        """Apply entries, then tell Redis: whoever dies in between has them applied again, to no effect."""
        fence = Fence(lease.key, lease.token)
        try:
            applied = await self._in_thread(self._applier.apply, entries, clock, fence)
        except FSMStorageError:
            self._batch = max(1, len(entries) // 2)  # too much at once, perhaps
            raise
        self._batch = min(BATCH, self._batch * 2)
        for entry, reason in applied.poison:
            logger.error(
                "entry %s of the outbox of %r is put aside: %s", entry.id, self.storage.alias, reason
            )
        if applied.poison:  # before they leave the outbox
            await stream.put_aside(applied.poison)
        await stream.acknowledge([entry.id for entry in entries])
        done = self.progress
        self.progress = Progress(
            done.entries + len(entries),
            done.writes + applied.writes,
            done.poison + len(applied.poison),
            entries[-1].id,
        )

    async def _measured(self, wire: Wire) -> float:
        """Return by how many seconds the database's clock is ahead of Redis's.

        Measured now and then, and only corrected by a measure that rules the last one out: two writes
        shall not be further apart, or nearer, than they were because one of two measures took longer.
        """
        now = time.monotonic()
        if self._ahead is not None and now < self._measure_at:
            return self._ahead
        self._measure_at = now + MEASURE_EVERY
        before = await _redis_time(wire)
        there = await self._ask(database_time)
        after = await _redis_time(wire)
        measured, doubt = there - (before + after) / 2, (after - before) / 2
        if self._ahead is None or abs(measured - self._ahead) > doubt:
            self._ahead = measured
        return self._ahead

    async def _look_after(self, wire: Wire, clock: Clock | None) -> None:
        """Now and then: announce what was missed while the outbox was full, and clear what has expired.

        That only up to an instant (`clock`) to which all has been applied: what looks expired may have been
        renewed since. And only of records so old that their next version is not that of an entry to come.
        """
        now = time.monotonic()
        if now >= self._missed_at:
            self._missed_at = now + MISSED_EVERY
            await self._announce_missed(wire)
        if clock is not None and now >= self._sweep_at:
            last = version_of(self.progress.last_id) if self.progress.last_id else 0
            below = max(last, version_of(f"{clock.now_ms}-0") - 1)
            as_of = AsOf(below, clock.now_ms / 1000 + clock.ahead)
            if not any(await self._in_thread(partial(self._table.sweep, as_of=as_of))):
                self._sweep_at = now + SWEEP_EVERY  # else there may be more

    async def _announce_missed(self, wire: Wire) -> int:
        return await announce_missed(wire, self.storage)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


class MirrorThread(threading.Thread):
    """A mirror in a thread of its own, with an event loop of its own: that of a bot."""

    def __init__(self, storage: RedisStorage) -> None:
        super().__init__(name=f"fsm_storage {storage.alias} mirror", daemon=True)
        self._storage = storage
        self._mirror: Mirror | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shall_stop = threading.Event()

    def run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._mirror = Mirror(self._storage)
        if self._shall_stop.is_set():
            self._mirror.stop()
        try:
            await self._mirror.run()
        except StorageClosed:
            return
        except Exception:
            logger.exception("the mirror of storage %r ended", self._storage.alias)

    def stop(self) -> None:
        """Let it finish its batch and end; does not wait."""
        self._shall_stop.set()
        if self._loop is not None and self._mirror is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._mirror.stop)


def newest_version(storage: RedisStorage) -> int:
    """Return the largest version of the mirrored records, 0 where there are none."""
    records = FSMRecord.objects.using(storage.database).filter(alias=storage.alias)
    newest: int | None = records.aggregate(newest=Max("version"))["newest"]
    return newest or 0


def database_time(storage: RedisStorage) -> float:
    """Return the time of the database with the mirror, which holds its lease."""
    leases = FSMLease.objects.using(storage.database).filter(alias=storage.alias, key=LEASE_KEY)
    for now in leases.values_list(UtcNow(), flat=True):
        return float(now.timestamp())
    raise LeaseLost(LEASE_KEY)


async def _redis_time(wire: Wire) -> float:
    (reply,) = await wire.ask([("TIME",)])
    seconds, micros = checked(reply)
    return int(seconds) + int(micros) / 1_000_000
