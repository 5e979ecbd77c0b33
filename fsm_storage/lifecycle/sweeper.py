"""The sweeper, which removes what the bot no longer sees, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

from django.db.models import F, Q

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.dialects import NOTHING_SPARED, TOGETHER
from fsm_storage.models import FSMRecord, FSMRecordQuerySet, FSMTransition, FSMTransitionQuerySet, UtcNow
from fsm_storage.rollup import Roller


class Swept(NamedTuple):
    """What a sweep did, or would do; `waiting` is what it leaves to expiry handlers."""

    states: int = 0
    data: int = 0
    records: int = 0
    transitions: int = 0
    waiting: int = 0

    def __add__(self, other: object) -> Swept:
        if not isinstance(other, Swept):
            return NotImplemented
        return Swept(*(one + another for one, another in zip(self, other, strict=True)))


class Sweeper:
    """Clears expired states and data, and deletes idle records, of one storage.

    Works in batches, each a transaction of its own, with a pause as long as the batch took, so that
    the bot gets its turn. Any number of sweepers may run at once. A part that was written again
    meanwhile is not expired any more, and stays. What the storage's `expiry` has handlers for stays
    until they were called.
    """

    def __init__(self, storage: DjangoStorage, batch_size: int = 1000) -> None:
        self.storage, self.batch_size = storage, batch_size

    def due(self, keep_history: timedelta | None = None) -> Swept:
        """Count what a sweep would do now."""
        state_waits, data_waits = self._waits()
        records, waiting = self._records(), self._records().filter(state_waits | data_waits)
        return Swept(
            records.state_expired().exclude(state_waits).count(),
            records.data_expired().exclude(data_waits).count(),
            records.idle().exclude(pk__in=waiting.values("pk")).count(),
            0 if keep_history is None else self._older(keep_history).count(),
            waiting.count(),
        )

    def waiting(self) -> int:
        """Count the expired records that are left to handlers."""
        state_waits, data_waits = self._waits()
        return self._records().filter(state_waits | data_waits).count()

    def sweep(self) -> Iterator[Swept]:
        """Sweep until nothing is due, then count the new transitions; yield the counts after each batch."""
        total = Swept()
        while True:
            began = time.monotonic()
            swept = Swept(*self.storage.sweep(self.batch_size))
            if swept == Swept():
                break
            total += swept
            yield total
            _rest(began)
        began = time.monotonic()
        for _ in Roller(self.storage.database, self.batch_size).roll(self.storage.retried):
            yield total
            _rest(began)
            began = time.monotonic()

    def prune(self, keep: timedelta) -> Iterator[Swept]:
        """Delete the storage's transitions that are older than `keep`; yield the count after each batch.

        Goes along the primary key, because nothing else is indexed, and stops where a whole batch is
        younger. Sweep first: that counts them for the figures.
        """
        rows = FSMTransition.objects.using(self.storage.database).order_by("pk")
        total, last = Swept(), 0
        while True:
            began = time.monotonic()
            ids = list(rows.filter(pk__gt=last).values_list("pk", flat=True)[: self.batch_size])
            if not ids:
                return
            batch = Q(pk__gte=ids[0], pk__lte=ids[-1])
            deleted, _ = self._older(keep).filter(batch).delete()
            if not deleted and not rows.filter(batch, at__lt=UtcNow() - keep).exists():
                return
            total, last = total + Swept(transitions=deleted), ids[-1]
            yield total
            _rest(began)

    def _records(self) -> FSMRecordQuerySet:
        return FSMRecord.objects.using(self.storage.database).filter(alias=self.storage.alias)

    def _older(self, keep: timedelta) -> FSMTransitionQuerySet:
        rows = FSMTransition.objects.using(self.storage.database)
        return rows.filter(alias=self.storage.alias, at__lt=UtcNow() - keep)

    def _waits(self) -> tuple[Q, Q]:
        """Return which expired states, and which expired data, are left to handlers."""
        spared = self.storage.expiry.spared() if self.storage.expiry else NOTHING_SPARED
        is_spared = Q() if spared.states is None else Q(state__in=spared.states)
        together = Q(state_expires_at__lte=F("data_expires_at") + timedelta(seconds=TOGETHER)) & is_spared
        data_has_expired = Q(data_expires_at__lte=UtcNow()) & ~Q(data={})
        return (
            Q(state_expires_at__lte=UtcNow()) & is_spared,
            data_has_expired if spared.data else data_has_expired & together,
        )


def _rest(began: float) -> None:
    time.sleep(min(time.monotonic() - began, 1.0))
