"""What aiogram-sqlite-storage keeps in its file: a row for each conversation, its data as a pickle or as JSON."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.sources import SourceError, broken
from fsm_storage.sources.layout import KeyLayout
from fsm_storage.sources.values import data_of, unpickled_data_of
from fsm_storage.transfer import Conversation, Found, Refused

_KEY = re.compile(r"(\d{1,19}):(-?\d{1,19}):(-?\d{1,19})", re.ASCII)


def read(url: str, layout: KeyLayout, clock: Callable[[], datetime]) -> Iterator[Found]:
    """Yield the conversations in the file at `sqlite:path`, which is opened for reading only.

    Its keys are always bot, chat and user, and nothing in it expires.
    """
    path = Path(url.removeprefix("sqlite:").removeprefix("//"))
    if not path.is_file():
        raise SourceError(f"there is no file {str(path)!r}")
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        # Text that is no UTF-8 is refused by its row, not by the whole file.
        connection.text_factory = bytes
        try:
            rows = connection.execute(
                "SELECT rowid, key, state, data, typeof(data) FROM fsm_data ORDER BY rowid"
            )
            for row in rows:
                yield _found(*row)
        finally:
            connection.close()
    except sqlite3.Error as error:
        broken(url, error)


def _found(row: int, raw: Any, state: Any, data: Any, kind: bytes) -> Found:
    place = f"row {row}"
    try:
        text = _text(raw) or ""
        place = f"key {text!r}"
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError("is no key of bot, chat and user")
        bot, chat, user = map(int, match.groups())
        content = unpickled_data_of(data) if kind == b"blob" else data_of(data)
        return Found(place, Conversation(StorageKey(bot, chat, user), _text(state), content))
    except (ValueError, TypeError) as error:
        return Found(place, Refused(str(error)))


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, bytes):
        raise TypeError(f"has a {type(value).__name__} where text belongs")
    return value if value is None else value.decode()
