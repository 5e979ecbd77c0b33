"""The stand-in, a bot that talks to it, and people to talk to."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Protocol

import aiohttp
import pytest
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.types import CallbackQuery, Chat, Message, Update, User

from fsm_storage import Expiry
from project.bot import GracefulDispatcher, build_bot, build_dispatcher
from project.bot_api import BotAPI
from project.bot_api.server import ANSWERS
from project.person import Pace, Person

ANNA = User(id=501, is_bot=False, first_name="Anna", last_name="Baker", language_code="en")
OLEG = User(id=502, is_bot=False, first_name="Олег <b>", language_code="ru")
PRIVATE = Chat(id=501, type="private", first_name="Anna")
FORUM = Chat(id=-1_001_000_000_001, type="supergroup", title="Office", is_forum=True)

Call = Callable[..., Awaitable[tuple[int, dict[str, Any]]]]


class MakePerson(Protocol):
    def __call__(self, user: User = ANNA, chat: Chat = PRIVATE, thread_id: int | None = None) -> Person: ...


@pytest.fixture(autouse=True, scope="session")
def _spare_the_loop() -> None:
    """Do before any loop runs what would stop it for a quarter of a second, and the loop watch with it.

    aiogram builds its models at first use, and a full garbage collection walks through all of them.
    """
    for model in (Update, Message, CallbackQuery):
        model.model_rebuild()
    for method, _ in ANSWERS.values():
        method.model_rebuild()
    gc.collect()
    gc.freeze()


@pytest.fixture
async def api() -> AsyncIterator[BotAPI]:
    async with BotAPI(token="42:stand-in") as api:
        yield api


@pytest.fixture
async def call(api: BotAPI) -> AsyncIterator[Call]:
    """Call a method over plain HTTP; return the status and the JSON."""
    async with aiohttp.ClientSession() as session:

        async def call(method: str, *, token: str = api.token, **params: Any) -> tuple[int, dict[str, Any]]:
            form = {name: str(value) for name, value in params.items()}
            async with session.post(f"{api.url}/bot{token}/{method}", data=form) as response:
                return response.status, await response.json()

        yield call


@pytest.fixture
def make_person(api: BotAPI) -> Iterator[MakePerson]:
    """Make a person who acts without delay."""
    pace = Pace(1000, random.Random(1))
    with ExitStack() as stack:

        def make(user: User = ANNA, chat: Chat = PRIVATE, thread_id: int | None = None) -> Person:
            inbox = stack.enter_context(api.listen(chat.id))
            return Person(api, user, chat, inbox, pace, thread_id=thread_id)

        yield make


@asynccontextmanager
async def running_bot(
    api: BotAPI, storage: BaseStorage, expiry: Expiry | None = None
) -> AsyncIterator[GracefulDispatcher]:
    """Let a bot poll in this process; at the end it shuts down as on SIGTERM."""
    dispatcher = build_dispatcher(storage)
    if expiry is not None:
        expiry.setup(dispatcher)
    bot = build_bot(api.token, api.url)
    assert isinstance(bot.session, AiohttpSession)
    polling = asyncio.create_task(
        dispatcher.start_polling(
            bot,
            handle_signals=False,
            close_bot_session=False,
            allowed_updates=dispatcher.resolve_used_update_types(),
        )
    )
    while not api.commands:
        assert not polling.done(), polling.result()
        await asyncio.sleep(0.001)
    yield dispatcher
    await dispatcher.stop_polling()
    await polling
    # `bot.session.close()` sleeps for a quarter of a second, for the sake of TLS.
    await (await bot.session.create_session()).close()


def key_of(person: Person) -> StorageKey:
    return StorageKey(
        bot_id=person.api.bot.id, chat_id=person.chat.id, user_id=person.user.id, thread_id=person.thread_id
    )
