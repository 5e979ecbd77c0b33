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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from django.db.models import Max
from redis.exceptions import RedisError, ResponseError

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.backends.redis import RedisStorage
from fsm_storage.backends.wire import Wire, wire_for
from fsm_storage.backends.writing import Command
from fsm_storage.dialects import Fence
from fsm_storage.exceptions import FSMStorageError, LeaseLost, StorageClosed
from fsm_storage.leases import Lease, LeaseKeeper
from fsm_storage.mirror.announcing import announce_missed
from fsm_storage.mirror.applying import Applier, Entry
from fsm_storage.models import FSMRecord
from fsm_storage.outbox import aside_name, id_of, missed_name, stream_name

T = TypeVar("T")
logger = logging.getLogger("fsm_storage")

GROUP = "mirror"
BATCH = 500
LEASE_KEY = "outbox"
LEASE_SECONDS = 10.0
STAND_BY_SECONDS = 3.0
BLOCK_MS = 250
SWEEP_EVERY = 60.0
MISSED_EVERY = 1.0
RETRY_SECONDS = 1.0
COMPLAIN_EVERY = 60.0
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
        self._table = table_of(storage)
        self._applier = Applier(self._table, storage.history)
        self._keeper = LeaseKeeper(self._table, LEASE_SECONDS)
        self._stream, self._aside = stream_name(storage.alias), aside_name(storage.alias)
        self._consumer = f"{socket.gethostname()[:30]}:{os.getpid()}:{random.getrandbits(32):08x}"
        self._batch = BATCH
        self._stopping = asyncio.Event()
        self._last_at = math.inf
        # One thread for all that is asked of the database: it has one connection.
        self._thread = ThreadPoolExecutor(1, f"fsm_storage {storage.alias} mirror")
        self._sweep_at = self._missed_at = self._complain_at = 0.0
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
        await self._make_group(wire)
        await self._take_over(wire)
        start = "0"  # what this consumer was given and has not acknowledged
        while not lease.is_over() and time.monotonic() < self._last_at:
            ends = until_empty or self._stopping.is_set()
            entries = await self._read(wire, start, block=start == ">" and not ends)
            if entries:
                await self._carry_out(wire, lease, entries)
            elif start == "0":
                start = ">"
            elif ends and not await self._announce_missed(wire):
                return
            await self._look_after(wire, is_idle=not entries and start == ">")

    async def _take_over(self, wire: Wire) -> None:
        """Make everything ours that a dead mirror was given. Whoever has the lease may do so at once."""
        cursor: Any = "0-0"
        while True:
            (reply,) = await wire.ask(
                [("XAUTOCLAIM", self._stream, GROUP, self._consumer, 0, cursor, "COUNT", BATCH, "JUSTID")]
            )
            cursor = _checked(reply)[0]
            if cursor in (b"0-0", "0-0"):
                return

    async def _read(self, wire: Wire, start: str, *, block: bool) -> list[Entry]:
        wait = ("BLOCK", BLOCK_MS) if block else ()
        command = (
            "XREADGROUP",
            "GROUP",
            GROUP,
            self._consumer,
            "COUNT",
            self._batch,
            *wait,
            "STREAMS",
            self._stream,
            start,
        )
        (reply,) = await wire.ask([command])
        try:
            return _entries(_checked(reply))
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._make_group(wire)  # Redis was wiped
            return []

    async def _make_group(self, wire: Wire) -> None:
        """Make the stream and its group. A new stream goes on behind what the database has.

        Or a Redis that was wiped, and whose clock is behind, would give out versions that look old.
        """
        (reply,) = await wire.ask([("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")])
        if isinstance(reply, ResponseError) and "BUSYGROUP" in str(reply):
            return
        _checked(reply)
        newest = await self._in_thread(newest_version, self.storage)
        # Refused where the stream is further already. What came in before the group was made has older ids.
        await wire.ask([("XSETID", self._stream, id_of(newest))])

    async def _is_empty(self, wire: Wire) -> bool:
        length, missed = await wire.ask([("XLEN", self._stream), ("SCARD", missed_name(self.storage.alias))])
        return not _checked(length) and not _checked(missed)

    async def _carry_out(self, wire: Wire, lease: Lease, entries: Sequence[Entry]) -> None:
        """Apply entries, then tell Redis: whoever dies in between has them applied again, to no effect."""
        (clock,) = await wire.ask([("TIME",)])
        clock = _checked(clock)
        now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
        fence = Fence(lease.key, lease.token)
        try:
            applied = await self._in_thread(self._applier.apply, entries, now_ms, fence)
        except FSMStorageError:
            self._batch = max(1, self._batch // 2)  # too much at once, perhaps
            raise
        self._batch = min(BATCH, self._batch * 2)
        ids = [entry.id for entry in entries]
        commands: list[tuple[Any, ...]] = []
        for entry, reason in applied.poison:
            logger.error(
                "entry %s of the outbox of %r is put aside: %s", entry.id, self.storage.alias, reason
            )
            pairs = [item for pair in entry.fields.items() for item in pair]
            commands.append(
                ("XADD", self._aside, "MAXLEN", "~", 10_000, "*", "id", entry.id, "reason", reason, *pairs)
            )
        for reply in await wire.ask(commands) if commands else ():  # before they leave the outbox
            _checked(reply)
        for reply in await wire.ask([("XACK", self._stream, GROUP, *ids), ("XDEL", self._stream, *ids)]):
            _checked(reply)
        done = self.progress
        self.progress = Progress(
            done.entries + len(entries),
            done.writes + applied.writes,
            done.poison + len(applied.poison),
            ids[-1],
        )

    async def _look_after(self, wire: Wire, *, is_idle: bool) -> None:
        """Now and then: announce what was missed while the outbox was full, and clear what has expired.

        That only when all is applied: what looks expired may have been renewed since, and a sweep counts
        the version on, which must not meet that of an entry on its way.
        """
        now = time.monotonic()
        if now >= self._missed_at:
            self._missed_at = now + MISSED_EVERY
            await self._announce_missed(wire)
        if is_idle and now >= self._sweep_at and not any(await self._in_thread(self._table.sweep)):
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


def table_of(storage: RedisStorage) -> DjangoStorage:
    """Return the storage through which the mirror of `storage` writes to the database."""
    return DjangoStorage(storage.alias, database=storage.database, history=storage.history)


def newest_version(storage: RedisStorage) -> int:
    """Return the largest version of the mirrored records, 0 where there are none."""
    records = FSMRecord.objects.using(storage.database).filter(alias=storage.alias)
    newest: int | None = records.aggregate(newest=Max("version"))["newest"]
    return newest or 0


def _entries(reply: Any) -> list[Entry]:
    """Return the entries in the answer to XREADGROUP, in RESP2's form or RESP3's."""
    if not reply:
        return []
    streams = list(reply.values()) if isinstance(reply, Mapping) else [found for _, found in reply]
    found = streams[0]
    if found and isinstance(found[0], list) and found[0] and isinstance(found[0][0], list):
        found = found[0]
    # An entry that was deleted meanwhile has no fields.
    return [Entry(entry_id.decode(), _pairs(fields)) for entry_id, fields in found]


def _pairs(fields: Any) -> Mapping[bytes, bytes]:
    if isinstance(fields, Mapping):
        return fields
    flat = fields or []
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply
