"""Times to live, judged by the database's clock, and the sweep."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO

import pytest
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from django.core.management import CommandError, call_command
from django.utils import timezone

from fsm_storage import DjangoStorage, MemoryStorage, storages, with_ttl
from fsm_storage.exceptions import InvalidTtl, InvalidTtlType, TtlNotSupported
from fsm_storage.models import FSMRecord, FSMTransition
from tests.rows import in_thread, let_time_pass, record, records, transitions

Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


async def pass_time(storage: DjangoStorage, seconds: float) -> None:
    await in_thread(let_time_pass, storage.database, seconds)


async def test_state_ttl_alone_lets_the_data_live(make_storage: Make, key: StorageKey) -> None:
    storage = make_storage(state_ttl=100)
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await pass_time(storage, 10_000)
    assert await storage.get_state(key) is None
    assert await storage.get_data(key) == {"n": 1}


async def test_data_ttl_alone_lets_the_state_live(make_storage: Make, key: StorageKey) -> None:
    storage = make_storage(data_ttl=100)
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await pass_time(storage, 10_000)
    assert await storage.get_state(key) == "a"
    assert await storage.get_data(key) == {}


async def test_without_ttl_nothing_expires(storage: DjangoStorage, database: str, key: StorageKey) -> None:
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    row = await in_thread(record, database)
    assert (row.state_expires_at, row.data_expires_at) == (None, None)


@pytest.mark.parametrize("ttl", [30, 0.25, timedelta(hours=2), timedelta(days=36525)], ids=str)
async def test_the_time_of_expiry_is_now_and_the_ttl(
    make_storage: Make, database: str, key: StorageKey, ttl: float | timedelta
) -> None:
    storage = make_storage(state_ttl=ttl, data_ttl=ttl)
    for write in (
        lambda: storage.set_state(key, "a"),
        lambda: storage.set_data(key, {"n": 1}),
        lambda: storage.update_data(key, {"n": 2}),
        lambda: asyncio.gather(storage.set_state(key, "b"), storage.set_state(chat(5), "b")),
    ):
        before = datetime.now(UTC)
        await write()
        after = datetime.now(UTC)
        row = await in_thread(record, database, chat_id=key.chat_id)
        delta = ttl if isinstance(ttl, timedelta) else timedelta(seconds=ttl)
        slack = timedelta(milliseconds=5)
        newest = max(filter(None, (row.state_expires_at, row.data_expires_at)))
        assert before + delta - slack <= newest <= after + delta + slack


async def test_a_ttl_under_a_second_is_kept_to_a_tenth(make_storage: Make, key: StorageKey) -> None:
    storage = make_storage(state_ttl=0.4)
    asked_first = time.monotonic()
    await storage.set_state(key, "a")
    began, seen = time.monotonic(), 0.0
    while True:
        asked = time.monotonic() - began
        if await storage.get_state(key) != "a":
            break
        seen = asked
        await asyncio.sleep(0.01)
    assert seen < 0.5  # who asks later than that does not see it
    assert time.monotonic() - asked_first > 0.29


async def test_the_bots_clock_does_not_matter(
    make_storage: Make, database: str, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(state_ttl=1800, data_ttl=1800)
    await storage.set_state(key, "a")
    real_time, real_now = time.time, timezone.now
    for hours in (1, -1):
        monkeypatch.setattr(time, "time", lambda hours=hours: real_time() + 3600 * hours)
        monkeypatch.setattr(timezone, "now", lambda hours=hours: real_now() + timedelta(hours=hours))
        assert await storage.get_state(key) == "a"
        await storage.set_state(key, "a")
        await storage.set_data(key, {"n": hours})
        await asyncio.gather(*(storage.update_data(chat(n), {"n": hours}) for n in range(5)))
        for row in await in_thread(records, database):
            for instant in filter(None, (row.state_expires_at, row.data_expires_at)):
                assert abs(instant - real_now() - timedelta(seconds=1800)) < timedelta(seconds=20)
            assert abs(row.updated_at - real_now()) < timedelta(seconds=20)


async def test_two_bots_agree_about_what_has_expired(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    one, other = make_storage(state_ttl=100), make_storage(state_ttl=7)
    await one.set_state(key, "a")
    await pass_time(one, 50)
    assert await other.get_state(key) == "a"
    await pass_time(one, 51)
    assert await one.get_state(key) is None
    assert await other.get_state(key) is None


async def test_an_expired_state_that_is_overwritten_is_noted_first(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage(state_ttl=100)
    await storage.set_state(key, "a")
    await pass_time(storage, 150)
    await storage.set_state(key, "a")
    await pass_time(storage, 150)
    await storage.set_state(key, None)
    assert await in_thread(transitions, database) == [
        (None, "a", "bot", ""),
        ("a", None, "expiry", ""),
        (None, "a", "bot", ""),
        ("a", None, "expiry", ""),
    ]


# The querysets and the sweep


async def fill(storage: DjangoStorage) -> None:
    """1 is live, 2 lost its state, 3 its data, 4 both, 5 was cleared by the bot."""
    for n in range(1, 6):
        await storage.set_state(chat(n), f"s{n}")
        await storage.set_data(chat(n), {"n": n})
    await pass_time(storage, 101)
    await storage.set_state(chat(1), "live")
    await storage.set_data(chat(1), {"n": 1})
    await storage.set_data(chat(2), {"n": 2})
    await storage.set_state(chat(3), "s3")
    await storage.set_state(chat(5), None)
    await storage.set_data(chat(5), {})


def chats(records: object) -> set[int]:
    return {row.chat_id for row in records}  # type: ignore[attr-defined]


async def test_querysets_know_what_expired(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    await fill(storage)
    rows = FSMRecord.objects.using(database)
    assert await in_thread(lambda: chats(rows.live())) == {1, 2, 3}
    assert await in_thread(lambda: chats(rows.idle())) == {4, 5}
    assert await in_thread(lambda: chats(rows.state_expired())) == {2, 4}
    assert await in_thread(lambda: chats(rows.in_state("live", "s2", "s3", "s4"))) == {1, 3}
    assert await in_thread(lambda: chats(rows.in_state(None))) == {2, 4, 5}
    assert await in_thread(lambda: chats(rows.for_chat(3))) == {3}
    assert await in_thread(lambda: chats(rows.for_user(3))) == {3}
    assert await in_thread(lambda: chats(rows.with_key(chat(3)))) == {3}


def sweep(*arguments: str) -> dict[str, dict[str, int]]:
    out = StringIO()
    call_command("fsm_sweep", "--json", *arguments, stdout=out)
    found: dict[str, dict[str, int]] = json.loads(out.getvalue())
    return found


async def test_the_sweep_removes_what_the_bot_no_longer_sees(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    await fill(storage)

    async def seen() -> list[object]:
        return [(await storage.get_state(chat(n)), await storage.get_data(chat(n))) for n in range(1, 6)]

    before = await seen()
    planned = await in_thread(sweep, "--alias", database, "--dry-run")
    assert len(await in_thread(records, database)) == 5
    overwritten = await in_thread(transitions, database, source="expiry")
    assert {before for before, *_ in overwritten} == {"s1", "s3", "s5"}
    swept = await in_thread(sweep, "--alias", database)
    nothing = {"states": 0, "data": 0, "records": 0, "transitions": 0, "waiting": 0}
    assert swept == planned == {database: {**nothing, "states": 2, "data": 2, "records": 2}}
    assert await seen() == before
    rows = await in_thread(records, database)
    assert {row.chat_id: (row.state, row.data) for row in rows} == {
        1: ("live", {"n": 1}),
        2: (None, {"n": 2}),
        3: ("s3", {}),
    }
    noted = await in_thread(transitions, database, source="expiry")
    assert set(noted) - set(overwritten) == {("s2", None, "expiry", ""), ("s4", None, "expiry", "")}
    assert await in_thread(sweep, "--alias", database) == {database: nothing}


async def test_a_swept_record_that_comes_again_has_a_newer_version(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage(state_ttl=100)
    versions = []
    for _ in range(3):
        for n in range(5):
            await storage.set_state(key, f"s{n}")
        versions.append((await in_thread(record, database)).version)
        await pass_time(storage, 150)
        await in_thread(sweep, "--alias", database)
        assert await in_thread(records, database) == []
    assert versions == sorted(set(versions))


async def test_the_sweep_goes_in_batches(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100)
    await asyncio.gather(*(storage.set_state(chat(n), "a") for n in range(55)))
    await asyncio.gather(*(storage.set_data(chat(n), {"n": n}) for n in range(55)))
    await pass_time(storage, 150)
    batch = await in_thread(storage.sweep, 10)
    assert max(batch) <= 10
    assert len(await in_thread(records, database)) >= 45
    swept = await in_thread(sweep, "--alias", database, "--batch-size", "10")
    assert swept[database]["records"] + batch[2] == 55
    assert swept[database]["states"] + batch[0] == 55
    assert swept[database]["data"] + batch[1] == 55
    assert await in_thread(records, database) == []


async def test_the_sweep_never_takes_what_was_renewed(make_storage: Make, database: str) -> None:
    """Bot and sweep work on the same expired records at the same time."""
    storage = make_storage(state_ttl=100, data_ttl=100, timeout=30)
    for _ in range(5):
        await asyncio.gather(*(storage.set_state(chat(n), "old") for n in range(60)))
        await asyncio.gather(*(storage.set_data(chat(n), {"old": n}) for n in range(60)))
        await pass_time(storage, 150)
        sweeping = asyncio.create_task(in_thread(sweep, "--alias", database, "--batch-size", "7"))
        for start in range(0, 60, 6):
            await asyncio.gather(*(storage.set_state(chat(n), "new") for n in range(start, start + 6)))
            await asyncio.gather(*(storage.update_data(chat(n), {"new": n}) for n in range(start, start + 6)))
        await sweeping
        for n in range(60):
            assert await storage.get_state(chat(n)) == "new"
            assert await storage.get_data(chat(n)) == {"new": n}


async def test_sweepers_at_the_same_time_do_each_record_once(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100, timeout=30)
    await asyncio.gather(*(storage.set_state(chat(n), f"s{n}") for n in range(80)))
    await asyncio.gather(*(storage.set_data(chat(n), {"n": n}) for n in range(80)))
    await pass_time(storage, 150)
    counts = await asyncio.gather(
        *(in_thread(sweep, "--alias", database, "--batch-size", "9") for _ in range(3))
    )
    assert sum(count[database]["states"] for count in counts) == 80
    assert sum(count[database]["data"] for count in counts) == 80
    # Whoever stopped early may have left one to the next sweep.
    await in_thread(sweep, "--alias", database)
    assert await in_thread(records, database) == []
    assert len(await in_thread(transitions, database, source="expiry")) == 80


async def test_the_sweep_leaves_other_aliases_alone(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    other = make_storage(alias="other", state_ttl=100)
    own = make_storage(state_ttl=100)
    await other.set_state(key, "a")
    await own.set_state(key, "a")
    await pass_time(own, 150)
    await in_thread(sweep, "--alias", database)
    assert [row.alias for row in await in_thread(records, database)] == ["other"]


def test_the_sweep_prints_what_it_did(database: str) -> None:
    out = StringIO()
    call_command("fsm_sweep", "--alias", database, stdout=out)
    assert out.getvalue() == f"{database}: cleared 0 states and 0 data, deleted 0 idle records\n"
    call_command("fsm_sweep", "--alias", database, "--dry-run", stdout=out)
    assert "would clear" in out.getvalue()


def test_the_sweep_names_a_wrong_argument(database: str) -> None:
    with pytest.raises(CommandError, match="nowhere"):
        call_command("fsm_sweep", "--alias", "nowhere")
    with pytest.raises(CommandError, match="batch-size"):
        call_command("fsm_sweep", "--batch-size", "0")
    assert storages[database] is not None


# A time to live for a single write


def lifetime(row: FSMRecord, part: str) -> float | None:
    expires_at = getattr(row, f"{part}_expires_at")
    return None if expires_at is None else round((expires_at - row.updated_at).total_seconds())


async def test_a_write_may_bring_its_own_ttl(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=2000)
    writes = [
        (lambda key: storage.set_state(key, "a", ttl=30), "state", 30),
        (lambda key: storage.set_state(key, "a", ttl=timedelta(hours=1)), "state", 3600),
        (lambda key: storage.set_state(key, "a", ttl=None), "state", None),
        (lambda key: storage.set_data(key, {"n": 1}, ttl=40), "data", 40),
        (lambda key: storage.update_data(key, {"n": 1}, ttl=50), "data", 50),
        (lambda key: storage.update_data(key, {"n": 2}), "data", 2000),
    ]
    for number, (write, part, expected) in enumerate(writes):
        await write(chat(number))
        row = await in_thread(record, database, chat_id=number)
        assert lifetime(row, part) == expected
    # In one batch too, and on records that are there already.
    await asyncio.gather(*(write(chat(number)) for number, (write, _, _) in enumerate(writes)))
    for number, (_, part, expected) in enumerate(writes):
        assert lifetime(await in_thread(record, database, chat_id=number), part) == expected
    await storage.set_state(chat(0), "b")
    assert lifetime(await in_thread(record, database, chat_id=0), "state") == 1000


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), timedelta(0), timedelta.max], ids=str)
async def test_a_wrong_ttl_of_a_write_is_refused(
    storage: DjangoStorage, key: StorageKey, ttl: object
) -> None:
    await storage.set_state(key, "old")
    await storage.set_data(key, {"old": 1})
    for write in (
        lambda: storage.set_state(key, "new", ttl=ttl),  # type: ignore[arg-type]
        lambda: storage.set_data(key, {"new": 1}, ttl=ttl),  # type: ignore[arg-type]
        lambda: storage.update_data(key, {"new": 1}, ttl=ttl),  # type: ignore[arg-type]
        lambda: with_ttl(FSMContext(storage, key), ttl).set_state("new"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidTtl, match="must be above 0 and at most 100 years") as refusal:
            await write()
        assert str(key.chat_id) in str(refusal.value)
    assert (await storage.get_state(key), await storage.get_data(key)) == ("old", {"old": 1})


@pytest.mark.parametrize("ttl", ["60", True, [60]], ids=repr)
async def test_a_ttl_of_a_wrong_type_is_refused(storage: DjangoStorage, key: StorageKey, ttl: object) -> None:
    with pytest.raises(InvalidTtlType, match="seconds or a timedelta, not"):
        await storage.set_state(key, "new", ttl=ttl)  # type: ignore[arg-type]
    assert await storage.get_state(key) is None


async def test_a_context_with_a_ttl(make_storage: Make, database: str, key: StorageKey) -> None:
    context = FSMContext(make_storage(state_ttl=1000, data_ttl=1000), key)
    await with_ttl(context, 15).set_state("payment")
    before = await in_thread(record, database)
    assert (before.state, lifetime(before, "state")) == ("payment", 15)
    assert await with_ttl(context, timedelta(seconds=25)).update_data({"n": 1}, m=2) == {"n": 1, "m": 2}
    row = await in_thread(record, database)
    assert (row.state, row.state_expires_at) == ("payment", before.state_expires_at)
    assert (row.data, lifetime(row, "data")) == ({"n": 1, "m": 2}, 25)
    await with_ttl(context, None).set_data({"n": 3})
    assert lifetime(await in_thread(record, database), "data") is None
    await context.set_state("next")
    assert lifetime(await in_thread(record, database), "state") == 1000
    assert await with_ttl(context, 5).get_state() == "next"


def test_a_storage_without_ttls_says_so(key: StorageKey) -> None:
    with pytest.raises(TtlNotSupported, match="MemoryStorage takes no ttl"):
        with_ttl(FSMContext(MemoryStorage(), key), 60)


async def test_in_full_history_expired_data_that_is_overwritten_is_noted(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    """As the sweep notes it: what was there can be found, and put back."""
    storage = make_storage(data_ttl=100, history="full")
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await pass_time(storage, 150)
    expired_at = (await in_thread(record, database)).data_expires_at
    await storage.update_data(key, {"n": 2})
    await asyncio.gather(storage.set_data(key, {}), storage.set_data(chat(5), {}))

    def noted() -> list[tuple[object, ...]]:
        rows = FSMTransition.objects.using(database).filter(key=record(database).key).order_by("id")
        return list(rows.values_list("from_state", "to_state", "source", "data_before", "data_after"))

    assert await in_thread(noted) == [
        (None, "a", "bot", {}, {}),
        ("a", "a", "bot", {}, {"n": 1}),
        ("a", "a", "expiry", {"n": 1}, {}),
        ("a", "a", "bot", {}, {"n": 2}),
        ("a", "a", "bot", {"n": 2}, {}),
    ]
    rows = FSMTransition.objects.using(database).filter(source="expiry")
    assert (await in_thread(rows.get)).at == expired_at
