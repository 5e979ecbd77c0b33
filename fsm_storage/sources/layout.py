"""How aiogram's `DefaultKeyBuilder` wrote a key, and back again. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from aiogram.fsm.storage.base import DEFAULT_DESTINY, DefaultKeyBuilder, StorageKey

Part = Literal["state", "data", "lock"]
_PARTS: tuple[Part, ...] = ("state", "data", "lock")


class KeyLayout(NamedTuple):
    """The arguments of the bot's `DefaultKeyBuilder`; `bot_id` is the bot of keys that name none."""

    prefix: str = "fsm"
    separator: str = ":"
    with_bot_id: bool = False
    with_business_connection_id: bool = False
    with_destiny: bool = False
    bot_id: int | None = None

    @property
    def beginning(self) -> str:
        """What all keys begin with."""
        return self.prefix + self.separator

    def split(self, text: str) -> tuple[str, Part]:
        """Cut the part off a key: "fsm:1:2:state" is "fsm:1:2" and "state". Raises `ValueError`."""
        for part in _PARTS:
            if text.endswith(self.separator + part):
                return text[: -len(self.separator + part)], part
        raise ValueError(f"ends in none of {', '.join(self.separator + part for part in _PARTS)}")

    def join(self, text: str, part: Part) -> str:
        return f"{text}{self.separator}{part}"

    def parse(self, text: str) -> StorageKey:
        """Return the key that the key builder wrote as `text`, without a part.

        Raises `ValueError` for a text that it cannot have written, and for one that can be read in two
        ways. Where a number may be a topic or a business connection, it is a topic: the ids of business
        connections have letters.
        """
        found = sorted(self._readings(text), key=lambda reading: reading[0])
        if not found:
            raise ValueError(f"does not fit the layout {self}")
        if len(found) > 1 and found[0][0] == found[1][0]:
            raise ValueError(f"can be read in two ways by the layout {self}")
        key = found[0][1]
        if not self.with_bot_id and key.thread_id == key.user_id:
            raise ValueError(
                "has a topic with the number of its user, so the first number is a bot: --with-bot-id is missing"
            )
        return key

    def _readings(self, text: str) -> Iterator[tuple[tuple[int, bool], StorageKey]]:
        """Yield the keys that would be written as `text`, each behind how unlikely it is."""
        for has_business in (False, True) if self.with_business_connection_id else (False,):
            for has_thread in (False, True):
                match = re.fullmatch(self._pattern(has_business, has_thread), text, re.ASCII | re.DOTALL)
                if match is None:
                    continue
                values = match.groupdict()
                business, destiny = values.get("business"), values.get("destiny", DEFAULT_DESTINY)
                key = StorageKey(
                    bot_id=int(values.get("bot") or self.bot_id or 0),
                    chat_id=int(values["chat"]),
                    user_id=int(values["user"]),
                    thread_id=int(values["thread"]) if has_thread else None,
                    business_connection_id=business,
                    destiny=destiny,
                )
                if self._builder().build(key) == text:
                    separators = destiny.count(self.separator) + (business or "").count(self.separator)
                    yield (separators, business is not None and not re.search(r"[^\W\d]", business)), key

    def _pattern(self, has_business: bool, has_thread: bool) -> str:
        number, separator = r"-?\d{1,19}", re.escape(self.separator)
        pieces = [
            re.escape(self.prefix),
            r"(?P<bot>\d{1,19})" if self.with_bot_id else "",
            r"(?P<business>.+)" if has_business else "",
            f"(?P<chat>{number})",
            r"(?P<thread>\d{1,19})" if has_thread else "",
            f"(?P<user>{number})",
            r"(?P<destiny>.*)" if self.with_destiny else "",
        ]
        return separator.join(piece for piece in pieces if piece)

    def _builder(self) -> DefaultKeyBuilder:
        return DefaultKeyBuilder(
            prefix=self.prefix,
            separator=self.separator,
            with_bot_id=self.with_bot_id,
            with_business_connection_id=self.with_business_connection_id,
            with_destiny=self.with_destiny,
        )

    def __str__(self) -> str:
        names = {
            "bot id": self.with_bot_id,
            "business connection?": self.with_business_connection_id,
            "chat": True,
            "topic?": True,
            "user": True,
            "destiny": self.with_destiny,
        }
        return self.separator.join(
            [self.prefix, *(f"<{name}>" for name, is_there in names.items() if is_there)]
        )
