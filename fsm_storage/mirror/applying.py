"""Applies entries of the outbox to the tables. Synchronous; knows no Redis.

Entries come in the order of the stream, and each carries its id as the record's version: what has been
applied already is older than the record, and is left alone. So an entry may come any number of times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, zip_longest
from operator import attrgetter
from typing import Literal, NamedTuple

from fsm_storage import signals
from fsm_storage.codec import Codec
from fsm_storage.dialects import AsOf, Cause, Fence, History, Step, Write
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidData,
    LeaseLost,
    NotMigrated,
    StorageTimeout,
    StorageUnavailable,
    VersionConflict,
)
from fsm_storage.keys import record_key, state_text
from fsm_storage.mirror.table import MirrorTable
from fsm_storage.outbox import STATE, Header, decode_header, version_of, without_number, written_at_ms
from fsm_storage.patches import EMPTY, KEEP, NEVER, Keep, Patch, Seconds, Ttl

_CODEC = Codec()
_EXPIRY = Cause("expiry")
REMEMBERED = 8192
"""Headers and states that are not read anew each time. To read one takes as long as all the rest of a write."""


class Entry(NamedTuple):
    """One entry of the stream."""

    id: str
    fields: Mapping[bytes, bytes]


class Clock(NamedTuple):
    """Redis's time, and the seconds by which the database's clock is ahead of it."""

    now_ms: int
    ahead: Seconds = 0.0

    def instant(self, entry_id: str) -> Seconds:
        """Return when an entry was written, by the database's clock."""
        # An id is in the future where Redis's clock was set back, or the stream goes on behind another one's.
        return min(written_at_ms(entry_id), self.now_ms) / 1000 + self.ahead


class Applied(NamedTuple):
    """What came of some entries: how many writes there were, and those entries that hold what cannot be applied."""

    writes: int
    poison: Sequence[tuple[Entry, str]]


class _Target(NamedTuple):
    """What a header is about."""

    key: str
    header: Header
    ttl: Seconds | None
    cause: Cause


class _Item(NamedTuple):
    """One write of one part."""

    entry: Entry
    version: int
    at: Seconds
    target: _Target
    value: bytes


class Applier:
    """Writes entries to the tables of one alias."""

    def __init__(self, table: MirrorTable, history: History) -> None:
        self._table, self._history = table, history

    def apply(self, entries: Sequence[Entry], clock: Clock, fence: Fence | None = None) -> Applied:
        """Apply entries, which are in the stream's order.

        Under `fence`, raises `LeaseLost` once another mirror has taken over, and writes nothing more: what
        that one applied may be newer, and what it removed gone with its version.

        What can never be applied is returned, and the rest is applied. Data that other data of the same
        entries replace are not looked at. Raises `StorageUnavailable` and the like for a database that does
        not answer: then all of them may come again.
        """
        batch = _Batch(self._table, fence, self._history == "states")
        found = batch.gather(entries, clock)
        for cause, chains in self._rounds(list(found.values())):
            batch.put(chains, cause)
        return Applied(sum(map(len, found.values())), list(batch.poison.values()))

    def _rounds(self, items: list[list[_Item]]) -> Iterator[tuple[Cause, list[list[_Item]]]]:
        """Yield what is written together, as one write for each key: all there is to a key, where that can be.

        Not where each step is kept with its data, or told.
        """
        if self._history != "full" and not signals.is_heard():
            yield Cause(), items
            return
        cut = [_cut(some, each=self._history == "full") for some in items]
        for chains in zip_longest(*cut):
            by_cause: dict[Cause, list[list[_Item]]] = {}
            for chain in chains:
                if chain:
                    by_cause.setdefault(chain[0].target.cause, []).append(chain)
            yield from by_cause.items()


class _Batch:
    """Entries that are applied together."""

    def __init__(self, table: MirrorTable, fence: Fence | None, notes_steps: bool) -> None:
        self._table, self._fence, self._notes_steps = table, fence, notes_steps
        self.poison: dict[str, tuple[Entry, str]] = {}

    def gather(self, entries: Sequence[Entry], clock: Clock) -> dict[str, list[_Item]]:
        """Return what there is to each key."""
        found: dict[str, list[_Item]] = {}
        for entry in entries:
            version, at = version_of(entry.id), clock.instant(entry.id)
            for field, value in entry.fields.items():
                try:
                    target = _target(without_number(field))
                except (ValueError, TypeError) as error:
                    self._blame(entry, str(error))
                    continue
                found.setdefault(target.key, []).append(_Item(entry, version, at, target, value))
        return found

    def put(self, chains: Sequence[list[_Item]], cause: Cause) -> None:
        """Write one chain for each key. Of one that is refused, each entry is tried by itself."""
        both = [(items, write) for items in chains if (write := self._write(items)) is not None]
        if not both:
            return
        replies = self._table.replay([write for _, write in both], cause)
        for (items, write), reply in zip(both, replies, strict=True):
            if not isinstance(reply, Exception) or isinstance(reply, VersionConflict):
                continue
            if isinstance(reply, LeaseLost | StorageUnavailable | StorageTimeout | NotMigrated):
                raise reply
            if not isinstance(reply, FSMStorageError | ValueError):
                raise reply
            single = [list(some) for _, some in groupby(items, attrgetter("version"))]
            if len(single) == 1:
                self._blame(items[0].entry, f"{write.key}: {reply}")
            else:
                for some in single:
                    self.put([some], cause)

    def _blame(self, entry: Entry, reason: str) -> None:
        self.poison.setdefault(entry.id, (entry, reason))

    def _write(self, items: Sequence[_Item]) -> Write | None:
        """Return the one write that does what all of `items` do."""
        last, target = items[-1], items[0].target
        state, state_until, steps = self._state(items)
        data, data_until = self._data(items)
        if state is KEEP and data is KEEP:
            return None
        return Write(
            target.key,
            target.header.key,
            Patch(state, data),
            NEVER if state_until is None else Ttl(state_until - last.at),
            NEVER if data_until is None else Ttl(data_until - last.at),
            fence=self._fence,
            as_of=AsOf(last.version, last.at, tuple(steps) if self._notes_steps else ()),
        )

    def _state(
        self, items: Sequence[_Item]
    ) -> tuple[str | Literal[Keep.KEEP] | None, Seconds | None, list[Step]]:
        """Return the last state, until when it lives, and the states on the way to it with what expired between."""
        state: str | Literal[Keep.KEEP] | None = KEEP
        until: Seconds | None = None
        steps: list[Step] = []
        for entry, version, at, target, value in items:
            if target.header.part != STATE:
                continue
            try:
                text = None if target.header.is_removed else _state(value)
            except ValueError as error:
                self._blame(entry, f"{target.key}: {error}")
                continue
            if until is not None and until <= at:
                steps.append(Step(None, version, until, _EXPIRY))
            steps.append(Step(text, version, at, target.cause))
            state, until = text, None if target.ttl is None or text is None else at + target.ttl
        return state, until, steps

    def _data(self, items: Sequence[_Item]) -> tuple[str | Literal[Keep.KEEP], Seconds | None]:
        """Return the last data that can be read, and until when they live."""
        for entry, _, at, target, value in reversed(items):
            if target.header.part == STATE:
                continue
            try:
                text = EMPTY if target.header.is_removed else _data(value, target.key)
            except (ValueError, TypeError) as error:
                self._blame(entry, f"{target.key}: {error}")
                continue
            return text, None if target.ttl is None else at + target.ttl
        return KEEP, None


def _cut(items: Sequence[_Item], *, each: bool) -> list[list[_Item]]:
    """Cut what there is to a key: with `each`, into entries; else so that a piece has one state and one cause."""
    pieces: list[list[_Item]] = []
    for _, some in groupby(items, attrgetter("version")):
        entry = list(some)
        if pieces and not each and _are_one(pieces[-1], entry):
            pieces[-1] += entry
        else:
            pieces.append(entry)
    return pieces


def _are_one(earlier: Sequence[_Item], later: Sequence[_Item]) -> bool:
    if earlier[0].target.cause != later[0].target.cause:
        return False
    return not (_has_state(earlier) and _has_state(later))


def _has_state(items: Sequence[_Item]) -> bool:
    return any(item.target.header.part == STATE for item in items)


@lru_cache(REMEMBERED)
def _target(about: bytes) -> _Target:
    header = decode_header(about)
    ttl = None if header.ttl_ms is None else header.ttl_ms / 1000
    return _Target(record_key(header.key, None), header, ttl, Cause(header.source or "bot", header.actor))


@lru_cache(REMEMBERED)
def _state(value: bytes) -> str | None:
    return state_text(value.decode())


def _data(value: bytes, key: str) -> str:
    data = _CODEC.decode(value.decode(), key)
    try:
        return _CODEC.encode(data, key)
    except RecursionError as error:
        raise InvalidData("", "is nested too deep", key) from error
