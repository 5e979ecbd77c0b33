"""The sweeper, which removes what the bot no longer sees, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.models import FSMRecord
from fsm_storage.rollup import Roller


class Swept(NamedTuple):
    """What a sweep did, or would do."""

    states: int = 0
    data: int = 0
    records: int = 0

    def __add__(self, other: object) -> Swept:
        if not isinstance(other, Swept):
            return NotImplemented
        return Swept(self.states + other.states, self.data + other.data, self.records + other.records)


class Sweeper:
    """Clears expired states and data, and deletes idle records, of one storage.

    Works in batches, each a transaction of its own, with a pause as long as the batch took, so that
    the bot gets its turn. Any number of sweepers may run at once. A part that was written again
    meanwhile is not expired any more, and stays.
    """

    def __init__(self, storage: DjangoStorage, batch_size: int = 1000) -> None:
        self.storage, self.batch_size = storage, batch_size

    def due(self) -> Swept:
        """Count what a sweep would do now."""
        records = FSMRecord.objects.using(self.storage.database).filter(alias=self.storage.alias)
        return Swept(records.state_expired().count(), records.data_expired().count(), records.idle().count())

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
            time.sleep(min(time.monotonic() - began, 1.0))
        for _ in Roller(self.storage.database).roll():
            yield total
