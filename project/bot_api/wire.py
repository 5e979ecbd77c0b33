"""Requests and replies as they travel: parameters, refusals, and the rules that Telegram checks."""

import itertools
import json
from typing import Any

from aiogram.methods import Response, TelegramMethod
from aiogram.types import InlineKeyboardMarkup, Message, MessageEntity, ResponseParameters, TelegramObject
from aiohttp import web
from pydantic import ValidationError

MAX_TEXT = 4096
MAX_CALLBACK_DATA = 64  # bytes

Method = TelegramMethod[Any]


class APIError(Exception):
    """A request was refused, with Telegram's own code and words."""

    def __init__(self, code: int, description: str, retry_after: int | None = None) -> None:
        super().__init__(description)
        self.code, self.description, self.retry_after = code, description, retry_after

    def response(self) -> web.Response:
        parameters = ResponseParameters(retry_after=self.retry_after) if self.retry_after else None
        reply = Response[Any](
            ok=False, error_code=self.code, description=self.description, parameters=parameters
        )
        return web.json_response(reply.model_dump(exclude_none=True), status=self.code)


def bad_request(reason: str) -> APIError:
    return APIError(400, f"Bad Request: {reason}")


def decode(kind: type[Method], name: str, value: Any) -> Any:
    """Undo what a client does to a parameter on its way into a form: all but text is JSON there."""
    field = kind.model_fields.get(name)
    if field is None or field.annotation in (str, str | None):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def flaw_of(error: ValidationError) -> str:
    """Say what is wrong with a request; what is missing altogether, in Telegram's words."""
    flaw = error.errors()[0]
    name = ".".join(map(str, flaw["loc"]))
    if flaw["type"] == "missing":
        return {"text": "message text is empty"}.get(name, f"{name} is empty")
    return f"{name}: {flaw['msg']}"


def checked_text(text: str | None) -> str:
    text = (text or "").strip()
    if not text:
        raise bad_request("message text is empty")
    if len(text) > MAX_TEXT:
        raise bad_request("message is too long")
    return text


def checked_keyboard(markup: TelegramObject | None) -> InlineKeyboardMarkup | None:
    """Return an inline keyboard, the only kind that becomes part of its message."""
    if not isinstance(markup, InlineKeyboardMarkup):
        return None
    for button in itertools.chain.from_iterable(markup.inline_keyboard):
        if not 0 < len((button.callback_data or "").encode()) <= MAX_CALLBACK_DATA:
            raise bad_request("BUTTON_DATA_INVALID")
    return markup


def callback_data(message: Message, text: str) -> str:
    keyboard = message.reply_markup.inline_keyboard if message.reply_markup else []
    for button in itertools.chain.from_iterable(keyboard):
        if button.text == text and button.callback_data:
            return button.callback_data
    raise LookupError(f"no button {text!r} under {message.text!r}")


def command_entities(text: str) -> list[MessageEntity] | None:
    if not text.startswith("/"):
        return None
    return [MessageEntity(type="bot_command", offset=0, length=len(text.split()[0]))]


def without_quote(message: Message) -> Message:
    """Return the message as a reply to it shows it: without what it replied to itself."""
    return message.model_copy(update={"reply_to_message": None})


def dump(result: Any) -> Any:
    if isinstance(result, list):
        return [dump(item) for item in result]
    if isinstance(result, TelegramObject):
        return result.model_dump(mode="json", by_alias=True, exclude_none=True)
    return result
