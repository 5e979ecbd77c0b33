"""Puts conversations into the storages of this project: in batches, by compare-and-set, so again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from django.conf import settings
from django.db import Error, InterfaceError, OperationalError, connections, transaction
from django.utils import timezone

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.codec import Codec
from fsm_storage.dialects import Write, Written, dialect_for
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidData,
    StorageUnavailable,
)
from fsm_storage.keys import state_text
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.patches import EMPTY, Patch, Ttl
from fsm_storage.transfer import Conversation, Found, Refused, Step

BATCH = 500
BATCH_LENGTH = 8 * 1024 * 1024
"""Characters of data in a batch at the most, but for its last."""
TRIES = 5
LOCK_WAIT = 5.0
"""Seconds for a row that another transaction holds."""
TOLERANCE = timedelta(seconds=1)
"""What is kept relative to a server's clock comes a little different at each reading."""

T = TypeVar("T")
Report = Callable[[str, str], None]
Choose = Callable[[str | None], DjangoStorage]


class Counts(NamedTuple):
    """What came of an import. `same` was there already; `skipped` gave way to what is in the database."""

    written: int = 0
    same: int = 0
    skipped: int = 0
    refused: int = 0
    transitions: int = 0

    def __add__(self, other: object) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(*map(sum, zip(self, other, strict=True)))


class _Entry(NamedTuple):
    """A conversation that is ready to be written, and its data as text."""

    place: str
    storage: DjangoStorage
    key: str
    conversation: Conversation
    text: str


class Importer:
    """Imports what a source yields.

    A conversation that differs from what is in the database replaces it if it is newer by `updated_at`,
    or if nothing is there; with `overwrite`, always. `choose` gives the storage for an alias; `refuse` is
    told place and reason of all that is left out for its faults, and the rest goes on.

    Each batch is one transaction, with its transitions of source "import". After an error or a crash,
    the same import goes on: what is there already is the same, and is not written again.
    """

    def __init__(
        self, choose: Choose, refuse: Report, *, overwrite: bool = False, dry_run: bool = False, by: str = ""
    ) -> None:
        self._choose, self._refuse = choose, refuse
        self._overwrite, self._dry_run, self._by = overwrite, dry_run, by
        self._codec = Codec()  # a storage's own `json_dumps` has been over the data already
        self._batch: dict[tuple[str, str], _Entry] = {}
        self._steps: list[tuple[DjangoStorage, Step]] = []
        self._length = 0

    def run(self, source: Iterable[Found]) -> Iterator[tuple[str, Counts]]:
        """Import all of it; after each batch, yield the last place that is done, and the counts so far."""
        counts, last = Counts(), ""
        for place, value in source:
            ready: _Entry | tuple[DjangoStorage, Step] | None = None
            try:
                ready = self._ready(place, value)
            except (FSMStorageError, ValueError, TypeError) as error:
                self._refuse(place, str(error))
                counts += Counts(refused=1)
            if self._is_full(ready):
                counts += self._flush()
                yield last, counts
            if isinstance(ready, _Entry):
                self._batch[ready.storage.alias, ready.key] = ready
                self._length += len(ready.text)
            elif ready is not None:
                self._steps.append(ready)
                self._length += len(repr(ready[1]))
            last = place
        yield last, counts + self._flush()

    def _ready(self, place: str, value: Conversation | Step | Refused) -> _Entry | tuple[DjangoStorage, Step]:
        """Return what is to be written. Raises for what cannot be, before it is part of a batch."""
        if isinstance(value, Refused):
            raise ValueError(value.reason)
        storage = self._choose(value.alias)
        if isinstance(value, Step):
            for state in (value.from_state, value.to_state):
                state_text(state, value.text)
            for data in (value.data_before, value.data_after):
                self._codec.encode({"": data}, value.text)
            return storage, value
        key = storage.key_text(value.key)
        state_text(value.state, key)
        return _Entry(place, storage, key, value, self._codec.encode(value.data, key))

    def _is_full(self, ready: _Entry | tuple[DjangoStorage, Step] | None) -> bool:
        """Say whether the batch must be written before this is put into it."""
        if len(self._batch) + len(self._steps) >= BATCH or self._length >= BATCH_LENGTH:
            return True
        return isinstance(ready, _Entry) and (ready.storage.alias, ready.key) in self._batch

    def _flush(self) -> Counts:
        batch, steps = list(self._batch.values()), self._steps
        self._batch, self._steps, self._length = {}, [], 0
        counts = Counts()
        # The history first: the timeline goes by ids, and the import comes after what it brings.
        for storage in {id(storage): storage for storage, _ in steps}.values():
            some = [step for owner, step in steps if owner is storage]
            counts += _persistently(storage, partial(self._add_steps, storage, some))
        for storage in {id(entry.storage): entry.storage for entry in batch}.values():
            counts += self._settle(storage, [entry for entry in batch if entry.storage is storage])
        return counts

    def _settle(self, storage: DjangoStorage, entries: list[_Entry]) -> Counts:
        """Write what is to be written, and look again where the bot was faster."""
        counts = Counts()
        for _ in range(TRIES):
            try:
                counts, entries = _persistently(storage, partial(self._attempt, storage, entries, counts))
            except InvalidData as error:
                if len(entries) > 1:
                    return sum((self._settle(storage, [entry]) for entry in entries), counts)
                self._refuse(entries[0].place, str(error))
                return counts + Counts(refused=1)
            if not entries:
                return counts
        for entry in entries:
            self._refuse(entry.place, "changes all the time in the database")
        return counts + Counts(refused=len(entries))

    def _attempt(
        self, storage: DjangoStorage, entries: list[_Entry], counts: Counts
    ) -> tuple[Counts, list[_Entry]]:
        """Write once; return the counts, and the entries whose record was written meanwhile."""
        records = FSMRecord.objects.using(storage.database)
        found = records.filter(alias=storage.alias, key__in=[entry.key for entry in entries])
        existing = {record.key: record for record in found}
        now = records.clock()
        chosen: list[tuple[_Entry, Write]] = []
        for entry in entries:
            verdict = self._verdict(entry, existing.get(entry.key), now)
            counts += Counts(same=verdict == "same", skipped=verdict == "skipped")
            if verdict == "written":
                chosen.append((entry, _write(entry, existing.get(entry.key), now)))
        if self._dry_run or not chosen:
            return counts + Counts(written=len(chosen)), []
        replies = self._put(storage, chosen, now)
        written = sum(isinstance(reply, Written) for reply in replies)
        late = [
            entry for (entry, _), reply in zip(chosen, replies, strict=True) if not isinstance(reply, Written)
        ]
        return counts + Counts(written=written), late

    def _verdict(self, entry: _Entry, record: FSMRecord | None, now: datetime) -> str:
        new = entry.conversation.live_at(now)
        if record is None:
            return "same" if new.state is None and not new.data else "written"
        old = _conversation(record)
        if self._is_same(entry, new, old.live_at(now)):
            return "same"
        is_newer = (
            new.updated_at is not None and old.updated_at is not None and new.updated_at > old.updated_at
        )
        return "written" if self._overwrite or is_newer else "skipped"

    def _is_same(self, entry: _Entry, new: Conversation, old: Conversation) -> bool:
        if new.state != old.state or not _close(new.state_expires_at, old.state_expires_at):
            return False
        if not _close(new.data_expires_at, old.data_expires_at):
            return False
        try:  # as text, because for Python 1 and True are the same
            return (entry.text if new.data else EMPTY) == self._codec.encode(old.data, entry.key)
        except (TypeError, ValueError):  # what is stored is unreadable
            return False

    def _put(
        self, storage: DjangoStorage, chosen: Sequence[tuple[_Entry, Write]], now: datetime
    ) -> Sequence[Any]:
        writes = [write for _, write in chosen]
        if not any(entry.conversation.updated_at for entry, _ in chosen):
            return storage.put(writes, by=self._by)
        with _writing(storage.database):
            replies = storage.put(writes, by=self._by)
            _restore_times(
                storage,
                [
                    entry
                    for (entry, _), reply in zip(chosen, replies, strict=True)
                    if isinstance(reply, Written)
                ],
                now,
            )
        return replies

    def _add_steps(self, storage: DjangoStorage, steps: Sequence[Step]) -> Counts:
        """Add the transitions that are not there yet."""
        rows = [_transition(storage.alias, step) for step in steps]
        transitions = FSMTransition.objects.using(storage.database)
        there = transitions.filter(
            alias=storage.alias,
            key__in={row.key for row in rows},
            at__range=(min(row.at for row in rows), max(row.at for row in rows)),
        )
        known = set(there.values_list("key", "at", "from_state", "to_state", "source"))
        new = [
            row for row in rows if (row.key, row.at, row.from_state, row.to_state, row.source) not in known
        ]
        if not self._dry_run:
            transitions.bulk_create(new)
        return Counts(transitions=len(new))


def _persistently(storage: DjangoStorage, work: Callable[[], T]) -> T:
    """Do `work`, which is one transaction, again on a new connection if the database loses or refuses it."""
    for attempt in range(TRIES - 1):
        try:
            return work()
        except (StorageUnavailable, OperationalError, InterfaceError):
            connections[storage.database].close_if_unusable_or_obsolete()
            time.sleep(0.1 * 2**attempt)
    return work()


def _write(entry: _Entry, record: FSMRecord | None, now: datetime) -> Write:
    new = entry.conversation.live_at(now)
    patch = Patch(new.state, entry.text if new.data else EMPTY)
    version = 0 if record is None else record.version
    return Write(
        entry.key,
        new.key,
        patch,
        _ttl(new.state_expires_at, now),
        _ttl(new.data_expires_at, now),
        version,
    )


def _ttl(expires_at: datetime | None, now: datetime) -> Ttl:
    return Ttl(None if expires_at is None else (expires_at - now).total_seconds())


def _close(one: datetime | None, other: datetime | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < TOLERANCE


def _conversation(record: FSMRecord) -> Conversation:
    return Conversation(
        record.storage_key,
        record.state,
        record.data,
        _aware(record.state_expires_at),
        _aware(record.data_expires_at),
        updated_at=_aware(record.updated_at),
    )


def _aware(at: datetime | None) -> datetime | None:
    return at if at is None or timezone.is_aware(at) else timezone.make_aware(at)


def _stored(at: datetime) -> datetime:
    """Return an instant as the models of this project keep it."""
    return at if settings.USE_TZ else timezone.make_naive(at)


@contextmanager
def _writing(database: str) -> Iterator[None]:
    """A transaction that has the right to write from its beginning, also where SQLite would only read at first.

    It waits for a locked row for a limited time.
    """
    connection, dialect = connections[database], dialect_for(connections[database].vendor)
    before, after = dialect.lock_limits(LOCK_WAIT) if dialect else ((), ())
    try:
        with transaction.atomic(using=database):
            if not connection.features.has_select_for_update:
                FSMRecord.objects.using(database).filter(pk__lt=0).update(version=0)
            _execute(database, before)
            yield
    finally:
        with suppress(Error):  # of a connection that is lost, and the limit with it
            _execute(database, after)


def _execute(database: str, statements: Sequence[str]) -> None:
    with connections[database].cursor() as cursor:
        for sql in statements:
            cursor.execute(sql)


def _restore_times(storage: DjangoStorage, entries: Sequence[_Entry], now: datetime) -> None:
    """Set the times of records that were written in this transaction to what they were, to the microsecond.

    An upsert of rows that are all there: one statement for all, on every database.
    """
    rows = []
    for entry in entries:
        new = entry.conversation.live_at(now)
        if new.updated_at is not None and (new.state is not None or new.data):
            parts = asdict(new.key)
            new = new._replace(created_at=new.created_at or new.updated_at)
            times = {name: at and _stored(at) for name in _TIMES for at in (getattr(new, name),)}
            rows.append(FSMRecord(alias=storage.alias, key=entry.key, version=0, **parts, **times))
    has_target = connections[storage.database].features.supports_update_conflicts_with_target
    FSMRecord.objects.using(storage.database).bulk_create(
        rows,
        update_conflicts=True,
        update_fields=_TIMES,
        unique_fields=["alias", "key"] if has_target else None,
    )


_TIMES = ("state_expires_at", "data_expires_at", "created_at", "updated_at")


def _transition(alias: str, step: Step) -> FSMTransition:
    parts = {name: getattr(step.key, name) for name in ("bot_id", "chat_id", "user_id")}
    values = {name: getattr(step, name) for name in _COPIED}
    return FSMTransition(alias=alias, key=step.text, at=_stored(step.at), **parts, **values)


_COPIED = ("from_state", "to_state", "source", "actor", "data_before", "data_after")
