"""The text by which a record is known, that of a state, and the limits on both. Pure."""

from __future__ import annotations

from typing import Literal

from aiogram.fsm.state import State
from aiogram.fsm.storage.base import DEFAULT_DESTINY, KeyBuilder, StateType, StorageKey

from fsm_storage.exceptions import InvalidKey, InvalidKeyType, InvalidState, InvalidStateType

MAX_KEY_LENGTH = 512
MAX_STATE_LENGTH = 255
MAX_ALIAS_LENGTH = 63
MAX_ACTOR_LENGTH = 150
MAX_OWNER_LENGTH = 63
MAX_NAME_LENGTH = 255
_LOW, _HIGH = -(2**63), 2**63 - 1


def record_key(key: StorageKey, builder: KeyBuilder | None) -> str:
    """Return the text of `key`, by `builder` or by ours.

    Raises `InvalidKey` or `InvalidKeyType` if a part of it cannot be kept exactly.
    """
    bot, chat, user = key.bot_id, key.chat_id, key.user_id
    if (
        builder is None
        and type(bot) is type(chat) is type(user) is int
        and key.thread_id is None
        and key.business_connection_id is None
        and key.destiny == DEFAULT_DESTINY
        and _LOW <= bot <= _HIGH and _LOW <= chat <= _HIGH and _LOW <= user <= _HIGH
    ):  # fmt: skip
        return f"{bot}:{chat}:{user}"  # nearly always, and the rest would find nothing wrong with it
    check_key(key)
    try:
        text = (builder or _OURS).build(key)
    except ValueError as error:  # aiogram's own refuses the keys that it is not configured for
        reason = f"is refused by {type(builder).__name__}: {' '.join(str(error).split())}"
        raise InvalidKey("text", _OURS.build(key), reason) from error
    check_key_text(text)
    return text


class RecordKeyBuilder(KeyBuilder):
    """Builds `bot:chat:user:thread:business:destiny`; parts at the end that are absent are left out.

    Complete and unambiguous: two different `StorageKey` never share a text. aiogram's
    `DefaultKeyBuilder` leaves out the bot and the business connection unless told otherwise,
    so two bots share their states.
    """

    def build(self, key: StorageKey, part: Literal["data", "state", "lock"] | None = None) -> str:
        text = f"{key.bot_id}:{key.chat_id}:{key.user_id}"
        is_plain = key.thread_id is None and key.business_connection_id is None
        if is_plain and key.destiny == DEFAULT_DESTINY and part is None:
            return text
        thread = "" if key.thread_id is None else str(key.thread_id)
        business = "" if key.business_connection_id is None else _escape(key.business_connection_id)
        destiny = "" if key.destiny == DEFAULT_DESTINY else _escape(key.destiny)
        full = f"{text}:{thread}:{business}:{destiny}"
        return full.rstrip(":") if part is None else f"{full}:{part}"


_OURS = RecordKeyBuilder()


def _escape(value: str) -> str:
    """Free the separator. The empty text becomes a lone `%`, which differs from an absent part."""
    return value.replace("%", "%25").replace(":", "%3A") if value else "%"


def check_key(key: StorageKey) -> None:
    """Raise `InvalidKey` or `InvalidKeyType` if a part of `key` cannot be kept exactly."""
    for part, value in (("bot_id", key.bot_id), ("chat_id", key.chat_id), ("user_id", key.user_id)):
        if type(value) is not int:
            raise InvalidKeyType(part, value, "an int")
        if not _LOW <= value <= _HIGH:
            raise InvalidKey(part, value, "does not fit 64 bits")
    if key.thread_id is not None:
        if type(key.thread_id) is not int:
            raise InvalidKeyType("thread_id", key.thread_id, "an int or None")
        if not _LOW <= key.thread_id <= _HIGH:
            raise InvalidKey("thread_id", key.thread_id, "does not fit 64 bits")
    if key.business_connection_id is not None:
        _check_text("business_connection_id", key.business_connection_id)
    if key.destiny != DEFAULT_DESTINY:
        _check_text("destiny", key.destiny)


def check_key_text(text: str) -> None:
    """Raise `InvalidKey` if what a key builder made is too long to be told from another key."""
    if len(text) > MAX_KEY_LENGTH:
        raise InvalidKey("text", text, f"has {len(text)} characters, over the limit of {MAX_KEY_LENGTH}")
    flaw = text_flaw(text)
    if flaw:
        raise InvalidKey("text", text, flaw)


def _check_text(part: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidKeyType(part, value, "a str")
    if len(value) > MAX_KEY_LENGTH:
        raise InvalidKey(part, value, f"has {len(value)} characters, over the limit of {MAX_KEY_LENGTH}")
    flaw = text_flaw(value)
    if flaw:
        raise InvalidKey(part, value, flaw)


def name_key(text: str) -> str:
    """Return a name as it is searched: without difference of upper and lower case, in any script."""
    return text.casefold()[:MAX_NAME_LENGTH]


def state_text(state: StateType, key: str | None = None) -> str | None:
    """Return the text of a state, as aiogram does for a `State`; refuse what cannot be kept exactly."""
    if isinstance(state, State):
        state = state.state
    if state is None:
        return None
    if not isinstance(state, str):
        raise InvalidStateType(state, key)
    if len(state) > MAX_STATE_LENGTH:
        reason = f"has {len(state)} characters, over the limit of {MAX_STATE_LENGTH}"
        raise InvalidState(state, reason, key)
    flaw = text_flaw(state)
    if flaw:
        raise InvalidState(state, flaw, key)
    return str.__str__(state)


def text_flaw(text: str) -> str | None:
    """Say what keeps `text` out of a database, or None: NUL (PostgreSQL) or a lone surrogate (UTF-8)."""
    if "\0" in text:
        return "contains NUL"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"contains a lone surrogate at position {error.start}"
    return None
