"""Compares Redis with the database, and mends what differs: in either direction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from django.db import connections
from redis.exceptions import ResponseError

from fsm_storage.backends.announcing import RESTORE, run
from fsm_storage.backends.redis import RedisStorage
from fsm_storage.backends.wire import Wire, wire_for
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.keys import record_key
from fsm_storage.mirror.announcing import announce
from fsm_storage.mirror.stream import BATCH, GROUP
from fsm_storage.mirror.worker import PatientWire
from fsm_storage.models import FSMRecord
from fsm_storage.outbox import DATA, STATE, aside_name, missed_name, stream_name, written_at_ms
from fsm_storage.sources.layout import KeyLayout

SAMPLES = 10
SETTLE_SECONDS = 10.0
"""How long a difference is given to go away: the mirror may be on its way to it."""

Report = Callable[[int], None]


class MirrorBehind(FSMStorageError):
    """The outbox holds writes that the database does not have yet."""

    def __init__(self, alias: str, entries: int) -> None:
        super().__init__(
            f"the outbox of storage {alias!r} holds {entries} entries that the database does not have yet: "
            "let the mirror catch up first (manage.py fsm_mirror --until-empty)"
        )
        self.alias, self.entries = alias, entries


class Status(NamedTuple):
    """How far the mirror is."""

    entries: int
    """In the outbox, not applied yet."""
    pending: int
    """Of them, given to a mirror that has not acknowledged them."""
    lag_seconds: float
    """The age of the oldest."""
    missed: int
    """Conversations that were written while the outbox was full, and are not announced yet."""
    aside: int
    """Entries that can never be applied."""
    last_delivered: str
    mirrors: int


class Differences(NamedTuple):
    """What a comparison found: how many conversations are the same, and the keys of the others."""

    same: int
    differ: Sequence[StorageKey]
    only_redis: Sequence[StorageKey]
    only_database: Sequence[StorageKey]
    unread: Sequence[str] = ()
    """Keys in Redis whose names or values say nothing."""
    looked_both_ways: bool = True

    @property
    def total(self) -> int:
        return len(self.differ) + len(self.only_redis) + len(self.only_database)


async def status(storage: RedisStorage) -> Status:
    """Ask Redis how far the mirror of `storage` is."""
    stream = stream_name(storage.alias)
    async with _wire(storage) as wire:
        length, oldest, groups, missed, aside, clock = await wire.ask(
            [
                ("XLEN", stream), ("XRANGE", stream, "-", "+", "COUNT", 1), ("XINFO", "GROUPS", stream),
                ("SCARD", missed_name(storage.alias)), ("XLEN", aside_name(storage.alias)), ("TIME",),
            ]
        )  # fmt: skip
    for reply in (length, oldest, missed, aside, clock):
        if isinstance(reply, Exception):
            raise reply
    group = {} if isinstance(groups, Exception) else _group(groups)
    now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
    lag = max(0, now_ms - written_at_ms(oldest[0][0])) / 1000 if oldest else 0.0
    last = group.get("last-delivered-id", b"")
    return Status(
        length,
        int(group.get("pending", 0)),
        lag,
        missed,
        aside,
        last.decode(),
        int(group.get("consumers", 0)),
    )


async def compare(
    storage: RedisStorage, report: Report = lambda count: None, *, bot_id: int | None = None
) -> Differences:
    """Compare every conversation; `report` gets the count so far.

    What is only in Redis is found where the key builder is aiogram's. Where its keys name no bot, they are
    those of `bot_id`, or of the only bot that the database knows.

    What differs is looked at again until it has been the same, or has differed for `SETTLE_SECONDS`.
    """
    seen, same, unread = 0, 0, list[str]()
    suspects: list[StorageKey] = []
    async with _wire(storage) as wire:
        batches = _from_database(storage)
        while (records := await asyncio.to_thread(next, batches, None)) is not None:
            verdicts = await _verdicts(wire, storage, [record.storage_key for record in records])
            suspects += [key for key, verdict in verdicts.items() if verdict != "same"]
            same += sum(verdict == "same" for verdict in verdicts.values())
            seen += len(records)
            report(seen)
        layout = await asyncio.to_thread(_layout, storage, bot_id)
        if layout is not None:
            async for names in _scan(wire, layout):
                keys, broken = _keys_of(names, layout)
                unread += broken
                known = await asyncio.to_thread(_known, storage, keys)
                suspects += [key for key in keys if record_key(key, None) not in known]
                seen += len(names)
                report(seen)
        verdicts = await _settled(wire, storage, list(dict.fromkeys(suspects)))
    by_verdict: dict[str, list[StorageKey]] = {
        "same": [],
        "differ": [],
        "only_redis": [],
        "only_database": [],
    }
    for key, verdict in verdicts.items():
        by_verdict[verdict].append(key)
    same += len(by_verdict["same"])
    return Differences(
        same,
        by_verdict["differ"],
        by_verdict["only_redis"],
        by_verdict["only_database"],
        unread,
        layout is not None,
    )


async def resync(storage: RedisStorage, found: Differences, *, prune: bool = False) -> int:
    """Announce what differs, so that the mirror mends the database; return how many conversations.

    What only the database has may be all that is left after Redis was wiped: it stays, unless `prune`.
    """
    keys = [*found.differ, *found.only_redis, *(found.only_database if prune else ())]
    async with _wire(storage) as wire:
        await announce(wire, storage, keys)
    return len(keys)


async def restore(storage: RedisStorage, report: Report = lambda count: None) -> int:
    """Write to Redis what the database has and Redis has not, with what is left of each TTL; return how many parts.

    Raises `MirrorBehind` while the outbox holds anything: Redis may lack a part because the bot removed it.
    """
    state = await status(storage)
    if state.entries or state.missed:
        raise MirrorBehind(storage.alias, state.entries + state.missed)
    count = seen = 0
    async with _wire(storage) as wire:
        last_id = await _last_id(wire, stream_name(storage.alias))
        batches = _from_database(storage)
        while (records := await asyncio.to_thread(next, batches, None)) is not None:
            names, arguments = _values_of(storage, records)
            done = await run(wire, RESTORE, [stream_name(storage.alias), *names], [last_id, *arguments])
            if done < 0:  # the bot is at work: begin again when the mirror has caught up
                raise MirrorBehind(storage.alias, 1)
            count += done
            seen += len(records)
            report(seen)
    return count


async def _last_id(wire: Wire, stream: str) -> str:
    """Return the last id that the stream gave out, "" where there is none."""
    (facts,) = await wire.ask([("XINFO", "STREAM", stream)])
    if isinstance(facts, ResponseError):
        return ""
    pairs = facts if isinstance(facts, dict) else dict(zip(facts[::2], facts[1::2], strict=True))
    found: bytes = pairs[b"last-generated-id"]
    return found.decode()


def _values_of(storage: RedisStorage, records: Sequence[FSMRecord]) -> tuple[list[str], list[Any]]:
    names: list[str] = []
    arguments: list[Any] = []
    for record in records:
        key, data = record.storage_key, record.current_data
        if record.current_state is not None:
            names.append(storage.key_builder.build(key, STATE))
            arguments += (record.current_state, _rest_ms(record, record.state_expires_at))
        if data:
            names.append(storage.key_builder.build(key, DATA))
            arguments += (storage.codec.encode(data, record.key), _rest_ms(record, record.data_expires_at))
    return names, arguments


def _rest_ms(record: FSMRecord, expires_at: Any) -> Any:
    if expires_at is None:
        return ""
    return max(1, round((expires_at - record.read_at).total_seconds() * 1000))  # type: ignore[attr-defined]


@asynccontextmanager
async def _wire(storage: RedisStorage) -> AsyncIterator[Wire]:
    wire = PatientWire(wire_for(storage.redis), storage.timeout)
    try:
        yield wire
    finally:
        await wire.hang_up()


def _from_database(storage: RedisStorage) -> Iterator[list[FSMRecord] | None]:
    """Yield the live records in batches, each read by itself: nothing is held meanwhile."""
    last = 0
    while True:
        live = FSMRecord.objects.using(storage.database).filter(alias=storage.alias, pk__gt=last).live()
        records = list(live.with_clock().order_by("pk")[:BATCH])
        connections[storage.database].close()
        if not records:
            return
        last = records[-1].pk
        yield records


async def _verdicts(wire: Wire, storage: RedisStorage, keys: Sequence[StorageKey]) -> dict[StorageKey, str]:
    """Say of each key: "same", "differ", "only_redis" or "only_database"."""
    builder = storage.key_builder
    commands = [("GET", builder.build(key, part)) for key in keys for part in (STATE, DATA)]
    replies = await wire.ask(commands) if commands else []
    records = await asyncio.to_thread(_known, storage, keys)
    found = {}
    for place, key in enumerate(keys):
        record = records.get(record_key(key, None))
        ours = (None, {}) if record is None else (record.current_state, record.current_data)
        found[key] = _verdict(replies[2 * place : 2 * place + 2], ours)
    return found


def _verdict(theirs: Sequence[Any], ours: tuple[str | None, Any]) -> str:
    state, data = theirs
    if state is None and data is None:
        return "same" if ours == (None, {}) else "only_database"
    if ours == (None, {}):
        return "same" if state is None and _data_of(data) == {} else "only_redis"
    try:
        is_same = (None if state is None else state.decode()) == ours[0] and _data_of(data) == ours[1]
    except (AttributeError, ValueError):
        is_same = False
    return "same" if is_same else "differ"


def _data_of(value: Any) -> Any:
    try:
        return {} if value is None else json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None


async def _settled(wire: Wire, storage: RedisStorage, suspects: list[StorageKey]) -> dict[StorageKey, str]:
    verdicts: dict[StorageKey, str] = {}
    deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
    pause = 0.05
    while suspects:
        (length,) = await wire.ask([("XLEN", stream_name(storage.alias))])
        for start in range(0, len(suspects), BATCH):
            verdicts |= await _verdicts(wire, storage, suspects[start : start + BATCH])
        suspects = [key for key in suspects if verdicts[key] != "same"]
        if not suspects or length == 0 or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)
    return verdicts


def _known(storage: RedisStorage, keys: Sequence[StorageKey]) -> dict[str, FSMRecord]:
    texts = [record_key(key, None) for key in keys]
    rows = FSMRecord.objects.using(storage.database).filter(alias=storage.alias, key__in=texts)
    found = {row.key: row for row in rows.live().with_clock()}
    connections[storage.database].close()
    return found


def _layout(storage: RedisStorage, bot_id: int | None) -> KeyLayout | None:
    """Return how the key builder's keys are read, None if nobody knows."""
    builder = storage.key_builder
    if type(builder) is not DefaultKeyBuilder:
        return None
    if bot_id is None and not builder.with_bot_id:
        bots = FSMRecord.objects.using(storage.database).filter(alias=storage.alias).bots_seen(BATCH)
        connections[storage.database].close()
        if len(bots) != 1:
            return None
        bot_id = bots[0]
    return KeyLayout(
        builder.prefix, builder.separator, builder.with_bot_id, builder.with_business_connection_id,
        builder.with_destiny, bot_id,
    )  # fmt: skip


async def _scan(wire: Wire, layout: KeyLayout) -> AsyncIterator[list[bytes]]:
    cursor: Any = 0
    pattern = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in layout.beginning) + "*"
    while True:
        (reply,) = await wire.ask([("SCAN", cursor, "MATCH", pattern, "COUNT", BATCH)])
        if isinstance(reply, Exception):
            raise reply
        cursor, names = reply
        if names:
            yield names
        if int(cursor) == 0:
            return


def _keys_of(names: Sequence[bytes], layout: KeyLayout) -> tuple[list[StorageKey], list[str]]:
    keys: dict[StorageKey, None] = {}
    unread = []
    for name in names:
        try:
            text, part = layout.split(name.decode())
            if part != "lock":
                keys[layout.parse(text)] = None
        except ValueError as error:
            unread.append(f"{name!r}: {error}")
    return list(keys), unread


def _group(groups: Any) -> dict[str, Any]:
    for group in groups:
        flat = list(group)
        found = (
            {name.decode(): value for name, value in group.items()}
            if isinstance(group, dict)
            else {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
        )
        if found.get("name") == GROUP.encode():
            return found
    return {}
