"""Finds what has expired, claims it by a lease on its key, and has a handler called for it.

The order is what keeps the promises. The lease comes first, then a second look at the record, then the
handler, then the clearing, which only touches a record of which nothing was renewed. Killed between
any two of them, the record is still there, expired, and the lease runs out.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aiogram import Bot
from aiogram.exceptions import TelegramForbiddenError
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import sync_to_async
from django.db.models import TextField
from django.db.models.functions import Cast

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.backends.forks import at_work
from fsm_storage.dialects import TOGETHER
from fsm_storage.exceptions import CorruptData, FSMStorageError, VersionConflict
from fsm_storage.leases import Lease, LeaseKeeper
from fsm_storage.lifecycle.handlers import Expired, Part
from fsm_storage.lifecycle.sweeper import Sweeper
from fsm_storage.models import FSMRecord, FSMRecordQuerySet, UtcNow
from fsm_storage.patches import EMPTY

if TYPE_CHECKING:
    from fsm_storage.lifecycle.expiry import Expiry

T = TypeVar("T")
logger = logging.getLogger("fsm_storage")

LEASE = 30.0
"""Seconds after which another process takes over from one that was killed."""
DRAIN = 5.0
"""Seconds that handlers get to finish when the process shuts down."""
MAX_BACK_OFF = 60.0
MAX_SETBACKS = 1000
"""Where so many that failed wait for their next attempt, nothing new is begun."""
CONTENDED_PAUSE = 0.2
GATHER = 0.05
"""Seconds in which more handlers may finish, before the next are looked for."""


class Case(NamedTuple):
    """An expired part of a record, for which there is a handler."""

    part: Part
    record_key: str
    key: StorageKey
    state: str | None
    data: str
    at: datetime
    version: int

    @property
    def name(self) -> tuple[str, Part, datetime]:
        """What stays the same until the part is written again."""
        return self.record_key, self.part, self.at


class Setback(NamedTuple):
    """How often a handler has raised, and when (monotonic) it is called again."""

    attempts: int
    not_before: float


class Runner:
    """One process's share of the work. `run()` it once."""

    def __init__(
        self, expiry: Expiry, storage: DjangoStorage, bots: Iterable[Bot], workflow: Mapping[str, Any]
    ) -> None:
        self._expiry, self._storage = expiry, storage
        self._bots = {bot.id: bot for bot in bots}
        self._workflow = workflow
        self._keeper = LeaseKeeper(storage, LEASE)
        # Not Django's own thread, in which the bot's synchronous code waits for its turn.
        self._thread = ThreadPoolExecutor(1, "fsm_storage expiry", at_work.join)
        self._sweeping = ThreadPoolExecutor(1, "fsm_storage sweep", at_work.join)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._setbacks: dict[tuple[str, Part, datetime], Setback] = {}

    async def run(self) -> None:
        if not self._bots:
            logger.warning("no bot was given at startup: no expiry handler will be called")
        sweeping = asyncio.create_task(self._sweep_for_ever())
        try:
            while True:
                pause = await self._guarded(self._begin_due)
                if self._tasks:
                    await asyncio.wait(
                        self._tasks.values(), timeout=pause, return_when=asyncio.FIRST_COMPLETED
                    )
                    if self._tasks:  # a look for several is as cheap as for one
                        await asyncio.wait(self._tasks.values(), timeout=GATHER)
                else:
                    await asyncio.sleep(pause)
        finally:
            sweeping.cancel()
            await self._stop()

    async def _stop(self) -> None:
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=DRAIN)
            for task in late:
                task.cancel()
            if late:
                logger.warning("%d expiry handlers were cancelled and will be called again", len(late))
                await asyncio.wait(late)
        await self._keeper.close()
        for thread in (self._thread, self._sweeping):
            await asyncio.get_running_loop().run_in_executor(thread, self._storage.release)
            thread.shutdown(wait=False)

    async def _guarded(self, step: Callable[[], Awaitable[float]]) -> float:
        """Return the pause after a step, also if it failed: this goes on as long as the bot does."""
        try:
            return await step()
        except FSMStorageError as error:
            logger.warning("expiry: %s; trying again in %.0f s", error, self._expiry.interval)
        except Exception:
            logger.exception("expiry: a step failed; trying again in %.0f s", self._expiry.interval)
        return self._expiry.interval

    async def _sweep_for_ever(self) -> None:
        while True:
            pause = await self._guarded(self._sweep)
            await asyncio.sleep(pause)

    async def _sweep(self) -> float:
        """Clear what no handler is for, in a thread of its own, which rests between its batches."""
        batches = Sweeper(self._storage).sweep()
        while await self._ask(partial(next, batches, None), self._sweeping) is not None:
            pass
        return self._expiry.interval

    async def _begin_due(self) -> float:
        """Start the handlers for which there is room; return how long nothing else can be done."""
        room = self._expiry.concurrency - len(self._tasks)
        if room <= 0 or not self._bots:
            return self._expiry.interval
        is_full = len(self._setbacks) >= MAX_SETBACKS
        # More than there is room for, of which any: processes that look at the same time shall not want the same.
        limit = 4 * room + len(self._tasks) + len(self._setbacks)
        found = await self._retried(partial(self._select, limit))
        if is_full or len(found) < limit:
            await self._forget_all_but(found)
        which = [case for case in found if case.name in self._setbacks] if is_full else found
        ready = list(dict.fromkeys(case.record_key for case in which if self._is_ready(case)))[: 4 * room]
        wanted = random.sample(ready, min(room, len(ready)))
        if not wanted:
            return min(await self._retried(self._seconds_to_next), self._seconds_to_retry())
        leases = await self._keeper.try_acquire(wanted)
        await self._begin(leases)
        return 0.0 if leases else CONTENDED_PAUSE

    async def _forget_all_but(self, found: Collection[Case]) -> None:
        """Forget the setbacks of what is no longer there to be tried again: it was renewed, or done elsewhere."""
        now, names = time.monotonic(), {case.name for case in found}
        missing = [
            name
            for name, setback in self._setbacks.items()
            if name not in names and setback.not_before <= now and name[0] not in self._tasks
        ]
        if not missing:
            return
        # It may also be claimed: by a handler of the bot, or still by the last attempt.
        cases = await self._retried(partial(self._look, {name[0] for name in missing}))
        there = {case.name for case in cases}
        for name in missing:
            if name not in there:
                self._setbacks.pop(name, None)

    def _is_ready(self, case: Case) -> bool:
        if case.record_key in self._tasks:
            return False
        setback = self._setbacks.get(case.name)
        return setback is None or setback.not_before <= time.monotonic()

    async def _begin(self, leases: Mapping[str, Lease]) -> None:
        """Look again at what was claimed: it may have been renewed, or done, between look and claim."""
        started: set[str] = set()
        try:
            cases = await self._retried(partial(self._look, list(leases))) if leases else []
            for case in cases:
                lease = leases[case.record_key]
                if case.record_key not in started and self._is_ready(case) and not lease.is_over():
                    started.add(case.record_key)
                    self._start(case, lease)
        finally:
            for key in leases.keys() - started:
                self._keeper.release(leases[key])

    def _start(self, case: Case, lease: Lease) -> None:
        task = asyncio.create_task(self._handle(case), name=f"expiry of {case.record_key}")
        self._tasks[case.record_key] = task
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            loop.call_soon_threadsafe(task.cancel)

        lease.on_lost = cancel
        task.add_done_callback(partial(self._end, case, lease))

    def _end(self, case: Case, lease: Lease, task: asyncio.Task[None]) -> None:
        """Give the lease back. Not in the task itself, which may be cancelled before it begins."""
        lease.on_lost = None
        self._keeper.release(lease)
        del self._tasks[case.record_key]
        if not task.cancelled() and (error := task.exception()):
            logger.error("expiry of %r was not cleared, and is handled again: %s", case.record_key, error)

    async def _handle(self, case: Case) -> None:
        try:
            async with asyncio.timeout(self._expiry.timeout):
                await self._call(case)
        except Exception as error:
            if not self._gives_up(case, error):
                return
        await self._clear(case)
        self._setbacks.pop(case.name, None)

    async def _call(self, case: Case) -> None:
        handler = self._expiry.find(case.part, case.state)
        if handler is None:
            return
        setback = self._setbacks.get(case.name)
        expired = Expired(
            self._storage.alias, case.key, case.record_key, case.part, case.state, self._data(case), case.at,
            setback.attempts + 1 if setback else 1,
        )  # fmt: skip
        await handler.call(
            expired,
            **{
                **self._workflow,
                "bot": self._bots[case.key.bot_id],
                "state": FSMContext(self._storage, case.key),
                "fsm_storage": self._storage,
            },
        )

    def _data(self, case: Case) -> dict[str, Any]:
        try:
            return self._storage.codec.decode(case.data, case.record_key)
        except CorruptData as error:
            logger.error("expiry: %s; the handler gets no data", error)
            return {}

    def _gives_up(self, case: Case, error: Exception) -> bool:
        """Note that a handler has raised; say whether that was the last attempt."""
        known = self._setbacks.get(case.name)
        attempts = known.attempts + 1 if known else 1
        if isinstance(error, TelegramForbiddenError):  # blocked by the user, which no attempt changes
            logger.info("expiry of %r: %s", case.record_key, error)
            return True
        if attempts >= self._expiry.attempts:
            logger.error(
                "the handler for the expiry of %r (%s %r) failed %d times; it is cleared without it",
                case.record_key, case.part, case.state, attempts, exc_info=error,
            )  # fmt: skip
            return True
        delay = min(2.0 ** (attempts - 1), MAX_BACK_OFF) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
        delay = max(delay, getattr(error, "retry_after", 0))  # Telegram's word on it
        logger.warning(
            "the handler for the expiry of %r failed (%s: %s); trying again in %.1f s",
            case.record_key, type(error).__name__, error, delay,
        )  # fmt: skip
        self._setbacks[case.name] = Setback(attempts, time.monotonic() + delay)
        return False

    async def _clear(self, case: Case) -> None:
        """Clear the part, unless it was written again. A write to the other part is no reason to leave it."""
        version = case.version
        while True:
            try:
                await self._storage.clear_expired(case.key, case.part, version)
            except VersionConflict:
                found = await self._retried(partial(self._look, [case.record_key]))
                same = [other.version for other in found if other.name == case.name]
                if not same:
                    return
                version = same[0]
            else:
                return

    def _seconds_to_retry(self) -> float:
        now = time.monotonic()
        waiting = [setback.not_before - now for setback in self._setbacks.values()]
        return max(min(waiting, default=self._expiry.interval), 0.01)

    async def _ask(self, question: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        """Ask the database, in a thread of our own."""
        if self._storage.in_transaction:
            return await sync_to_async(question)()
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, question)

    async def _retried(self, question: Callable[[], T]) -> T:
        return await self._ask(partial(self._storage.retried, question))

    # From here on: in that thread.

    def _select(self, limit: int) -> list[Case]:
        """Return the cases that expired longest ago and that nobody has claimed."""
        return sorted(
            (
                case
                for part, records in self._handled()
                for case in _cases(part, records.unleased().order_by(f"{part}_expires_at"), limit)
            ),
            key=lambda case: case.at,
        )

    def _look(self, keys: Collection[str]) -> list[Case]:
        """Return the cases of these records as they are now."""
        return [
            case for part, records in self._handled() for case in _cases(part, records.filter(key__in=keys))
        ]

    def _seconds_to_next(self) -> float:
        pauses = [self._expiry.interval]
        for part, records in self._handled():
            at = f"{part}_expires_at"
            coming = records.filter(**{f"{at}__gt": UtcNow()}).order_by(at).with_clock()
            row = coming.values_list(at, "read_at").first()
            if row is not None:
                pauses.append((row[0] - row[1]).total_seconds() + 0.001)
        return min(pauses)

    def _handled(self) -> Iterator[tuple[Part, FSMRecordQuerySet]]:
        """Yield each part that has handlers, and the records of our bots in the states of these."""
        records = FSMRecord.objects.using(self._storage.database).filter(
            alias=self._storage.alias, bot_id__in=list(self._bots)
        )
        spared = self._expiry.spared()
        if spared.states is None:
            yield "state", records
        elif spared.states:
            yield "state", records.filter(state__in=spared.states)
        if spared.data:
            yield "data", records


def _cases(part: Part, records: FSMRecordQuerySet, limit: int | None = None) -> Iterator[Case]:
    """Yield the cases of records. The data is what was there when the part expired, or up to a minute before."""
    past = records.state_expired() if part == "state" else records.data_expired()
    for record in past.annotate(text=Cast("data", TextField())).defer("data")[:limit]:
        at: datetime = getattr(record, f"{part}_expires_at")
        gone_at = record.data_expires_at
        is_gone = gone_at is not None and gone_at < at - timedelta(seconds=TOGETHER)
        text: str = EMPTY if is_gone else record.text  # type: ignore[attr-defined] # annotated above
        yield Case(part, record.key, record.storage_key, record.state, text, at, record.version)
