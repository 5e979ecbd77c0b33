"""When a group becomes a supergroup, Telegram gives it another id: its conversations go along."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import BaseMiddleware, Bot
from aiogram.client.session.middlewares.base import BaseRequestMiddleware, NextRequestMiddlewareType
from aiogram.exceptions import TelegramMigrateToChat
from aiogram.fsm.storage.base import BaseStorage
from aiogram.methods import Response, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import Message, TelegramObject, Update

logger = logging.getLogger("fsm_storage")


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
