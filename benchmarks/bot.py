"""The bot of the Dispatcher runs: some twenty handlers in six routers, which by themselves make no requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiogram import Bot, Dispatcher, F, Router
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.session.base import BaseSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.filters import Command, CommandStart, StateFilter
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage
from aiogram.types import Message, TelegramObject

Handler = Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]]


class Order(StatesGroup):
    name = State()
    phone = State()
    address = State()
    comment = State()
    confirm = State()


class Support(StatesGroup):
    topic = State()
    text = State()


class Feedback(StatesGroup):
    rating = State()
    text = State()


CONVERSATION = [
    "/start",
    "/order",
    "Ann Example",
    "+15550100",
    "Springfield, Evergreen Terrace 742",
    "Ring twice, please",
    "yes",
    "5",
    "It was quick",
    "what else is there",
]
"""What a chat says, over and over; at the end it is in no state and has no data."""


class NoRequests(BaseSession):
    """A session for handlers that make no requests."""

    async def close(self) -> None:
        pass

    async def make_request(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the benchmark's handlers make no requests")

    async def stream_content(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the benchmark's handlers make no requests")
        yield b""


def make_bot(bot_api: str | None = None) -> Bot:
    """Return a bot that makes its requests to the Bot API at this address; without one, none."""
    if bot_api is None:
        return Bot("42:benchmark", session=NoRequests())
    return Bot("42:benchmark", session=AiohttpSession(api=TelegramAPIServer.from_base(bot_api)))


async def answering(handler: Handler, message: TelegramObject, data: dict[str, Any]) -> Any:
    """Answer each message that a handler took, as nearly every bot does."""
    taken = await handler(message, data)
    await cast(Message, message).answer("Noted.")
    return taken


def make_dispatcher(storage: BaseStorage) -> Dispatcher:
    dispatcher = Dispatcher(storage=storage)
    dispatcher.include_routers(_staff(), _commands(), _order(), _support(), _feedback(), _rest())
    return dispatcher


def _staff() -> Router:
    router = Router(name="staff")
    router.message.filter(F.from_user.id.in_({1, 2, 3}))

    @router.message(Command("stats"))
    async def stats(message: Message) -> None: ...

    @router.message(Command("broadcast"))
    async def broadcast(message: Message) -> None: ...

    return router


def _commands() -> Router:
    router = Router(name="commands")

    @router.message(CommandStart())
    async def start(message: Message, state: FSMContext) -> None:
        await state.clear()
        await state.update_data(language=message.from_user.language_code, from_command=True)

    @router.message(Command("cancel"), StateFilter("*"))
    async def cancel(message: Message, state: FSMContext) -> None:
        await state.clear()

    @router.message(Command("help", "settings"))
    async def settings(message: Message) -> None: ...

    @router.message(Command("support"), StateFilter(None))
    async def support(message: Message, state: FSMContext) -> None:
        await state.set_state(Support.topic)

    @router.message(Command("order"), StateFilter(None))
    async def order(message: Message, state: FSMContext) -> None:
        await state.set_state(Order.name)
        await state.update_data(basket=[{"id": 17, "count": 2}, {"id": 4, "count": 1}])

    return router


def _order() -> Router:
    router = Router(name="order")

    @router.message(Order.name, F.text.len() < 3)
    async def short_name(message: Message) -> None: ...

    @router.message(Order.name, F.text)
    async def name(message: Message, state: FSMContext) -> None:
        await state.update_data(name=message.text)
        await state.set_state(Order.phone)

    @router.message(Order.phone, F.text.regexp(r"^\+\d{8,15}$"))
    async def phone(message: Message, state: FSMContext) -> None:
        await state.update_data(phone=message.text)
        await state.set_state(Order.address)

    @router.message(Order.phone)
    async def wrong_phone(message: Message) -> None: ...

    @router.message(Order.address, F.text)
    async def address(message: Message, state: FSMContext) -> None:
        await state.update_data(address=message.text, seen=message.message_id)
        await state.set_state(Order.comment)

    @router.message(Order.comment, F.text)
    async def comment(message: Message, state: FSMContext) -> None:
        await state.update_data(comment=message.text)
        await state.set_state(Order.confirm)

    @router.message(Order.confirm, F.text.lower() == "yes")
    async def confirm(message: Message, state: FSMContext) -> None:
        await state.update_data(confirmed=True)
        await state.set_state(Feedback.rating)

    @router.message(Order.confirm)
    async def not_understood(message: Message) -> None: ...

    return router


def _support() -> Router:
    router = Router(name="support")

    @router.message(Support.topic, F.text)
    async def topic(message: Message, state: FSMContext) -> None:
        await state.update_data(topic=message.text)
        await state.set_state(Support.text)

    @router.message(Support.text, F.text | F.photo)
    async def text(message: Message, state: FSMContext) -> None:
        await state.clear()

    return router


def _feedback() -> Router:
    router = Router(name="feedback")

    @router.message(Feedback.rating, F.text.in_({"1", "2", "3", "4", "5"}))
    async def rating(message: Message, state: FSMContext) -> None:
        await state.update_data(rating=int(message.text))
        await state.set_state(Feedback.text)

    @router.message(Feedback.text, F.text)
    async def text(message: Message, state: FSMContext) -> None:
        answers = await state.get_data()
        if answers["name"] != CONVERSATION[2] or answers["rating"] != 5:
            raise RuntimeError(f"the storage lost answers: {answers}")
        await state.clear()

    return router


def _rest() -> Router:
    router = Router(name="rest")

    @router.message(F.photo | F.document)
    async def file(message: Message, state: FSMContext) -> None:
        await state.update_data(file=message.message_id)

    @router.message(StateFilter(None))
    async def other(message: Message, state: FSMContext) -> None:
        await state.update_data(last=message.text)
        await state.set_state(None)

    return router
