"""What a bot learns about chats: another id, when a group becomes a supergroup, and what they are called."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiogram import BaseMiddleware, Bot
from aiogram.client.session.middlewares.base import BaseRequestMiddleware, NextRequestMiddlewareType
from aiogram.dispatcher.middlewares.user_context import EVENT_CONTEXT_KEY, EventContext
from aiogram.exceptions import TelegramMigrateToChat
from aiogram.fsm.storage.base import BaseStorage
from aiogram.methods import Response, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import Chat, Message, TelegramObject, Update, User

from fsm_storage.dialects import Naming
from fsm_storage.keys import MAX_NAME_LENGTH

logger = logging.getLogger("fsm_storage")

MAX_KNOWN = 10_000
"""Names that are remembered as written; about 2 MB. One that was forgotten is looked at again, once."""
MAX_ON_THE_WAY = 500
QUIET_SECONDS = 60.0


class MoveChats(BaseMiddleware):
    """Moves a chat's conversations when Telegram says that its id has changed.

        dispatcher.update.outer_middleware(MoveChats())

    Telegram says it twice, in the old chat and in the new one; the first message moves all, the
    second finds what came in between. The handlers of the message are called after the move, also if it failed,
    which is logged. Works with the dispatcher's storage if that has `move_chat`, as ours do.
    """

    async def __call__(
        self,
        handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
        event: TelegramObject,
        data: dict[str, Any],
    ) -> Any:
        message = event.message if isinstance(event, Update) else event
        ids = _change_of_id(message) if isinstance(message, Message) else None
        if ids is not None:
            await _move(data["fsm_storage"], data["bot"].id, *ids)
            if "state" in data:  # it was read before
                data["raw_state"] = await data["state"].get_state()
        return await handler(event, data)


class FollowMovedChats(BaseRequestMiddleware):
    """Sends a request again to the new id, after moving the conversations, if the chat's id has changed.

        bot.session.middleware(FollowMovedChats(storage))

    For a bot that writes to a group by itself, and learns from the error that it has become a supergroup.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage

    async def __call__(
        self,
        make_request: NextRequestMiddlewareType[TelegramType],
        bot: Bot,
        method: TelegramMethod[TelegramType],
    ) -> Response[TelegramType]:
        try:
            return await make_request(bot, method)
        except TelegramMigrateToChat as moved:
            old, new = getattr(method, "chat_id", None), moved.migrate_to_chat_id
            if not isinstance(old, int):
                raise
            await _move(self.storage, bot.id, old, new)
            return await make_request(bot, method.model_copy(update={"chat_id": new}))


class KeepNames(BaseMiddleware):
    """Keeps what chats and users are called, for the admin.

        dispatcher.update.outer_middleware(KeepNames())

    Writes a name when it is new or has changed, in a batch with what the bot writes anyway. No update
    waits for it, and none fails by it: a name that could not be written is tried again at the next
    update from there, and the error is logged, once in a while. Works through the dispatcher's storage
    if that is a `DjangoStorage`, else through the one given.
    """

    def __init__(self, storage: BaseStorage | None = None) -> None:
        self.storage = storage
        self._known: dict[int, tuple[str, str]] = {}
        self._on_the_way: set[asyncio.Future[Any]] = set()
        self._silent_until = 0.0

    async def __call__(
        self,
        handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
        event: TelegramObject,
        data: dict[str, Any],
    ) -> Any:
        try:
            storage = self.storage or data["fsm_storage"]
            context: EventContext = data[EVENT_CONTEXT_KEY]
            written = [self._note(storage, peer) for peer in (context.chat, context.user) if peer is not None]
            if getattr(storage, "in_transaction", False):  # a test, which looks at once
                await asyncio.gather(*filter(None, written))
        except Exception as error:
            self._complain(error)
        return await handler(event, data)

    def _note(self, storage: Any, peer: Chat | User) -> asyncio.Future[Any] | None:
        name = _plain(_full_name(peer)), _plain(peer.username or "")
        if self._known.get(peer.id) == name or len(self._on_the_way) >= MAX_ON_THE_WAY:
            return None
        writing: asyncio.Future[Any] = asyncio.ensure_future(storage.submit(Naming(peer.id, *name)))
        self._on_the_way.add(writing)
        self._known.pop(peer.id, None)
        self._known[peer.id] = name
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        writing.add_done_callback(partial(self._done, peer.id))
        return writing

    def _done(self, peer_id: int, writing: asyncio.Future[Any]) -> None:
        self._on_the_way.discard(writing)
        error = None if writing.cancelled() else writing.exception()
        if error is not None:
            self._complain(error)
        if writing.cancelled() or error is not None or writing.result() is None:
            self._known.pop(peer_id, None)

    def _complain(self, error: BaseException) -> None:
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + QUIET_SECONDS
            logger.error("names of chats and users are not kept: %s: %s", type(error).__name__, error)


def _full_name(peer: Chat | User) -> str:
    """Return a chat's title, or a person's name; of a deleted account, nothing."""
    return getattr(peer, "title", None) or " ".join(filter(None, (peer.first_name, peer.last_name)))


def _plain(name: str) -> str:
    """Return what the database can keep of a name."""
    return name.encode(errors="ignore").decode().replace("\0", "")[:MAX_NAME_LENGTH]


def _change_of_id(message: Message) -> tuple[int, int] | None:
    """Return the old id and the new one, if this is one of the two messages that tell."""
    if message.migrate_to_chat_id is not None:
        return message.chat.id, message.migrate_to_chat_id
    if message.migrate_from_chat_id is not None:
        return message.migrate_from_chat_id, message.chat.id
    return None


async def _move(storage: BaseStorage, bot_id: int, old: int, new: int) -> None:
    move_chat = getattr(storage, "move_chat", None)
    if move_chat is None:
        logger.warning(
            "chat %d is %d now, but %s cannot move its conversations", old, new, type(storage).__name__
        )
        return
    try:
        moved = await move_chat(bot_id, old, new)
    except Exception:
        logger.exception("the conversations of chat %d could not be moved to %d", old, new)
    else:
        logger.info("chat %d is %d now: %d conversations moved", old, new, moved)
