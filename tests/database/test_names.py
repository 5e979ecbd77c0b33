"""Names of chats and users: written when they change, with what the bot writes anyway, and never in its way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from aiogram import Bot, Dispatcher
from aiogram.dispatcher.middlewares.user_context import EventContext
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.types import Chat, Message, Update, User
from django.db import connections

from fsm_storage import DjangoStorage, chats
from fsm_storage.chats import KeepNames
from fsm_storage.dialects import Naming
from fsm_storage.models import FSMPeer
from tests.database.conftest import Statements
from tests.rows import execute, in_thread

Make = Callable[..., DjangoStorage]
ANNA = User(id=1, is_bot=False, first_name="Анна", last_name="Иванова", username="anna_i")
BEN = User(id=2, is_bot=False, first_name="Ben")
OFFICE = Chat(id=-100, type="supergroup", title="Office, 3rd floor")


def update(user: User, chat: Chat | None = None) -> Update:
    chat = chat or Chat(
        id=user.id,
        type="private",
        first_name=user.first_name,
        last_name=user.last_name,
        username=user.username,
    )
    message = Message(message_id=1, date=datetime.now(UTC), chat=chat, from_user=user, text="hello")
    return Update(update_id=1, message=message)


class Bots:
    """A bot that keeps names."""

    def __init__(self, storage: Any, names: KeepNames | None = None) -> None:
        self.dispatcher, self.handled = Dispatcher(storage=storage), 0
        self.names = names or KeepNames()
        self.dispatcher.update.outer_middleware(self.names)
        self.dispatcher.message()(self.handle)

    async def handle(self, message: Message, state: FSMContext) -> None:
        self.handled += 1

    async def feed(self, *updates: Update) -> None:
        async with Bot("42:token") as bot:
            await asyncio.gather(*(self.dispatcher.feed_update(bot, one) for one in updates))
        await asyncio.wait_for(self.settled(), 10)

    async def settled(self) -> None:
        while self.names._on_the_way:
            await asyncio.sleep(0.001)


def kept(database: str) -> dict[int, tuple[str, str]]:
    return {row.peer_id: (row.title, row.username) for row in FSMPeer.objects.using(database)}


async def test_chats_and_users_have_names(storage: DjangoStorage, database: str) -> None:
    bots = Bots(storage)
    await bots.feed(update(ANNA), update(ANNA, OFFICE), update(BEN, OFFICE))
    assert await in_thread(kept, database) == {
        1: ("Анна Иванова", "anna_i"), 2: ("Ben", ""), -100: ("Office, 3rd floor", ""),
    }  # fmt: skip
    await bots.feed(update(BEN.model_copy(update={"last_name": "King", "username": "king"}), OFFICE))
    assert (await in_thread(kept, database))[2] == ("Ben King", "king")


async def test_a_deleted_account_has_no_name(storage: DjangoStorage, database: str) -> None:
    await Bots(storage).feed(update(User(id=9, is_bot=False, first_name=""), Chat(id=9, type="private")))
    assert await in_thread(kept, database) == {9: ("", "")}


async def test_nothing_is_written_while_nothing_changes(
    statements: Statements, storage: DjangoStorage, database: str
) -> None:
    bots = Bots(storage)
    await bots.feed(update(ANNA, OFFICE))
    seen = [sql for sql in statements.seen if "fsm_storage_peer" in sql]
    each = 2 if database == "mariadb" else 1
    assert len(seen) in (each, 2 * each)  # the chat and the user: one batch, or two
    await bots.feed(*[update(ANNA, OFFICE)] * 20)
    assert [sql for sql in statements.seen if "fsm_storage_peer" in sql] == seen
    assert bots.handled == 21


async def test_another_process_finds_that_it_is_known(storage: DjangoStorage, database: str) -> None:
    """After a restart each name is looked at once more, and its row is not written."""
    await Bots(storage).feed(update(ANNA))
    version = "xmin, xmax, updated_at" if database == "postgres" else "updated_at"
    query = f"SELECT {version} FROM fsm_storage_peer"
    before = await in_thread(execute, database, query)
    await Bots(storage).feed(update(ANNA))
    assert await in_thread(execute, database, query) == before
    assert await storage.submit(Naming(1, "Анна Иванова", "anna_i")) is False
    assert await storage.submit(Naming(1, "Анна", "anna_i")) is True


async def test_many_names_share_a_statement(
    statements: Statements, storage: DjangoStorage, database: str
) -> None:
    await storage.get_state(chats_key())
    updates = [update(User(id=n, is_bot=False, first_name=f"n{n}")) for n in range(1, 101)]
    bots = Bots(storage)
    with statements.held():
        first = asyncio.ensure_future(storage.set_state(chats_key(), "a"))
        async with asyncio.timeout(10):
            while not statements.someone_is_held():
                await asyncio.sleep(0.001)
        for one in updates:  # as the middleware does it, with no handler behind
            assert one.message is not None
            context = EventContext(chat=one.message.chat, user=one.message.from_user)
            await bots.names(_nothing, one, {"fsm_storage": storage, "event_context": context})
    await first
    await bots.settled()
    # The first name may have gone alone: on PostgreSQL the write that is held may be in the other queue.
    assert len([sql for sql in statements.seen if "fsm_storage_peer" in sql]) <= (
        4 if database == "mariadb" else 2
    )


async def _nothing(event: Any, data: Any) -> None:
    return None


def chats_key() -> Any:
    from tests.database.writers import key_of

    return key_of(5)


async def test_memory_is_bounded(storage: DjangoStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "MAX_KNOWN", 3)
    bots = Bots(storage)
    await bots.feed(*(update(User(id=n, is_bot=False, first_name=f"n{n}")) for n in range(1, 9)))
    assert len(bots.names._known) == 3
    monkeypatch.setattr(chats, "MAX_ON_THE_WAY", 0)  # more than that are not even begun
    await bots.feed(update(ANNA))
    assert len(bots.names._known) == 3


async def test_a_name_that_cannot_be_written_harms_no_update(
    storage: DjangoStorage, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    bots = Bots(storage)
    await in_thread(execute, database, "ALTER TABLE fsm_storage_peer RENAME TO gone")
    try:
        await bots.feed(*[update(ANNA)] * 3)
        await bots.feed(*[update(BEN)] * 3)
    finally:
        await in_thread(execute, database, "ALTER TABLE gone RENAME TO fsm_storage_peer")
    assert bots.handled == 6
    assert caplog.text.count("names of chats and users are not kept") == 1
    await bots.feed(update(ANNA))  # and it is tried again
    assert await in_thread(kept, database) == {1: ("Анна Иванова", "anna_i")}


async def test_names_that_no_database_takes_are_cut_to_what_it_does(
    storage: DjangoStorage, database: str
) -> None:
    odd = User(id=3, is_bot=False, first_name="a\0b\ud800" + "x" * 300, last_name="ß" * 300)
    await Bots(storage).feed(update(odd))
    assert await in_thread(kept, database) == {3: ("ab" + "x" * 253, "")}
    assert (await in_thread(lambda: FSMPeer.objects.using(database).get())).title_key == "ab" + "x" * 253


async def test_a_storage_of_another_kind_is_named(caplog: pytest.LogCaptureFixture) -> None:
    bots = Bots(MemoryStorage())
    await bots.feed(update(ANNA))
    assert bots.handled == 1
    assert "'MemoryStorage' object has no attribute 'submit'" in caplog.text


async def test_another_storage_can_keep_the_names(storage: DjangoStorage, database: str) -> None:
    await Bots(MemoryStorage(), KeepNames(storage)).feed(update(BEN))
    assert await in_thread(kept, database) == {2: ("Ben", "")}


async def test_updates_without_people_pass(storage: DjangoStorage, caplog: pytest.LogCaptureFixture) -> None:
    """A poll's result comes from nobody."""
    bots = Bots(storage)
    with caplog.at_level(logging.ERROR):
        data = {"fsm_storage": storage, "event_context": EventContext()}
        await bots.names(_nothing, update(ANNA), data)
    assert bots.names._known == {}
    assert "names" not in caplog.text


@pytest.mark.parametrize(
    "database",
    [
        pytest.param(
            "postgres",
            marks=pytest.mark.django_db(
                transaction=True, databases=["postgres"], available_apps=["fsm_storage"]
            ),
        )
    ],
)
async def test_a_row_that_somebody_holds_is_left_for_later(storage: DjangoStorage, database: str) -> None:
    await Bots(storage).feed(update(ANNA), update(BEN))
    facts = connections[database].settings_dict
    bots = Bots(storage)
    with psycopg.connect(host=facts["HOST"], user=facts["USER"], dbname=facts["NAME"]) as other:
        other.execute("SELECT 1 FROM fsm_storage_peer WHERE peer_id = 1 FOR UPDATE")
        renamed = [user.model_copy(update={"last_name": "New"}) for user in (ANNA, BEN)]
        await bots.feed(*map(update, renamed))
        assert 1 not in bots.names._known
        other.rollback()
    assert await in_thread(kept, database) == {1: ("Анна Иванова", "anna_i"), 2: ("Ben New", "")}
    await bots.feed(*map(update, renamed))
    assert (await in_thread(kept, database))[1] == ("Анна New", "anna_i")


# Searching


def fill(database: str, count: int) -> None:
    for peer_id, title, username in (
        (1, "Анна Иванова", "Anna_I"), (2, "Ben King", ""), (3, "иван", "king_of"), (-5, "Ann's 100% office", ""),
    ):  # fmt: skip
        rows = Naming(peer_id, title, username).columns()
        names = ("peer_id", "title", "username", "title_key", "rest_key", "username_key")
        FSMPeer.objects.using(database).create(**dict(zip(names, rows, strict=True)))
    FSMPeer.objects.using(database).bulk_create(
        FSMPeer(peer_id=1000 + n, title=f"n{n}", title_key=f"n{n}", rest_key=f"r{n}", username_key=f"u{n}")
        for n in range(count)
    )


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Иван", {1, 3}), ("иванов", {1}), ("АННА", {1}), ("ann", {1, -5}), ("king", {2, 3}), ("@king", {3}),
        ("@KING_", {3}), ("нна", set()), ("ben king", {2}), ("100%", {-5}), ("%", set()), ("_", set()),
    ],
)  # fmt: skip
def test_people_are_found_by_how_their_names_begin(database: str, text: str, ids: set[int]) -> None:
    fill(database, 5)
    assert set(FSMPeer.objects.using(database).called(text).values_list("peer_id", flat=True)) == ids


def test_the_search_uses_the_indexes(database: str) -> None:
    fill(database, 5000)
    execute(database, "ANALYZE TABLE fsm_storage_peer" if database == "mariadb" else "ANALYZE")
    plan = FSMPeer.objects.using(database).called("n77").explain()
    for part in ("title", "rest", "username"):
        assert f"fsm_storage_peer_{part}_key" in plan
    assert database != "mariadb" or "index_merge" in plan  # which names also those that it does not use
    assert "fsm_storage_peer_username_key" in FSMPeer.objects.using(database).called("@u77").explain()
