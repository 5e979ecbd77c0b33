"""Batches of the mirror: they come to what each entry by itself would have, and expiry waits for all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage, signals
from fsm_storage.backends.wire import wire_for
from fsm_storage.dialects import AsOf, Cause, Step, Write, WriteReply
from fsm_storage.exceptions import InvalidData
from fsm_storage.mirror import worker
from fsm_storage.mirror.applying import Applier, Clock, Entry
from fsm_storage.mirror.stream import BATCH_BYTES, Stream
from fsm_storage.mirror.table import MirrorTable
from fsm_storage.models import FSMRecord, FSMTransition, UtcNow
from fsm_storage.outbox import Record, encode, missed_name, version_of
from fsm_storage.patches import Patch
from tests.redis.conftest import ALIAS, Mirrored
from tests.redis.mirroring import becomes, mirror_all, mirroring, other
from tests.rows import in_thread, record, records, transitions

T0 = 1_700_000_000_000
"""When the entries of these tests were written, in milliseconds."""
LATER = Clock(T0 + 3_600_000)


def entry(ms: int, *records: Record, number: int = 0) -> Entry:
    pairs = encode(records)
    fields = dict(zip(map(str.encode, pairs[::2]), map(str.encode, pairs[1::2]), strict=True))
    return Entry(f"{T0 + ms}-{number}", fields)


def story(seed: int) -> list[Entry]:
    """A few chats that do all sorts of things, some of which expire before the next one."""
    choose = random.Random(seed)
    entries, ms = [], 0
    for number in range(60):
        ms += choose.choice([0, 1, 40, 900])
        some = []
        for chat in choose.sample(range(1, 5), choose.choice([1, 1, 2])):
            ttl = choose.choice([None, 50, 500, 10_000_000])
            source = choose.choice([("", ""), ("", ""), ("admin", "ann")])
            if choose.random() < 0.6:
                value: str | None = choose.choice(["a", "b", "c", None])
                some.append(Record(other(chat), "state", value, ttl, *source))
            else:
                value = choose.choice([f'{{"n": {number}}}', None])
                some.append(Record(other(chat), "data", value, ttl, *source))
        entries.append(entry(ms, *some, number=number))
    return entries


def what_is_there(database: str) -> tuple[list[Any], list[Any]]:
    """Return the records and the history, and leave nothing."""
    rows = FSMRecord.objects.using(database).order_by("key")
    fields = ("key", "state", "data", "version", "updated_at", "state_expires_at", "data_expires_at")
    steps = FSMTransition.objects.using(database).order_by("key", "id")
    found = (
        # A record of which nothing was left within a batch need not have been made.
        [row for row in rows.values_list(*fields) if row[1:3] != (None, {})],
        list(
            steps.values_list(
                "key", "from_state", "to_state", "at", "source", "actor", "data_before", "data_after"
            )
        ),
    )
    rows.delete()
    steps.delete()
    return found


@pytest.mark.parametrize("history", ["off", "states", "full"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_batches_with_any_repetitions_come_to_the_same(
    mirrored: Mirrored, database: str, history: Any, seed: int
) -> None:
    entries, choose = story(seed), random.Random(seed)
    applier = Applier(MirrorTable(mirrored(history=history)), history)

    def one_by_one() -> None:
        for one in entries:
            applier.apply([one], LATER)

    def in_batches() -> None:
        place = 0
        while place < len(entries):
            size = choose.randint(1, 25)
            applier.apply(entries[max(0, place - choose.choice([0, 0, 7])) : place + size], LATER)
            place += size

    await in_thread(one_by_one)
    expected = await in_thread(what_is_there, database)
    await in_thread(in_batches)
    found = await in_thread(what_is_there, database)
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert (history == "off") == (not expected[1])


async def test_a_batch_is_one_write_for_each_key(mirrored: Mirrored, database: str) -> None:
    written: list[int] = []

    class Table(MirrorTable):
        def replay(self, writes: Any, cause: Cause) -> Any:
            written.append(len(writes))
            return super().replay(writes, cause)

    entries = [
        entry(n, Record(other(n % 3), "state", f"s{n}"), Record(other(n % 3), "data", f'{{"n": {n}}}'))
        for n in range(60)
    ]
    await in_thread(Applier(Table(mirrored()), "states").apply, entries, LATER)
    assert written == [3]
    assert len(await in_thread(transitions, database)) == 60


class Strict(MirrorTable):
    """Stands for a database that refuses what Python can read, which nobody has found for those that we have."""

    def replay(self, writes: Sequence[Write], cause: Cause) -> Sequence[WriteReply]:
        refused = {write.key for write in writes if "refuse" in str(write.patch.data)}
        done = iter(super().replay([write for write in writes if write.key not in refused], cause))
        return [InvalidData("", "refused", one.key) if one.key in refused else next(done) for one in writes]


async def test_what_is_bad_in_a_batch_is_told_apart(mirrored: Mirrored, database: str) -> None:
    entries = [
        entry(1, Record(other(1), "state", "a")),
        entry(2, Record(other(1), "data", '{"n": 1}')),
        entry(3, Record(other(1), "data", '{"n": NaN}')),
        entry(4, Record(other(2), "state", "b")),
        entry(5, Record(other(2), "data", '{"n": "refuse"}')),
        entry(6, Record(other(1), "state", "c")),
        entry(7, Record(other(2), "state", "d")),
    ]
    applied = await in_thread(Applier(Strict(mirrored()), "states").apply, entries, LATER)
    assert {one.id for one, _ in applied.poison} == {entries[2].id, entries[4].id}
    rows = {row.chat_id: row for row in await in_thread(records, database)}
    assert [(row.state, row.data) for row in (rows[1], rows[2])] == [("c", {"n": 1}), ("d", {})]
    for chat, states in ((1, "ac"), (2, "bd")):
        steps = await in_thread(transitions, database, chat_id=chat)
        assert [step[1] for step in steps] == list(states)


async def test_who_listens_is_told_of_each_step(mirrored: Mirrored, database: str) -> None:
    told: list[tuple[Any, ...]] = []

    def hear(sender: Any, old_state: Any, new_state: Any, source: str, **more: Any) -> None:
        told.append((sender, old_state, new_state, source))

    entries = [
        entry(1, Record(other(1), "state", "a")), entry(2, Record(other(1), "data", '{"n": 1}')),
        entry(3, Record(other(1), "state", "b", None, "admin", "ann")), entry(4, Record(other(1), "state", "c")),
    ]  # fmt: skip
    applier = Applier(MirrorTable(mirrored()), "states")
    signals.state_changed.connect(hear)
    try:
        await in_thread(applier.apply, entries, LATER)
    finally:
        signals.state_changed.disconnect(hear)
    assert told == [
        (RedisStorage, None, "a", "bot"), (RedisStorage, "a", "b", "admin"), (RedisStorage, "b", "c", "bot"),
    ]  # fmt: skip
    assert len(await in_thread(transitions, database)) == 3


async def test_a_batch_has_no_more_bytes_than_it_may(mirrored: Mirrored, raw: redis.Redis) -> None:
    storage = mirrored()
    large = BATCH_BYTES * 2 // 5
    for chat in range(9):
        await storage.set_data(other(chat), {"text": "x" * large})
    wire = wire_for(storage.redis)
    stream = Stream(wire, ALIAS, "test")
    await stream.make_group()
    found = [await stream.read(">", 500) for _ in range(4)]
    assert [len(one.entries) for one in found] == [3, 3, 3, 0]
    assert [one.all_until is not None for one in found] == [False, False, False, True]
    again = [await stream.read("0", 500), await stream.read(found[0].entries[-1].id, 500)]
    assert [one.entries for one in again] == [one.entries for one in found[:2]]
    assert len((await stream.read("0", 2)).entries) == 2
    await wire.hang_up()


# Expiry


async def test_a_renewal_that_is_not_applied_yet_is_no_expiry(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored(state_ttl=1000, data_ttl=1000)
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await mirror_all(storage)
    await storage.set_state(key, "b", ttl=2000)
    await storage.set_data(key, {"n": 2}, ttl=2000)
    await asyncio.sleep(1.5)  # the two clocks are compared only as well as the machine allows
    # For the database's clock, the first state has expired by now, after it was renewed.
    rows = FSMRecord.objects.using(database)
    await in_thread(lambda: rows.update(state_expires_at=UtcNow(), data_expires_at=UtcNow()))
    async with mirroring(storage):
        await becomes(lambda: in_thread(lambda: record(database).data == {"n": 2}))
        await asyncio.sleep(0.6)
    assert await in_thread(transitions, database) == [(None, "a", "bot", ""), ("a", "b", "bot", "")]


async def test_an_expiry_between_two_writes_is_noted_when_it_was(mirrored: Mirrored, database: str) -> None:
    entries = [
        entry(0, Record(other(1), "state", "a", 100)), entry(500, Record(other(1), "state", "b", 100)),
        entry(550, Record(other(1), "state", "c", 100)), entry(900, Record(other(1), "state", None)),
    ]  # fmt: skip
    applier = Applier(MirrorTable(mirrored()), "states")
    await in_thread(applier.apply, entries[:1], LATER)
    await in_thread(applier.apply, entries, LATER)
    steps = await in_thread(
        lambda: [
            (before, after, round(at.timestamp() * 1000) - T0, source)
            for before, after, at, source in FSMTransition.objects.using(database)
            .order_by("id")
            .values_list("from_state", "to_state", "at", "source")
        ]
    )
    assert steps == [
        (None, "a", 0, "bot"), ("a", None, 100, "expiry"), (None, "b", 500, "bot"), ("b", "c", 550, "bot"),
        ("c", None, 650, "expiry"),
    ]  # fmt: skip


async def test_a_sweep_goes_no_further_than_the_mirror(mirrored: Mirrored, database: str) -> None:
    table = MirrorTable(mirrored())
    await in_thread(
        Applier(table, "states").apply,
        [entry(0, Record(other(1), "state", "a", 100)), entry(50, Record(other(2), "state", "b", 100))],
        LATER,
    )

    def sweep(ms: int, below: int) -> int:
        return table.sweep(as_of=AsOf(version_of(f"{T0 + below}-0"), (T0 + ms) / 1000))[0]

    assert await in_thread(sweep, 99, 1000) == 0
    assert await in_thread(sweep, 1000, 0) == 0
    assert await in_thread(sweep, 120, 1000) == 1
    assert [row.state for row in await in_thread(records, database) if row.state] == ["b"]
    assert await in_thread(sweep, 150, 51) == 1


async def test_a_busy_bot_is_swept_too(
    mirrored: Mirrored, database: str, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SWEEP_EVERY", 0.2)
    storage = mirrored()
    talking = True

    async def talk() -> None:
        while talking:
            await storage.set_data(other(1), {"at": "work"})
            await asyncio.sleep(0.02)

    async with mirroring(storage):
        task = asyncio.create_task(talk())
        await storage.set_state(key, "a", ttl=0.3)
        await becomes(
            lambda: in_thread(lambda: ("a", None, "expiry", "") in transitions(database, chat_id=key.chat_id))
        )
        talking = False
        await task


async def test_what_was_missed_holds_the_sweep_up(mirrored: Mirrored, raw: redis.Redis) -> None:
    storage = mirrored()
    await storage.set_state(other(1), "a")
    wire = wire_for(storage.redis)
    stream = Stream(wire, ALIAS, "test")
    await stream.make_group()
    raw.sadd(missed_name(ALIAS), "[42,2,2]")
    assert (await stream.read(">", 500)).all_until is None
    raw.srem(missed_name(ALIAS), "[42,2,2]")
    assert (await stream.read(">", 500)).all_until is not None
    await wire.hang_up()


async def test_a_step_that_the_record_has_seen_is_not_noted_again(mirrored: Mirrored, database: str) -> None:
    table, cause = MirrorTable(mirrored()), Cause()

    def write(version: int, *steps: Step) -> None:
        last = steps[-1]
        as_of = AsOf(version, last.at, steps)
        table.replay([Write("42:1:1", other(1), Patch(state=last.state), as_of=as_of)], cause)

    one, two, three = (Step(f"s{n}", n, T0 / 1000 + n, cause) for n in (1, 2, 3))
    await in_thread(write, 2, one, two)
    await in_thread(write, 3, one, two, three)
    await in_thread(write, 3, two, three)
    assert [step[1] for step in await in_thread(transitions, database)] == ["s1", "s2", "s3"]
