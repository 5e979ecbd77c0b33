"""Changes mirrored records from Django: in Redis first, by compare-and-set, and from there through the mirror."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from aiogram.fsm.storage.base import KeyBuilder, StateType
from django.db import connections

from fsm_storage.backends.announcing import Change, edit_command, run
from fsm_storage.backends.arguments import TtlOption, actor_name
from fsm_storage.backends.wire import Wire
from fsm_storage.codec import WireCodec
from fsm_storage.exceptions import RedisConflict, VersionConflict
from fsm_storage.keys import state_text
from fsm_storage.outbox import DATA, STATE, stream_name, version_of
from fsm_storage.patches import EMPTY, KEEP, Keep, ttl_seconds

if TYPE_CHECKING:
    from fsm_storage.models import FSMRecord

PATIENCE = 2.0
"""Seconds for which an edit waits until the mirror shows it."""


Edited: TypeAlias = int | VersionConflict | None
"""What came of an edit: the new version, None if there was nothing to change, or why it was not made."""


class Wish(NamedTuple):
    """What somebody wants of records: as the arguments of `FSMRecord.edit`."""

    state: StateType | Keep
    data: Mapping[str, Any] | Keep
    state_ttl: TtlOption | Keep = KEEP
    data_ttl: TtlOption | Keep = KEEP
    by: Any = None
    source: str = "admin"


class Shown(NamedTuple):
    """A record as it was read. Taken in synchronous code: what is deferred is loaded then."""

    record: FSMRecord
    state: str | None
    data: Any
    if_version: int | None

    @classmethod
    def of(cls, record: FSMRecord, if_version: int | None) -> Shown:
        if if_version is not None and record.version != if_version:
            raise VersionConflict(record.key, if_version, record.version)
        return cls(record, record.current_state, record.current_data, if_version)


class RedisEditor:
    """Carries out edits of the records of one alias, on a wire."""

    def __init__(
        self,
        wire: Wire,
        alias: str,
        builder: KeyBuilder,
        codec: WireCodec,
        first_ttls: Mapping[str, int | None],
    ) -> None:
        self._wire, self._alias, self._builder, self._codec = wire, alias, builder, codec
        self._first_ttls = first_ttls

    async def edit_all(self, edits: Sequence[tuple[Shown, Wish]], seconds: float) -> list[Edited]:
        """Change each record; return what came of it. Those changed get the version that they will have.

        `seconds`: for each. Raises what Redis raises: those before that one are changed.
        """
        replies: list[Edited] = []
        for shown, wish in edits:
            try:
                async with asyncio.timeout(seconds):
                    version = await self.edit(shown, wish)
            except VersionConflict as conflict:
                replies.append(conflict)
                continue
            if version is not None:
                shown.record.version = version
            replies.append(version)
        return replies

    async def edit(self, shown: Shown, wish: Wish) -> int | None:
        """Change one record; return its version to be, None if there was nothing to change.

        Raises `RedisConflict` if Redis does not hold what the record shows, and nothing is written.
        """
        record = shown.record
        key = record.storage_key
        names = [self._builder.build(key, STATE), self._builder.build(key, DATA)]
        found: list[Any] = [KEEP, KEEP]
        if shown.if_version is not None:
            found = await self._found(shown, names)
        changes = [
            Change(found[0], self._state(wish, record), _ttl_ms(wish.state_ttl), self._first_ttls[STATE]),
            Change(found[1], self._data(wish, record), _ttl_ms(wish.data_ttl), self._first_ttls[DATA]),
        ]
        script, keys, arguments = edit_command(
            stream_name(self._alias), names, key, changes, wish.source, actor_name(wish.by)
        )
        reply = await run(self._wire, script, keys, arguments)
        if isinstance(reply, int):
            raise RedisConflict(record.key, record.version)
        return version_of(reply) if reply else None

    async def _found(self, shown: Shown, names: Sequence[str]) -> list[bytes | None]:
        """Return the bytes in Redis, after comparing what they say with the record."""
        state, data = replies = await self._wire.ask([("GET", name) for name in names])
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        try:
            is_same = (None if state is None else state.decode()) == shown.state
            is_same = is_same and (json.loads(data) if data else {}) == shown.data
        except (ValueError, RecursionError):  # nobody saw on the page what cannot be read
            is_same = False
        if not is_same:
            raise RedisConflict(shown.record.key, shown.record.version)
        return replies

    def _state(self, wish: Wish, record: FSMRecord) -> str | Literal[Keep.KEEP] | None:
        return KEEP if wish.state is KEEP else state_text(wish.state, record.key)

    def _data(self, wish: Wish, record: FSMRecord) -> str | Literal[Keep.KEEP] | None:
        if wish.data is KEEP:
            return KEEP
        text = self._codec.encode(wish.data, record.key)
        return None if text == EMPTY else text


def rewrites(
    database: str, edits: Sequence[tuple[FSMRecord, Mapping[str, Any]]], by: Any, source: str
) -> list[tuple[Shown, Wish] | VersionConflict]:
    """Return what to ask for so that parts that are there become others, or that a record has moved on.

    Reads what the records have deferred, all at once.
    """
    from fsm_storage.models import FSMRecord

    rows = FSMRecord.objects.using(database).with_clock().in_bulk([record.pk for record, _ in edits])
    found: list[tuple[Shown, Wish] | VersionConflict] = []
    for record, changes in edits:
        row = rows.get(record.pk)
        if row is None or row.version != record.version:
            found.append(VersionConflict(record.key, record.version, None if row is None else row.version))
            continue
        shown = Shown.of(row, row.version)
        state = KEEP if shown.state is None else changes.get("state", KEEP)
        data = KEEP if not shown.data else changes.get("data", KEEP)
        found.append((shown, Wish(state, data, by=by, source=source)))
    return found


def wait_for_mirror(database: str, alias: str, versions: Mapping[str, int]) -> bool:
    """Wait until the mirror has brought these records to their versions; False if it takes too long.

    Not within a transaction: on SQLite the mirror would wait for its end.
    """
    from fsm_storage.models import FSMRecord

    if connections[database].in_atomic_block:
        return False
    deadline = time.monotonic() + PATIENCE
    while True:
        rows = FSMRecord.objects.using(database).filter(alias=alias, key__in=list(versions))
        there = dict(rows.values_list("key", "version"))
        if all(there.get(key, 0) >= version for key, version in versions.items()):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _ttl_ms(ttl: TtlOption | Keep) -> int | Literal[Keep.KEEP] | None:
    if ttl is KEEP:
        return KEEP
    seconds = ttl_seconds(ttl)
    return None if seconds is None else max(1, round(seconds * 1000))
