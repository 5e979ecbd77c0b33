"""Conversations as JSON lines: the format that the admin and `fsm_export` write and `fsm_import` reads.

Each line stands by itself, with the number of the format in it, so that files can be cut and joined.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, BinaryIO

from aiogram.fsm.storage.base import StorageKey
from django.db.models import QuerySet
from django.utils import timezone

from fsm_storage.exceptions import FSMStorageError
from fsm_storage.keys import check_key, check_key_text
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.transfer import Conversation, Found, Refused, Step

FORMAT = 1
BEGINNING = b'{"format": 1, "type": "'
PAGE = 200
MAX_LINE = 32 * 1024 * 1024
"""Bytes. Data may take 1 Mi characters, a character up to twelve bytes, and a transition has two of them."""

KEY = ("bot_id", "chat_id", "user_id", "thread_id", "business_connection_id", "destiny")
CONVERSATION = (
    "alias", "key", *KEY, "state", "data", "state_expires_at", "data_expires_at",
    "version", "created_at", "updated_at",
)  # fmt: skip
TRANSITION = (
    "alias", "key", "bot_id", "chat_id", "user_id", "from_state", "to_state", "at", "source", "actor",
    "data_before", "data_after",
)  # fmt: skip

Look = Callable[[Any], Any]


def conversation_lines(
    records: QuerySet[FSMRecord], *, after: int | None = None, look: Look | None = None
) -> Iterator[str]:
    """Yield lines, one for each record, in the order of their ids after `after`; a page at a time.

    Walks along the ids instead of holding a query open, so that a slow reader holds up nothing.
    `look` returns data as the reader may see it; what it changes is marked, and cannot be imported.
    """
    for page in _pages(records, after):
        yield "".join(conversation_line(record, look) for record in page)


def transition_lines(transitions: QuerySet[FSMTransition], *, after: int | None = None) -> Iterator[str]:
    """Yield lines, one for each transition, in the order in which they happened."""
    for page in _pages(transitions, after):
        yield "".join(map(transition_line, page))


def conversation_line(record: FSMRecord, look: Look | None = None) -> str:
    """Return the line of a record, with its end."""
    if look is None:
        return _line("conversation", record, CONVERSATION)
    data = look(record.data)
    changes = {"data": data} if data == record.data else {"data": data, "masked": True}
    return _line("conversation", record, CONVERSATION, **changes)


def transition_line(transition: FSMTransition) -> str:
    """Return the line of a transition, with its end."""
    return _line("transition", transition, TRANSITION)


def read_lines(file: BinaryIO, first: int = 1) -> Iterator[Found]:
    """Yield what the lines from number `first` on hold. A line that cannot be read is refused by itself."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        is_whole = line.endswith(b"\n") or len(line) < MAX_LINE
        while not is_whole:
            rest = file.readline(MAX_LINE)
            is_whole = len(rest) < MAX_LINE or rest.endswith(b"\n")
        if number >= first and line.strip():
            yield Found(f"line {number}", _read(line))


def read_line(line: str | bytes) -> Conversation | Step:
    """Return what a line holds. Raises `ValueError` or `TypeError` that says what is wrong with it."""
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise TypeError(f"is a JSON {type(values).__name__} where an object belongs")
    if values.get("format") != FORMAT:
        raise ValueError(f"has the format {values.get('format')!r}; this version reads format {FORMAT}")
    match values.get("type"):
        case "conversation":
            return _read_conversation(values)
        case "transition":
            return _read_transition(values)
        case other:
            raise ValueError(f"has the type {other!r}, which is neither conversation nor transition")


def last_id(line: str | bytes) -> tuple[str, int]:
    """Return type and id of a line that `fsm_export` wrote: where to go on. Raises `ValueError`."""
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT or type(values.get("id")) is not int:
        raise ValueError(f"no line of an export of format {FORMAT}")
    return str(values.get("type")), values["id"]


def _pages(rows: QuerySet[Any], after: int | None) -> Iterator[list[Any]]:
    ordered = rows.order_by("pk")
    while True:
        page = list((ordered if after is None else ordered.filter(pk__gt=after))[:PAGE])
        if not page:
            return
        yield page
        after = page[-1].pk


def _line(kind: str, row: Any, fields: tuple[str, ...], **changes: Any) -> str:
    values = {"format": FORMAT, "type": kind, "id": row.pk, **{name: getattr(row, name) for name in fields}}
    return json.dumps(values | changes, ensure_ascii=False, default=_instant) + "\n"


def _instant(value: Any) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"{type(value).__name__} in a record")
    return (value if timezone.is_aware(value) else timezone.make_aware(value)).isoformat()


def _read(line: bytes) -> Conversation | Step | Refused:
    if len(line) >= MAX_LINE:
        return Refused(f"is longer than {MAX_LINE} bytes")
    try:
        return read_line(line.decode())
    except UnicodeDecodeError as error:
        return Refused(f"is no UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, TypeError) as error:
        return Refused(str(error))


def _read_conversation(values: dict[str, Any]) -> Conversation:
    if values.get("masked"):
        raise ValueError("has masked data: who exported it may not see all of it")
    if not isinstance(values.get("data"), dict):
        raise TypeError(f"has data of type {type(values.get('data')).__name__} where an object belongs")
    return Conversation(
        _key(values),
        _text(values, "state"),
        values["data"],
        _time(values, "state_expires_at"),
        _time(values, "data_expires_at"),
        _text(values, "alias"),
        _time(values, "created_at"),
        _time(values, "updated_at"),
    )


def _read_transition(values: dict[str, Any]) -> Step:
    at, source = _time(values, "at"), values.get("source")
    if at is None:
        raise ValueError("has no time: 'at' is missing")
    if source not in FSMTransition.Source.values:
        raise ValueError(f"has the source {source!r}, which is not one of {FSMTransition.Source.values}")
    text = _text(values, "key")
    if text is None:
        raise ValueError("names no key: 'key' is missing")
    check_key_text(text)
    return Step(
        text,
        _key(values),
        _text(values, "alias"),
        _text(values, "from_state"),
        _text(values, "to_state"),
        at,
        source,
        _text(values, "actor") or "",
        values.get("data_before"),
        values.get("data_after"),
    )


def _key(values: dict[str, Any]) -> StorageKey:
    missing = [name for name in ("bot_id", "chat_id", "user_id") if name not in values]
    if missing:
        raise ValueError(f"names no key: {', '.join(missing)} missing")
    given = {name: values[name] for name in KEY if name in values}
    try:
        key = StorageKey(**given)
        check_key(key)
    except FSMStorageError as error:
        raise ValueError(str(error)) from error
    return key


def _text(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"has a {name} of type {type(value).__name__} where text or null belongs")
    return value


def _time(values: dict[str, Any], name: str) -> datetime | None:
    value = _text(values, name)
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"has {name} {value!r}, which is no time") from error
    if at.tzinfo is None:
        raise ValueError(f"has {name} {value!r} without a time zone")
    return at
