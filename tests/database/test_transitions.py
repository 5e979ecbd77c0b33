"""The history: what is noted, what is not, and with whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoStorage
from fsm_storage.models import FSMTransition
from tests.rows import in_thread, record, transitions

Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number + 1000, thread_id=5, destiny="d")


async def test_history_off_notes_nothing(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage(history="off")
    await storage.set_state(key, "a")
    await storage.update_data(key, {"n": 1})
    await asyncio.gather(*(storage.set_state(chat(n), "a") for n in range(5)))
    assert await in_thread(transitions, database) == []


async def test_only_a_real_change_of_state_is_noted(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    for state in ("a", "a", "b", None, None, "", "", "c"):
        await storage.set_state(key, state)
        await storage.set_data(key, {"state": state})
        await storage.update_data(key, {"more": 1})
    assert await in_thread(transitions, database) == [
        (None, "a", "bot", ""),
        ("a", "b", "bot", ""),
        ("b", None, "bot", ""),
        (None, "", "bot", ""),
        ("", "c", "bot", ""),
    ]


async def test_a_batch_notes_what_lone_writes_note(storage: DjangoStorage, database: str) -> None:
    for state in ("a", "a", "b", None):
        await asyncio.gather(*(storage.set_state(chat(n), state) for n in range(20)))
    for n in range(20):
        assert await in_thread(transitions, database, chat_id=n) == [
            (None, "a", "bot", ""),
            ("a", "b", "bot", ""),
            ("b", None, "bot", ""),
        ]


async def test_a_transition_knows_its_record_and_when(storage: DjangoStorage, database: str) -> None:
    await storage.set_state(chat(1), "a")
    await asyncio.gather(*(storage.set_state(chat(n), "b") for n in range(3)))
    rows = await in_thread(lambda: list(FSMTransition.objects.using(database).filter(chat_id=1)))
    row = await in_thread(record, database, chat_id=1)
    for transition in rows:
        assert (transition.alias, transition.key) == (database, row.key)
        assert (transition.bot_id, transition.chat_id, transition.user_id) == (1, 1, 1001)
        assert abs(transition.at - datetime.now(UTC)) < timedelta(seconds=30)
        assert (transition.data_before, transition.data_after) == (None, None)
    assert [row.at for row in rows] == sorted(row.at for row in rows)
    newest_first = await in_thread(lambda: list(FSMTransition.objects.using(database).of(row)))
    assert [transition.to_state for transition in newest_first] == ["b", "a"]


async def test_full_history_keeps_the_data_before_and_after(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage(history="full")
    await storage.set_state(key, "a")
    await storage.set_data(key, {"n": 1})
    await storage.set_data(key, {"n": 1})  # changes nothing
    await storage.update_data(key, {"m": 2})
    await storage.update_data(key, {"m": 2})
    await storage.set_state(key, "b")
    await storage.set_data(key, {})
    fields = ("from_state", "to_state", "data_before", "data_after")
    assert await in_thread(
        lambda: list(FSMTransition.objects.using(database).order_by("id").values_list(*fields))
    ) == [
        (None, "a", {}, {}),
        ("a", "a", {}, {"n": 1}),
        ("a", "a", {"n": 1}, {"n": 1, "m": 2}),
        ("a", "b", {"n": 1, "m": 2}, {"n": 1, "m": 2}),
        ("b", "b", {"n": 1, "m": 2}, {}),
    ]


async def test_concurrent_writes_make_one_unbroken_chain(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    await asyncio.gather(*(storage.set_state(key, f"s{n}") for n in range(60)))
    noted = await in_thread(transitions, database)
    assert [before for before, *_ in noted] == [None, *(after for _, after, *_ in noted[:-1])]
    assert noted[-1][1] == (await in_thread(record, database)).state == await storage.get_state(key)
    assert len(noted) == 60


async def test_transitions_outlive_their_record(make_storage: Make, database: str, key: StorageKey) -> None:
    storage = make_storage()
    await storage.set_state(key, "a")
    await storage.set_state(key, None)
    await in_thread(storage.sweep)
    assert len(await in_thread(transitions, database)) == 2


async def test_the_version_grows_with_every_write(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    versions = []
    for write in (
        lambda: storage.set_state(key, "a"),
        lambda: storage.set_state(key, "a"),
        lambda: storage.set_data(key, {"n": 1}),
        lambda: storage.update_data(key, {"n": 1}),
        lambda: storage.set_state(key, None),
        lambda: storage.set_data(key, {}),
    ):
        await write()
        versions.append((await in_thread(record, database)).version)
    assert versions == list(range(versions[0], versions[0] + 6))
    now = datetime.now(UTC).timestamp() * 1_000_000
    assert now - 60_000_000 < versions[0] <= now + 1_000_000


async def test_clearing_what_is_absent_makes_no_record(
    storage: DjangoStorage, database: str, key: StorageKey
) -> None:
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    await storage.update_data(key, {})
    await asyncio.gather(*(storage.set_state(chat(n), None) for n in range(5)))
    from tests.rows import records

    assert await in_thread(records, database) == []
    assert await in_thread(transitions, database) == []
