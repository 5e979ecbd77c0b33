"""The order bot: `BOT_TOKEN=… python -m project.bot`. Copy it and put your own handlers in."""

import asyncio
import contextlib
import gc
import logging
import os
import sys
from typing import Any, NoReturn

import django
from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.session.middlewares.base import BaseRequestMiddleware, NextRequestMiddlewareType
from aiogram.client.telegram import PRODUCTION, TelegramAPIServer
from aiogram.exceptions import TelegramRetryAfter, TelegramUnauthorizedError
from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage
from aiogram.fsm.storage.memory import SimpleEventIsolation
from aiogram.fsm.strategy import FSMStrategy
from aiogram.methods import Response, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import BotCommand, Update
from aiogram.utils.token import TokenValidationError

from fsm_storage.chats import KeepNames, MoveChats
from project.handlers import build_router
from project.handlers.reminders import expiry

logger = logging.getLogger(__name__)

COMMANDS = [
    BotCommand(command="order", description="Order pizza"),
    BotCommand(command="support", description="Get help with an order"),
    BotCommand(command="feedback", description="Rate your last order"),
    BotCommand(command="lunch", description="Order together, in a group"),
    BotCommand(command="cancel", description="Stop what you are doing"),
]
DRAIN_TIMEOUT = 8.0  # seconds; Docker kills 10 s after SIGTERM
MISUSE = 2  # the exit code of a wrong command line or environment


class GracefulDispatcher(Dispatcher):
    """A dispatcher that lets running handlers finish before it shuts down.

    aiogram (3.31) ends polling on SIGTERM and closes the storage at once, so a handler that is
    half-way loses its next write, and the update, already confirmed to Telegram, does not return.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._running: set[asyncio.Task[Any]] = set()

    async def feed_update(self, bot: Bot, update: Update, **kwargs: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await super().feed_update(bot, update, **kwargs)
        finally:
            self._running.discard(task)

    async def emit_shutdown(self, *args: Any, **kwargs: Any) -> None:
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=DRAIN_TIMEOUT)
            if late:
                logger.error("%d handlers did not finish in %.0f s", len(late), DRAIN_TIMEOUT)
        await super().emit_shutdown(*args, **kwargs)


class FloodPatience(BaseRequestMiddleware):
    """Waits as long as Telegram asks (429, `retry_after`) and sends the request again, twice at most."""

    async def __call__(
        self,
        make_request: NextRequestMiddlewareType[TelegramType],
        bot: Bot,
        method: TelegramMethod[TelegramType],
    ) -> Response[TelegramType]:
        for _ in range(2):
            try:
                return await make_request(bot, method)
            except TelegramRetryAfter as flood:
                logger.warning("%s: flood, waiting %d s", type(method).__name__, flood.retry_after)
                await asyncio.sleep(flood.retry_after)
        return await make_request(bot, method)


def build_dispatcher(
    storage: BaseStorage, events_isolation: BaseEventIsolation | None = None
) -> GracefulDispatcher:
    """Return a new dispatcher with all conversations.

    A person's state belongs to one topic of one chat, so the topics of a group don't disturb each
    other. One update of a person is handled at a time, over all processes of the bot if the storage
    brings an isolation of its own, else within this one.
    """
    if events_isolation is None:
        create = getattr(storage, "create_isolation", SimpleEventIsolation)
        events_isolation = create()
    dispatcher = GracefulDispatcher(
        storage=storage,
        fsm_strategy=FSMStrategy.USER_IN_TOPIC,
        events_isolation=events_isolation,
    )
    dispatcher.update.outer_middleware(MoveChats())
    dispatcher.update.outer_middleware(KeepNames())
    dispatcher.include_router(build_router())
    dispatcher.startup.register(set_commands)
    return dispatcher


def build_bot(token: str, api_url: str | None = None) -> Bot:
    """Return a bot that talks to Telegram, or to the Bot API server at `api_url`."""
    session = AiohttpSession(api=TelegramAPIServer.from_base(api_url) if api_url else PRODUCTION)
    session.middleware(FloodPatience())
    return Bot(token, session=session)


async def set_commands(bot: Bot) -> None:
    await bot.set_my_commands(COMMANDS)


async def run(token: str, api_url: str | None = None) -> None:
    """Poll until SIGTERM or SIGINT. Handlers in progress finish; storage and session are closed."""
    from fsm_storage import DjangoStorage, storages  # needs django.setup()

    async with build_bot(token, api_url) as bot:
        storage = storages["default"]
        dispatcher = build_dispatcher(storage)
        if isinstance(storage, DjangoStorage):  # Redis removes by itself what has expired
            expiry.setup(dispatcher)
        # What aiogram and Django have loaded stays for good. Without this, each full collection
        # walks through all of it and stops the loop for 0.1 s and more.
        gc.collect()
        gc.freeze()
        await dispatcher.start_polling(bot, allowed_updates=dispatcher.resolve_used_update_types())


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    django.setup()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    token = os.environ.get("BOT_TOKEN")
    if not token:
        _misused("BOT_TOKEN is not set. Get a token from @BotFather, then: BOT_TOKEN=… python -m project.bot")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(token, os.environ.get("BOT_API_URL")))
    except TokenValidationError:
        _misused("BOT_TOKEN is not a bot token; one looks like 123456:ABC-DEF.")
    except TelegramUnauthorizedError:
        _misused("Telegram does not know this BOT_TOKEN.")


def _misused(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(MISUSE)


if __name__ == "__main__":
    main()
