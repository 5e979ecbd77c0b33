"""Groups that become supergroups: their conversations go along to the new id."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from aiogram import Bot, Dispatcher, F, Router
from aiogram.exceptions import TelegramMigrateToChat
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.methods import SendMessage
from aiogram.types import Chat, Message, Update, User
from django.db import connections

from fsm_storage import DjangoStorage, signals
from fsm_storage.chats import FollowMovedChats, MoveChats
from fsm_storage.exceptions import StorageUnavailable
from fsm_storage.models import FSMRecord, FSMTransition
from tests.database.conftest import in_time
from tests.rows import OtherSession, execute, in_thread, let_time_pass, record, transitions

Make = Callable[..., DjangoStorage]
OLD, NEW = -100, -100_000_500


def key(chat: int, user: int = 7, **parts: Any) -> StorageKey:
    return StorageKey(**{"bot_id": 42, "chat_id": chat, "user_id": user, **parts})


def live(database: str) -> dict[tuple[int, int], tuple[str | None, Any]]:
    found = FSMRecord.objects.using(database).live()
    return {(row.chat_id, row.user_id): (row.current_state, row.current_data) for row in found}


async def put(storage: DjangoStorage, key: StorageKey, state: str | None = None, data: Any = None) -> None:
    if state is not None:
        await storage.set_state(key, state)
    if data is not None:
        await storage.set_data(key, data)


async def move(storage: DjangoStorage) -> int:
    return await storage.move_chat(42, OLD, NEW)


async def test_all_conversations_of_the_chat_are_moved(storage: DjangoStorage, database: str) -> None:
    await put(storage, key(OLD, 1), "a", {"n": 1})
    await put(storage, key(OLD, 2), "b")
    await put(storage, key(OLD, 3), data={"n": 3})
    others = [key(-101), key(OLD, bot_id=43)]
    for other in others:
        await put(storage, other, "stays")
    elsewhere = [
        key(OLD, 4, thread_id=5),
        key(OLD, 4, destiny="d"),
        key(OLD, 4, business_connection_id="x:y"),
    ]
    for n, place in enumerate(elsewhere):
        await put(storage, place, f"s{n}")
    assert await move(storage) == 6
    for user, state, data in ((1, "a", {"n": 1}), (2, "b", {}), (3, None, {"n": 3})):
        assert await storage.get_state(key(NEW, user)) == state
        assert await storage.get_data(key(NEW, user)) == data
        assert await storage.get_state(key(OLD, user)) is None
        assert await storage.get_data(key(OLD, user)) == {}
    for n, place in enumerate(elsewhere):
        assert await storage.get_state(StorageKey(**{**vars(place), "chat_id": NEW})) == f"s{n}"
        assert await storage.get_state(place) is None
    assert [await storage.get_state(other) for other in others] == ["stays"] * 2
    rows = await in_thread(lambda: list(FSMRecord.objects.using(database).live().filter(chat_id=NEW)))
    assert {storage.key_text(row.storage_key) for row in rows} == {row.key for row in rows}


async def test_the_history_says_so_on_both_sides(storage: DjangoStorage, database: str) -> None:
    await put(storage, key(OLD), "a", {"n": 1})
    await move(storage)
    old = await in_thread(transitions, database, chat_id=OLD)
    new = await in_thread(transitions, database, chat_id=NEW)
    assert old == [(None, "a", "bot", ""), ("a", None, "move", "")]
    assert new == [(None, "a", "move", "")]


async def test_the_history_in_full_has_the_data(make_storage: Make, database: str) -> None:
    await put(make_storage(history="full"), key(OLD), data={"n": 1})
    await move(make_storage(history="full"))
    steps = await in_thread(lambda: list(FSMTransition.objects.using(database).filter(source="move")))
    assert sorted((step.chat_id, step.data_before, step.data_after) for step in steps) == [
        (NEW, {}, {"n": 1}), (OLD, {"n": 1}, {}),
    ]  # fmt: skip


async def test_again_does_nothing(storage: DjangoStorage, database: str) -> None:
    await put(storage, key(OLD), "a")
    assert [await move(storage) for _ in range(3)] == [1, 0, 0]
    version = (await in_thread(record, database, chat_id=NEW)).version
    assert await move(storage) == 0
    assert (await in_thread(record, database, chat_id=NEW)).version == version
    assert len(await in_thread(transitions, database, source="move")) == 2


async def test_time_to_expiry_goes_along(make_storage: Make, database: str) -> None:
    await put(make_storage(state_ttl=1000, data_ttl=500), key(OLD, 1), "a", {"n": 1})
    await put(make_storage(data_ttl=500), key(OLD, 2), "a", {"n": 1})
    await in_thread(let_time_pass, database, 100)
    before = {
        row.user_id: (row.state_expires_at, row.data_expires_at)
        for row in await in_thread(lambda: list(FSMRecord.objects.using(database)))
    }
    await move(make_storage(state_ttl=7, data_ttl=7))
    after = {
        row.user_id: (row.state_expires_at, row.data_expires_at)
        for row in await in_thread(lambda: list(FSMRecord.objects.using(database).filter(chat_id=NEW)))
    }
    assert after == before
    assert after[2][0] is None


async def test_what_has_expired_is_not_moved(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100)
    await put(storage, key(OLD, 1), "a")
    await put(storage, key(OLD, 2), "a", {"n": 1})
    await in_thread(let_time_pass, database, 200)
    assert await move(storage) == 1
    assert await in_thread(live, database) == {(NEW, 2): (None, {"n": 1})}
    # And is still there for the sweep.
    assert await in_thread(lambda: FSMRecord.objects.using(database).state_expired().count()) == 2


# Both ids have a conversation


async def test_the_newer_state_wins_and_the_newer_data_is_laid_over(
    storage: DjangoStorage, database: str
) -> None:
    await put(storage, key(OLD, 1), "old", {"a": "old", "b": "old"})
    await put(storage, key(NEW, 1), "new", {"b": "new", "c": "new"})
    await put(storage, key(NEW, 2), "new", {"b": "new", "c": "new"})
    await in_thread(
        lambda: FSMRecord.objects.using(database).update(updated_at=datetime(2020, 1, 1, tzinfo=UTC))
    )
    await put(storage, key(OLD, 2), "old", {"a": "old", "b": "old"})
    await in_thread(
        lambda: FSMRecord.objects.using(database).filter(chat_id=NEW, user_id=1)
        .update(updated_at=datetime(2020, 1, 2, tzinfo=UTC))
    )  # fmt: skip
    assert await move(storage) == 2
    assert await in_thread(live, database) == {
        (NEW, 1): ("new", {"a": "old", "b": "new", "c": "new"}),
        (NEW, 2): ("old", {"a": "old", "b": "old", "c": "new"}),
    }
    moved = await in_thread(transitions, database, chat_id=NEW, source="move")
    assert moved == [("new", "old", "move", "")]


@pytest.mark.parametrize("newer", [OLD, NEW])
async def test_a_state_that_only_one_has_is_kept(make_storage: Make, database: str, newer: int) -> None:
    storage = make_storage(state_ttl=1000, data_ttl=500)
    order = [(OLD, NEW), (NEW, OLD)][newer == OLD]
    for chat in order:
        if chat == OLD:
            await put(storage, key(OLD), "a")
        else:
            await put(storage, key(NEW), data={"n": 1})
        await asyncio.sleep(0.01)
    await move(storage)
    assert await in_thread(live, database) == {(NEW, 7): ("a", {"n": 1})}
    row = await in_thread(record, database, chat_id=NEW)
    assert timedelta(seconds=400) < row.state_expires_at - row.data_expires_at < timedelta(seconds=600)


async def test_unreadable_data_does_not_stop_the_move(storage: DjangoStorage, database: str) -> None:
    for user in (1, 2, 3):
        await put(storage, key(OLD, user), "a", {"n": user})
        await put(storage, key(NEW, user), data={"m": user})
    await put(storage, key(OLD, 4), "a", {"n": 4})
    for chat, user in ((OLD, 1), (NEW, 2), (OLD, 4)):
        where = f"chat_id = {chat} AND user_id = {user}"
        await in_thread(execute, database, f"UPDATE fsm_storage_record SET data = '[1]' WHERE {where}")
    assert await move(storage) == 4
    assert await in_thread(live, database) == {
        (NEW, 1): ("a", {"m": 1}), (NEW, 2): ("a", {"n": 2}), (NEW, 3): ("a", {"m": 3, "n": 3}), (NEW, 4): ("a", [1]),
    }  # fmt: skip


async def test_values_come_through_exactly(storage: DjangoStorage) -> None:
    data = {"i": 2**70, "f": 1e23, "s": "é😀", "n": None}
    await put(storage, key(OLD), data=data)
    await move(storage)
    found = await storage.get_data(key(NEW))
    assert found == data
    assert type(found["f"]) is float


# Keys


class ByUser(DefaultKeyBuilder):
    def build(self, key: StorageKey, part: Any = None) -> str:
        return f"user:{key.user_id}"


async def test_the_key_builder_is_respected(make_storage: Make, database: str) -> None:
    storage = make_storage(key_builder=DefaultKeyBuilder(with_destiny=True))
    await put(storage, key(OLD), "a")
    await move(storage)
    assert (await in_thread(record, database, chat_id=NEW)).key == f"fsm:{NEW}:7:default"
    storage = make_storage(alias="by user", key_builder=ByUser())
    await put(storage, key(OLD), "b")
    assert [await move(storage) for _ in range(2)] == [1, 0]
    assert await storage.get_state(key(NEW)) == "b"
    row = await in_thread(record, database, alias="by user")
    assert (row.chat_id, row.key) == (NEW, "user:7")


async def test_live_pages_hear_of_each_record_that_moves(make_storage: Make, database: str) -> None:
    heard: list[tuple[str, dict[str, int | None]]] = []

    def note(alias: str, written: Any) -> None:
        heard.append((alias, dict(written)))

    by_chat, by_user = make_storage(), make_storage(alias="by user", key_builder=ByUser())
    for storage in (by_chat, by_user):
        await put(storage, key(OLD), "a")
    signals.hints.append(note)
    try:
        await move(by_chat)
        await move(by_user)
    finally:
        signals.hints.remove(note)
    rows: list[FSMRecord] = await in_thread(lambda: list(FSMRecord.objects.using(database).all()))
    versions = {alias: {row.key: row.version for row in rows if row.alias == alias} for alias, _ in heard}
    assert dict(heard) == versions
    assert {alias: len(found) for alias, found in heard} == {by_chat.alias: 2, "by user": 1}


async def test_a_chat_that_stands_for_its_users_does_so_under_the_new_id(storage: DjangoStorage) -> None:
    """As with aiogram's strategies CHAT and CHAT_TOPIC."""
    await put(storage, key(OLD, OLD), "a")
    await move(storage)
    assert await storage.get_state(key(NEW, NEW)) == "a"


async def test_only_this_storage_is_touched(make_storage: Make) -> None:
    other = make_storage(alias="other")
    await put(other, key(OLD), "a")
    assert await move(make_storage()) == 0
    assert await other.get_state(key(OLD)) == "a"


# Beside others


@contextmanager
def locked(database: str) -> Iterator[None]:
    """Another program holds the lock that a move needs."""
    facts = connections[database].settings_dict
    if database == "default":
        other: Any = sqlite3.connect(facts["NAME"], isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
    else:
        other = OtherSession(database)
        other.execute("SELECT 1 FROM fsm_storage_record FOR UPDATE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


async def test_a_bot_that_writes_to_both_ids_meanwhile_loses_nothing(
    make_storage: Make, database: str
) -> None:
    storage = make_storage(timeout=30)
    users = range(12)
    written: dict[int, dict[str, int]] = {user: {} for user in users}

    async def talk(user: int) -> None:
        for n in range(25):
            field = f"f{n}"
            await storage.update_data(key((OLD, NEW)[n % 2], user), {field: n})
            written[user][field] = n
            await storage.set_state(key((OLD, NEW)[(n + user) % 2], user), f"s{n}")

    async def move_often() -> None:
        while not done:
            await asyncio.gather(move(storage), move(storage))  # as two processes would

    done = False
    mover = asyncio.create_task(move_often())
    await asyncio.gather(*map(talk, users))
    done = True
    await mover
    await move(storage)
    assert await move(storage) == 0
    found = await in_thread(live, database)
    assert set(found) == {(NEW, user) for user in users}
    assert {user: found[NEW, user][1] for user in users} == written
    steps = await in_thread(lambda: list(FSMTransition.objects.using(database).order_by("key", "id")))
    for one, other in pairwise(steps):
        assert one.key != other.key or one.to_state == other.from_state


async def test_a_move_that_fails_leaves_all_as_it_was(
    storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in range(3):
        await put(storage, key(OLD, user), "a")

    def fail(*_: Any) -> None:
        raise RuntimeError("at the last step")

    monkeypatch.setattr("fsm_storage.backends.moving.Mover._expiries", fail)
    with pytest.raises(RuntimeError):
        await move(storage)
    monkeypatch.undo()
    assert set(await in_thread(live, database)) == {(OLD, user) for user in range(3)}
    assert await in_thread(transitions, database, source="move") == []


async def test_a_move_waits_for_a_locked_database_and_no_longer(make_storage: Make, database: str) -> None:
    storage = make_storage(timeout=1.0)
    await put(make_storage(), key(OLD), "a")
    with locked(database):
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            await move(storage)
        assert time.monotonic() - began < 10
    assert await in_time(lambda: move(storage), 1.0) == 1


async def test_signals_tell_of_both_sides(storage: DjangoStorage) -> None:
    await put(storage, key(OLD), "a")
    told: list[tuple[int, Any, Any, str]] = []

    def note(**about: Any) -> None:
        told.append((about["key"].chat_id, about["old_state"], about["new_state"], about["source"]))

    signals.state_changed.connect(note)
    try:
        await move(storage)
    finally:
        signals.state_changed.disconnect(note)
    assert sorted(told, key=lambda one: one[0]) == [(NEW, None, "a", "move"), (OLD, "a", None, "move")]


# What Telegram sends


def message(chat: int, **what: Any) -> Update:
    content = Message(
        message_id=1,
        date=datetime.now(UTC),
        chat=Chat(id=chat, type="supergroup"),
        from_user=User(id=7, is_bot=False, first_name="Anna"),
        **what,
    )
    return Update(update_id=1, message=content)


MIGRATED_TO = message(OLD, migrate_to_chat_id=NEW)
MIGRATED_FROM = message(NEW, migrate_from_chat_id=OLD)


@pytest.mark.parametrize("on_messages", [False, True])
@pytest.mark.parametrize(
    "updates",
    [[MIGRATED_TO, MIGRATED_FROM], [MIGRATED_FROM, MIGRATED_TO], [MIGRATED_FROM] * 2, [MIGRATED_TO] * 3],
)
async def test_both_messages_in_any_order_move_the_chat_once(
    storage: DjangoStorage, database: str, updates: list[Update], on_messages: bool
) -> None:
    dispatcher, router, seen = Dispatcher(storage=storage), Router(), []

    @router.message(F.migrate_from_chat_id)
    async def moved(message: Message, state: FSMContext, raw_state: str | None) -> None:
        seen.append((await state.get_state(), raw_state))

    observer = dispatcher.message if on_messages else dispatcher.update
    observer.outer_middleware(MoveChats())
    dispatcher.include_router(router)
    await put(storage, key(OLD), "a", {"n": 1})
    async with Bot("42:token") as bot:
        for update in updates:
            await dispatcher.feed_update(bot, update)
    assert await in_thread(live, database) == {(NEW, 7): ("a", {"n": 1})}
    assert len(await in_thread(transitions, database, source="move")) == 2
    # The message is the project's to handle, too, and its handlers find the conversation.
    assert seen == [("a", "a")] * updates.count(MIGRATED_FROM)


async def test_a_move_that_fails_is_logged_and_the_message_handled(
    storage: DjangoStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> int:
        raise RuntimeError("no database")

    monkeypatch.setattr(DjangoStorage, "move_chat", fail)
    dispatcher, seen = Dispatcher(storage=storage), []
    dispatcher.update.outer_middleware(MoveChats())
    dispatcher.message()(lambda message: seen.append(message.chat.id))
    async with Bot("42:token") as bot:
        await dispatcher.feed_update(bot, MIGRATED_TO)
    assert seen == [OLD]
    assert f"chat {OLD} could not be moved to {NEW}" in caplog.text


async def test_a_storage_that_cannot_move_is_named(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(storage=MemoryStorage())
    dispatcher.update.outer_middleware(MoveChats())
    async with Bot("42:token") as bot:
        with caplog.at_level(logging.WARNING):
            await dispatcher.feed_update(bot, MIGRATED_TO)
    assert "MemoryStorage cannot move" in caplog.text


async def test_a_request_to_the_old_id_is_sent_again_to_the_new_one(storage: DjangoStorage) -> None:
    sent: list[Any] = []

    async def make_request(bot: Bot, method: Any) -> Any:
        sent.append(method.chat_id)
        if method.chat_id == OLD:
            raise TelegramMigrateToChat(method, "upgraded", NEW)
        return "sent"

    await put(storage, key(OLD), "a")
    middleware = FollowMovedChats(storage)
    async with Bot("42:token") as bot:
        request: Any = SendMessage(chat_id=OLD, text="hello")
        assert await middleware(make_request, bot, request) == "sent"
        assert sent == [OLD, NEW]
        assert request.chat_id == OLD
        assert await storage.get_state(key(NEW)) == "a"
        with pytest.raises(TelegramMigrateToChat):  # nowhere to send it
            await middleware(make_request_by_name, bot, SendMessage(chat_id="@group", text="hello"))


async def make_request_by_name(bot: Bot, method: Any) -> Any:
    raise TelegramMigrateToChat(method, "upgraded", NEW)
