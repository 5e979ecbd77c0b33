"""Applies entries of the outbox to the tables. Synchronous; knows no Redis.

Entries come in the order of the stream, and each carries its id as the record's version: what has been
applied already is older than the record, and is left alone. So an entry may come any number of times.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.codec import Codec
from fsm_storage.dialects import AsOf, Cause, Fence, History, Write
from fsm_storage.exceptions import (
    CorruptData,
    FSMStorageError,
    InvalidData,
    InvalidOutboxRecord,
    LeaseLost,
    NotMigrated,
    StorageTimeout,
    StorageUnavailable,
)
from fsm_storage.keys import record_key, state_text
from fsm_storage.outbox import STATE, Record, decode, version_of, written_at_ms
from fsm_storage.patches import EMPTY, KEEP, Patch, Ttl

logger = logging.getLogger("fsm_storage")

_CODEC = Codec()
_ALREADY_OVER = 0.001
"""The TTL, in seconds, of what had expired before it was mirrored."""


class Entry(NamedTuple):
    """One entry of the stream."""

    id: str
    fields: Mapping[bytes, bytes]


class Applied(NamedTuple):
    """What came of some entries: how many writes there were, and those entries that hold what cannot be applied."""

    writes: int
    poison: Sequence[tuple[Entry, str]]


class _Round(NamedTuple):
    """Writes to different keys, of one cause."""

    cause: Cause
    writes: dict[str, Write]


class Applier:
    """Writes entries to the tables of one alias."""

    def __init__(self, table: DjangoStorage, history: History) -> None:
        self._table, self._history = table, history

    def apply(self, entries: Sequence[Entry], now_ms: int, fence: Fence | None = None) -> Applied:
        """Apply entries, which are in the stream's order; `now_ms` is Redis's clock.

        Under `fence`, raises `LeaseLost` once another mirror has taken over, and writes nothing more: what
        that one applied may be newer, and what it removed gone with its version.

        What can never be applied is returned, and the rest is applied. Raises `StorageUnavailable` and the
        like for a database that does not answer: then all of them may come again.
        """
        poison: list[tuple[Entry, str]] = []
        rounds: list[_Round] = []
        last: dict[str, int] = {}
        count = 0
        for entry in entries:
            for write, cause in self._writes(entry, now_ms, poison):
                count += 1
                self._place(write._replace(fence=fence), cause, rounds, last)
        for one in rounds:
            self._put(one, poison, entries)
        return Applied(count, poison)

    def _writes(
        self, entry: Entry, now_ms: int, poison: list[tuple[Entry, str]]
    ) -> Iterator[tuple[Write, Cause]]:
        """Yield a write for each key of an entry; of two that Redis got together, the later counts."""
        found: dict[tuple[str, Cause], list[tuple[Record, Patch]]] = {}
        for record in decode(entry.fields):
            try:
                if isinstance(record, InvalidOutboxRecord):
                    raise record
                text = record_key(record.key, None)
                step = (record, _patch(record, text))
                found.setdefault((text, Cause(record.source or "bot", record.actor)), []).append(step)
            except (ValueError, TypeError) as error:
                poison.append((entry, str(error)))
        age_ms = max(0, now_ms - written_at_ms(entry.id))
        for (text, cause), records in found.items():
            patch, ttls = Patch(), {}
            for record, one in records:
                patch = patch.then(one)
                ttls[record.part] = _rest(record, age_ms)
            as_of = AsOf(version_of(entry.id), age_ms / 1000)
            never = Ttl()
            yield (
                Write(
                    text,
                    records[0][0].key,
                    patch,
                    ttls.get("state", never),
                    ttls.get("data", never),
                    as_of=as_of,
                ),
                cause,
            )

    def _place(self, write: Write, cause: Cause, rounds: list[_Round], last: dict[str, int]) -> None:
        """Put a write into the first round in which it comes after the earlier ones to its key.

        Or into the earlier one itself, where the history does not tell them apart.
        """
        place = last.get(write.key)
        if place is not None:
            earlier = rounds[place].writes[write.key]
            if rounds[place].cause == cause and self._are_one(earlier, write):
                rounds[place].writes[write.key] = _folded(earlier, write)
                return
        for number in range(0 if place is None else place + 1, len(rounds)):
            if rounds[number].cause == cause:
                break
        else:
            number = len(rounds)
            rounds.append(_Round(cause, {}))
        rounds[number].writes[write.key] = write
        last[write.key] = number

    def _are_one(self, earlier: Write, later: Write) -> bool:
        if self._history == "states":
            return earlier.patch.state is KEEP or later.patch.state is KEEP
        return self._history == "off"

    def _put(self, one: _Round, poison: list[tuple[Entry, str]], entries: Sequence[Entry]) -> None:
        writes, (source, actor) = list(one.writes.values()), one.cause
        try:
            replies: Iterable[Any] = self._table.put(writes, source=source, by=actor)
        except (LeaseLost, StorageUnavailable, StorageTimeout, NotMigrated):
            raise
        except (FSMStorageError, ValueError) as error:
            if len(writes) == 1:
                poison += _blame(writes[0], entries, str(error))
                return
            for write in writes:
                self._put(_Round(one.cause, {write.key: write}), poison, entries)
            return
        for write, reply in zip(writes, replies, strict=True):
            if isinstance(reply, CorruptData):
                poison += _blame(write, entries, str(reply))


def _blame(write: Write, entries: Sequence[Entry], reason: str) -> list[tuple[Entry, str]]:
    version = _as_of(write).version
    return [(entry, f"{write.key}: {reason}") for entry in entries if version_of(entry.id) == version]


def _as_of(write: Write) -> AsOf:
    return cast(AsOf, write.as_of)


def _patch(record: Record, text: str) -> Patch:
    if record.part == STATE:
        return Patch(state=state_text(record.value, text))
    if record.value is None:
        return Patch(data=EMPTY)
    data = _CODEC.decode(record.value, text)
    try:
        return Patch(data=_CODEC.encode(data, text))
    except RecursionError as error:
        raise InvalidData("", "is nested too deep", text) from error


def _rest(record: Record, age_ms: int) -> Ttl:
    """Return what is left of the TTL, which began when Redis wrote."""
    if record.ttl_ms is None:
        return Ttl()
    return Ttl(max((record.ttl_ms - age_ms) / 1000, _ALREADY_OVER))


def _folded(earlier: Write, later: Write) -> Write:
    """Return the write that does what both do; it is as old as the change of the state."""
    has_state = later.patch.state is not KEEP or earlier.patch.state is KEEP
    return later._replace(
        patch=earlier.patch.then(later.patch),
        state_ttl=earlier.state_ttl if later.patch.state is KEEP else later.state_ttl,
        data_ttl=later.data_ttl if later.patch.touches_data else earlier.data_ttl,
        as_of=_as_of(later) if has_state else _as_of(later)._replace(age=_as_of(earlier).age),
    )
