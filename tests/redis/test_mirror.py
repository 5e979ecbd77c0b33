"""The mirror on real servers: everything that Redis acknowledged is in the database, once, in order."""

from __future__ import annotations

import asyncio
import io
import json
import time
from itertools import pairwise
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey
from django.core.management import CommandError, call_command
from django.db import transaction

from fsm_storage.backends import redis_editing
from fsm_storage.conf import storages
from fsm_storage.dialects import Fence, Naming
from fsm_storage.exceptions import LeaseLost, RedisConflict, RedisUnavailable
from fsm_storage.mirror import repairing, worker
from fsm_storage.mirror.applying import Applier, Clock, Entry
from fsm_storage.mirror.stream import GROUP
from fsm_storage.mirror.table import MirrorTable
from fsm_storage.models import FSMPeer, FSMRecord, FSMTransition
from fsm_storage.outbox import Record, aside_name, encode, missed_name, stream_name, version_of
from tests.redis.conftest import ALIAS, BUILDER, Make, Mirrored
from tests.redis.mirroring import becomes, mirror_all, mirroring, other
from tests.rows import in_thread, let_time_pass, record, records, transitions
from tests.servers import RedisServer


async def test_what_was_written_is_in_the_database(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis
) -> None:
    storage = mirrored(state_ttl=100)
    await storage.set_state(key, "Form:name")
    await storage.set_data(key, {"big": 2**64 + 1, "float": 1e23, "text": 'é"\\'})
    await storage.update_data(key, {"more": [1, None]})
    await storage.set_state(other(5, thread_id=0, business_connection_id="", destiny="x:y"), "")
    await mirror_all(storage)
    row = await in_thread(record, database, alias=ALIAS, chat_id=key.chat_id)
    assert row.storage_key == key
    assert (row.state, row.data) == (
        "Form:name",
        {"big": 2**64 + 1, "float": 1e23, "text": 'é"\\', "more": [1, None]},
    )
    assert row.data_expires_at is None
    assert 0 < (row.state_expires_at - row.updated_at).total_seconds() <= 100.5
    second = await in_thread(record, database, alias=ALIAS, chat_id=5)
    assert second.storage_key == other(5, thread_id=0, business_connection_id="", destiny="x:y")
    assert second.state == ""
    assert raw.xlen(stream_name(ALIAS)) == 0


async def test_the_history_has_each_step_with_its_own_time(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored()
    for state in ("a", "b", "b", None):
        await storage.set_state(key, state)
        await storage.update_data(key, {"at": state})
        await asyncio.sleep(0.05)
    await mirror_all(storage)
    steps = await in_thread(transitions, database, alias=ALIAS)
    assert steps == [(None, "a", "bot", ""), ("a", "b", "bot", ""), ("b", None, "bot", "")]
    times = await in_thread(
        lambda: list(FSMTransition.objects.using(database).order_by("id").values_list("at", flat=True))
    )
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    assert gaps[0] >= 0.04
    assert gaps[1] >= 0.09


async def test_full_history_has_the_data_too(mirrored: Mirrored, database: str, key: StorageKey) -> None:
    storage = mirrored(history="full")
    for n in range(3):
        await storage.set_data(key, {"n": n})
    await mirror_all(storage)
    found = await in_thread(
        lambda: list(
            FSMTransition.objects.using(database).order_by("id").values_list("data_before", "data_after")
        )
    )
    assert found == [({}, {"n": 0}), ({"n": 0}, {"n": 1}), ({"n": 1}, {"n": 2})]


async def test_what_was_removed_is_idle(mirrored: Mirrored, database: str, key: StorageKey) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    await storage.set_data(key, {"a": 1})
    await mirror_all(storage)
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    await mirror_all(storage)
    rows = await in_thread(records, database)
    assert [(row.state, row.data) for row in rows] in ([], [(None, {})])


async def test_an_entry_that_comes_again_does_nothing(mirrored: Mirrored, database: str) -> None:
    storage = mirrored()
    key = other(1)

    def entry(number: int, part: Any, value: str | None) -> Entry:
        pairs = encode([Record(key, part, value)])
        return Entry(
            f"1700000000000-{number}",
            dict(zip(map(str.encode, pairs[::2]), map(str.encode, pairs[1::2]), strict=True)),
        )

    entries = [entry(1, "state", "a"), entry(2, "data", '{"n": 2}'), entry(3, "state", "b")]
    applier = Applier(MirrorTable(storage), "states")
    for some in (entries[:1], entries, entries, entries[:2], entries[1:]):
        await in_thread(applier.apply, some, Clock(1700000001000))
    row = await in_thread(record, database, alias=ALIAS)
    assert (row.state, row.data, row.version) == ("b", {"n": 2}, version_of("1700000000000-3"))
    steps = await in_thread(transitions, database, alias=ALIAS)
    assert steps == [(None, "a", "bot", ""), ("a", "b", "bot", "")]


async def test_what_a_dead_mirror_was_given_is_applied_first(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis
) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    await storage.set_state(key, "b")
    raw.xgroup_create(stream_name(ALIAS), GROUP, "0")
    raw.xreadgroup(GROUP, "dead", {stream_name(ALIAS): ">"})
    await storage.set_state(key, "c")
    await mirror_all(storage)
    assert await in_thread(transitions, database, alias=ALIAS) == [
        (None, "a", "bot", ""), ("a", "b", "bot", ""), ("b", "c", "bot", ""),
    ]  # fmt: skip
    assert raw.xpending(stream_name(ALIAS), GROUP)["pending"] == 0


async def test_of_two_mirrors_one_works_and_the_other_takes_over(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored()
    async with mirroring(storage) as first:
        await storage.set_state(key, "a")
        await becomes(lambda: in_thread(lambda: first.is_active))
        async with mirroring(storage) as second:
            await asyncio.sleep(0.3)
            assert not second.is_active
            first.stop()
            await becomes(lambda: in_thread(lambda: second.is_active))
            await storage.set_state(key, "b")
            await becomes(lambda: in_thread(lambda: record(database, alias=ALIAS).state == "b"))


async def test_poison_is_put_aside_and_the_rest_goes_on(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    entry_id = raw.xadd(stream_name(ALIAS), {"[0,no JSON": "x"})
    raw.xadd(stream_name(ALIAS), {'[0,"data",null,42,7,7]': "[1, 2]"})
    raw.xadd(stream_name(ALIAS), {'[0,"state",null,42,8,8]': "x" * 300})
    await storage.set_state(other(9), "z")
    mirror = await mirror_all(storage)
    assert mirror.progress.poison == 3
    assert entry_id.decode() in caplog.text
    assert [row.state for row in await in_thread(records, database)] == ["a", "z"]
    assert raw.xlen(aside_name(ALIAS)) == 3
    assert raw.xlen(stream_name(ALIAS)) == 0


async def test_it_goes_on_when_redis_was_wiped(mirrored: Mirrored, database: str, raw: redis.Redis) -> None:
    storage = mirrored()
    async with mirroring(storage):
        await storage.set_state(other(1), "a")
        await becomes(lambda: in_thread(lambda: len(records(database)) == 1))
        raw.flushall()
        await storage.set_state(other(2), "b")
        await becomes(lambda: in_thread(lambda: len(records(database)) == 2))
    assert {row.state for row in await in_thread(records, database)} == {"a", "b"}


async def test_what_was_missed_while_the_outbox_was_full_is_mirrored_as_it_is(
    mirrored: Mirrored, database: str, raw: redis.Redis
) -> None:
    storage = mirrored(outbox_bytes=20_000)
    for n in range(400):
        await storage.set_data(other(n % 40), {"n": n, "text": "x" * 200})
    await asyncio.sleep(0.6)
    for n in range(400, 480):
        await storage.set_data(other(n % 40), {"n": n, "text": "x" * 200})
    assert raw.scard(missed_name(ALIAS)) > 0
    await mirror_all(storage)
    assert raw.scard(missed_name(ALIAS)) == 0
    found = {row.chat_id: row.data["n"] for row in await in_thread(records, database)}
    assert found == {chat: 440 + chat for chat in range(40)}


async def test_the_mirror_runs_in_the_bot_by_default(
    mirrored: Mirrored, database: str, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LAST_SECONDS", 30.0)  # a machine may stand still just then
    storage = mirrored(mirror=True, timeout=30)
    await storage.set_state(key, "a")
    await becomes(lambda: in_thread(lambda: [row.state for row in records(database)] == ["a"]))
    await storage.set_state(key, "b")
    await storage.close()
    assert [row.state for row in await in_thread(records, database)] == ["b"]


async def test_what_expires_in_redis_expires_in_the_database(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored(state_ttl=50)
    await storage.set_state(key, "a")
    await mirror_all(storage)
    await in_thread(let_time_pass, database, 60)
    assert await in_thread(lambda: FSMRecord.objects.using(database).live().count()) == 0


# Edits


async def edited(database: str, changes: dict[str, Any], **filters: Any) -> FSMRecord:
    def edit() -> FSMRecord:
        row = FSMRecord.objects.using(database).with_clock().get(alias=ALIAS, **filters)
        row.edit(**changes, if_version=row.version)
        return row

    return await in_thread(edit)


async def test_an_edit_goes_to_redis_first(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis
) -> None:
    storage = mirrored(data_ttl=500)
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 2**60 + 1})
    async with mirroring(storage):
        await becomes(lambda: in_thread(lambda: [row.state for row in records(database)] == ["a"]))
        row = await edited(database, {"state": "b", "by": "ann"})
    assert row.state == "b"
    assert await storage.get_state(key) == "b"
    assert await storage.get_data(key) == {"n": 2**60 + 1}
    assert (await in_thread(transitions, database, alias=ALIAS))[-1] == ("a", "b", "admin", "ann")


async def test_an_edit_keeps_the_time_to_expiry_unless_it_is_changed(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis
) -> None:
    storage = mirrored(state_ttl=500, data_ttl=500)
    await storage.set_state(key, "a")
    raw.pexpire(BUILDER.build(key, "state"), 100_000)
    async with mirroring(storage):
        await becomes(lambda: in_thread(lambda: len(records(database)) == 1))
        await edited(database, {"state": "b", "data": {"x": 1}})
        assert 50_000 < raw.pttl(BUILDER.build(key, "state")) <= 100_000
        assert 400_000 < raw.pttl(BUILDER.build(key, "data")) <= 500_000
        await edited(database, {"state_ttl": None})
        assert raw.pttl(BUILDER.build(key, "state")) == -1
        row = await in_thread(record, database, alias=ALIAS)
    assert row.state_expires_at is None
    assert (row.state, row.data) == ("b", {"x": 1})


@pytest.mark.parametrize("part", ["state", "data"])
async def test_a_running_conversation_is_never_overwritten(
    mirrored: Mirrored, database: str, key: StorageKey, part: str
) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await mirror_all(storage)
    await (storage.set_state(key, "moved") if part == "state" else storage.set_data(key, {"n": 2}))
    with pytest.raises(RedisConflict, match="changed meanwhile"):
        await edited(database, {"state": "b"})
    assert await storage.get_state(key) == ("moved" if part == "state" else "a")


async def test_an_edit_while_redis_is_down_changes_nothing(
    make: Make, configured: None, own_redis: RedisServer, database: str, key: StorageKey
) -> None:
    storage = storages[ALIAS] = make(own_redis.url, alias=ALIAS, database=database)
    await storage.set_state(key, "a")
    await mirror_all(storage)
    own_redis.stop()
    with pytest.raises(RedisUnavailable):
        await edited(database, {"state": "b"})
    assert (await in_thread(record, database, alias=ALIAS)).state == "a"


# Looking after it


async def command(*arguments: str) -> dict[str, Any]:
    out = io.StringIO()
    try:
        await asyncio.to_thread(
            call_command,
            "fsm_mirror",
            f"--alias={ALIAS}",
            "--json",
            *arguments,
            stdout=out,
            stderr=io.StringIO(),
        )
    except CommandError as error:
        return {**json.loads(out.getvalue() or "{}"), "exit": error.returncode}
    return {**json.loads(out.getvalue()), "exit": 0}


async def test_verify_and_resync_find_and_mend(mirrored: Mirrored, database: str, raw: redis.Redis) -> None:
    storage = mirrored()
    for chat in range(1, 21):
        await storage.set_state(other(chat), "a")
        await storage.set_data(other(chat), {"n": chat})
    await mirror_all(storage)
    assert (await command("--verify")) == {
        "same": 20, "differ": 0, "only_redis": 0, "only_database": 0, "unreadable": 0, "both_ways": True,
        "samples": {"differ": [], "only_redis": [], "only_database": []}, "exit": 0,
    }  # fmt: skip
    raw.set(BUILDER.build(other(3), "state"), "written by another program")
    raw.set(BUILDER.build(other(99), "data"), '{"new": true}')
    raw.delete(BUILDER.build(other(5), "state"), BUILDER.build(other(5), "data"))
    found = await command("--verify")
    assert (found["differ"], found["only_redis"], found["only_database"], found["exit"]) == (1, 1, 1, 3)
    assert found["samples"]["only_redis"] == ["42:99:99"]
    assert (await command("--resync"))["announced"] == 2
    await mirror_all(storage)
    found = await command("--verify")
    assert (found["differ"], found["only_redis"], found["only_database"]) == (0, 0, 1)
    assert (await in_thread(record, database, chat_id=3)).state == "written by another program"
    await command("--resync", "--prune")
    await mirror_all(storage)
    assert (await command("--verify"))["exit"] == 0


async def test_a_wiped_redis_is_restored(mirrored: Mirrored, database: str, raw: redis.Redis) -> None:
    storage = mirrored(data_ttl=300)
    for chat in range(1, 30):
        await storage.set_state(other(chat), f"s{chat}")
        await storage.set_data(other(chat), {"n": 2**60 + chat})
    await mirror_all(storage)
    before = {name: raw.get(name) for name in raw.keys("fsm:*")}
    raw.flushall()
    await storage.set_state(other(1), "newer")
    assert (await command("--restore"))["exit"] == 1  # the outbox has something
    await mirror_all(storage)
    assert (await command("--restore"))["restored"] == 57
    after = {name: raw.get(name) for name in raw.keys("fsm:*")}
    assert after == {**before, BUILDER.build(other(1), "state").encode(): b"newer"}
    assert 0 < raw.pttl(BUILDER.build(other(2), "data")) <= 300_000
    assert (await command("--verify"))["exit"] == 0


async def test_status_says_how_far_it_is(mirrored: Mirrored, database: str, key: StorageKey) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    await asyncio.sleep(0.05)  # or more
    now = await command("--status", "--max-lag=0.01")
    assert (now["entries"], now["exit"]) == (1, 3)
    await mirror_all(storage)
    now = await command("--status")
    assert (now["entries"], now["pending"], now["lag_seconds"], now["exit"]) == (0, 0, 0.0, 0)


async def test_a_busy_bot_is_mirrored_exactly(
    mirrored: Mirrored, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairing, "SETTLE_SECONDS", 60.0)
    storage = mirrored()
    async with mirroring(storage) as mirror:

        async def talk(chat: int) -> None:
            for n in range(60):
                await storage.set_state(other(chat), f"s{n % 7}")
                await storage.update_data(other(chat), {f"k{n % 5}": n})

        async def is_done() -> bool:
            return mirror.progress.writes >= 32 * 60 * 2

        await asyncio.gather(*(talk(chat) for chat in range(1, 33)))
        found = await repairing.compare(storage)
        assert found.total == 0
        assert found.same == 32
        await becomes(is_done)  # it counts a moment after it has written
        assert mirror.progress.writes == 32 * 60 * 2
    steps = await in_thread(transitions, database, alias=ALIAS, chat_id=1)
    assert [step[1] for step in steps] == [f"s{n % 7}" for n in range(60)]


# What a review found


async def test_a_wiped_redis_whose_clock_is_behind_gives_out_no_old_versions(
    mirrored: Mirrored, database: str, key: StorageKey, raw: redis.Redis
) -> None:
    storage = mirrored()
    raw.xgroup_create(stream_name(ALIAS), GROUP, "0", mkstream=True)
    now_ms = raw.time()[0] * 1000
    raw.execute_command("XSETID", stream_name(ALIAS), f"{now_ms + 3_600_000}-0")  # an hour ahead
    await storage.set_state(key, "a")
    await mirror_all(storage)
    raw.flushall()
    await mirror_all(storage)
    await storage.set_state(key, "b")
    await mirror_all(storage)
    assert (await in_thread(record, database, alias=ALIAS)).state == "b"


async def test_a_mirror_that_was_overtaken_writes_nothing_more(mirrored: Mirrored, database: str) -> None:
    pairs = encode([Record(other(1), "state", "a")])
    entry = Entry("1700000000000-0", {pairs[0].encode(): pairs[1].encode()})
    applier = Applier(MirrorTable(mirrored()), "states")
    with pytest.raises(LeaseLost):
        await in_thread(applier.apply, [entry], Clock(1700000001000), Fence("outbox", 7))
    assert await in_thread(records, database) == []


async def test_until_empty_ends_while_another_mirror_works(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored()
    async with mirroring(storage) as first:
        await storage.set_state(key, "a")
        await becomes(lambda: in_thread(lambda: first.is_active))
        await mirror_all(storage)
    assert (await in_thread(record, database, alias=ALIAS)).state == "a"


async def test_of_several_edits_those_that_moved_on_are_left_out(mirrored: Mirrored, database: str) -> None:
    storage = mirrored()
    for chat in range(1, 6):
        await storage.set_state(other(chat), "a")
    await mirror_all(storage)
    await storage.set_state(other(3), "moved")
    edit = FSMRecord.objects.using(database).order_by("pk").edit
    assert await in_thread(edit, state="b") == 4
    await mirror_all(storage)
    states = {row.chat_id: row.state for row in await in_thread(records, database)}
    assert states == {1: "b", 2: "b", 3: "moved", 4: "b", 5: "b"}


async def test_an_edit_in_a_transaction_does_not_wait_for_the_mirror(
    mirrored: Mirrored, database: str, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_editing, "PATIENCE", 40.0)
    storage = mirrored()
    await storage.set_state(key, "a")
    await mirror_all(storage)

    def edit() -> float:
        began = time.monotonic()
        with transaction.atomic(using=database):
            FSMRecord.objects.using(database).get(alias=ALIAS).edit(state="b")
        return time.monotonic() - began

    assert await in_thread(edit) < 20
    await mirror_all(storage)
    assert (await in_thread(record, database, alias=ALIAS)).state == "b"


async def test_a_restore_does_not_bring_back_what_the_bot_removes_meanwhile(
    mirrored: Mirrored, database: str, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = mirrored()
    await storage.set_state(key, "a")
    await mirror_all(storage)
    read = repairing._values_of

    removals: list[asyncio.Task[None]] = []

    def slow(*arguments: Any) -> Any:
        removals.append(asyncio.create_task(storage.set_state(key, None)))
        return read(*arguments)

    monkeypatch.setattr(repairing, "_values_of", slow)
    real_run = repairing.run

    async def run_later(*arguments: Any) -> Any:
        await asyncio.gather(*removals)
        return await real_run(*arguments)

    monkeypatch.setattr(repairing, "run", run_later)
    with pytest.raises(repairing.MirrorBehind):
        await repairing.restore(storage)
    assert await storage.get_state(key) is None


async def test_names_go_to_the_database_and_leases_to_redis(
    mirrored: Mirrored, database: str, key: StorageKey
) -> None:
    storage = mirrored()
    async with storage.create_isolation().lock(key):
        named = [storage.submit(Naming(7, "Ann Example", "ann")), storage.submit(Naming(8, "Ben", ""))]
        await asyncio.gather(*named)
    rows = await in_thread(lambda: list(FSMPeer.objects.using(database).order_by("pk").values_list("title")))
    assert rows == [("Ann Example",), ("Ben",)]
