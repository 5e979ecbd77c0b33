"""The outbox: how the writes of a `RedisStorage` stand in its Redis stream. Pure: no Redis, no clock.

An entry is what one Redis transaction wrote: its records, in their order. A record is one pair of
field and value: the field is a header, a JSON array, and the value is what was written, as it is in
Redis, or nothing for a part that was removed:

    [0,"state",172800000,42,-100,7]              Form:name
    [1,"-data",null,42,-100,7,5,"biz","other"]   (empty)

The header's items are a number that keeps fields apart (clients make dicts of them), the part, its TTL
in milliseconds, the bot, the chat, the user, the thread, the business connection and the destiny, then
the source and the actor of a change that the bot did not make. Those at the end that are usual are left
out. The time of an entry is its id, which Redis gives it: by its own clock, and in one order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from aiogram.fsm.storage.base import DEFAULT_DESTINY, StorageKey

from fsm_storage.exceptions import InvalidOutboxRecord
from fsm_storage.keys import check_key

Part: TypeAlias = Literal["state", "data"]
STATE: Final = "state"
DATA: Final = "data"

_SEQUENCE_BITS = 20


def stream_name(alias: str) -> str:
    """Return the name of the stream of a storage. The braces keep all its keys in one Cluster slot."""
    return f"fsm_storage:{{{alias}}}:outbox"


def missed_name(alias: str) -> str:
    """Return the name of the set of keys (`encode_key`) that were written while the outbox was full.

    Their values are not in the stream: whoever mirrors announces them anew, as they are then.
    """
    return f"fsm_storage:{{{alias}}}:missed"


def aside_name(alias: str) -> str:
    """Return the name of the stream of entries that can never be applied, each with the reason."""
    return f"fsm_storage:{{{alias}}}:aside"


class Record(NamedTuple):
    """One write of one part. `value` None: removed. `ttl_ms` None: kept for ever.

    `source` and `actor` say who changed it if it was not the bot.
    """

    key: StorageKey
    part: Part
    value: str | None
    ttl_ms: int | None = None
    source: str = ""
    actor: str = ""


class Header(NamedTuple):
    """What a field says of the value beside it."""

    key: StorageKey
    part: Part
    is_removed: bool
    ttl_ms: int | None
    source: str
    actor: str


def encode(records: Iterable[Record]) -> list[str]:
    """Return the fields and values of one entry: what stands behind `XADD stream *`."""
    pairs: list[str] = []
    for number, record in enumerate(records):
        pairs += (encode_header(record, number), "" if record.value is None else record.value)
    return pairs


def encode_header(record: Record, number: int = 0) -> str:
    key, part, value, ttl_ms, source, actor = record
    sign = "-" if value is None else ""
    ttl = "null" if ttl_ms is None or value is None else ttl_ms
    head = f'[{number},"{sign}{part}",{ttl},{key.bot_id},{key.chat_id},{key.user_id}'
    if (
        not source and not actor
        and key.thread_id is None
        and key.business_connection_id is None
        and key.destiny == DEFAULT_DESTINY
    ):  # fmt: skip
        return head + "]"
    rest = [key.thread_id, key.business_connection_id, key.destiny, source, actor]
    return f"{head},{json.dumps(rest)[1:]}"


def decode(fields: Mapping[Any, Any]) -> list[Record | InvalidOutboxRecord]:
    """Return the records of an entry, in their order; in the place of one that is no record, the error."""
    return [_decoded(field, value) for field, value in fields.items()]


def _decoded(field: Any, value: Any) -> Record | InvalidOutboxRecord:
    try:
        return decode_record(field, value)
    except InvalidOutboxRecord as error:
        return error


def decode_record(header: str | bytes, value: str | bytes) -> Record:
    """Return the record in one pair. Raises `InvalidOutboxRecord`."""
    about = decode_header(without_number(header))
    try:
        text = None if about.is_removed else value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InvalidOutboxRecord(header, str(error)) from error
    return Record(about.key, about.part, text, about.ttl_ms, about.source, about.actor)


def without_number(header: str | bytes) -> bytes:
    """Return what a header says, which those of one key and part have in common. Raises `InvalidOutboxRecord`."""
    data = header.encode() if isinstance(header, str) else header
    number, _, rest = data.partition(b",")
    if number[:1] != b"[" or not number[1:].isdigit():
        raise InvalidOutboxRecord(header, "it does not begin with a number")
    return rest


def decode_header(rest: bytes) -> Header:
    """Return what a header says behind its number. Raises `InvalidOutboxRecord`."""
    try:
        part, ttl_ms, *more = json.loads(b"[" + rest)
        *key, source, actor = _filled(more, ["", ""])
        is_removed = part[:1] == "-"
        header = Header(StorageKey(*key), part[1:] if is_removed else part, is_removed, ttl_ms, source, actor)
        _check(header)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidOutboxRecord(rest, str(error)) from error
    return header


def _check(header: Header) -> None:
    check_key(header.key)
    if header.part not in (STATE, DATA):
        raise ValueError(f"the part {header.part!r} is not known")
    if not isinstance(header.source, str) or not isinstance(header.actor, str):
        raise TypeError("source and actor must be texts")
    ttl_ms = header.ttl_ms
    if ttl_ms is not None and (type(ttl_ms) is not int or ttl_ms <= 0):
        raise ValueError(f"the TTL must be milliseconds above 0, not {ttl_ms!r}")


def encode_key(key: StorageKey) -> str:
    """Return the text of a key that `decode_key` gives back whole."""
    rest = (key.thread_id, key.business_connection_id, key.destiny)
    if rest == (None, None, DEFAULT_DESTINY):
        return f"[{key.bot_id},{key.chat_id},{key.user_id}]"
    return json.dumps([key.bot_id, key.chat_id, key.user_id, *rest], separators=(",", ":"))


def decode_key(text: str | bytes) -> StorageKey:
    """Return the key in `text`. Raises `InvalidOutboxRecord`."""
    try:
        key = StorageKey(*_filled(json.loads(text), []))
        check_key(key)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidOutboxRecord(text, str(error)) from error
    return key


def _filled(items: list[Any], more: list[str]) -> list[Any]:
    """Put in what was left out at the end."""
    usual = [None, None, DEFAULT_DESTINY, *more]
    if not 3 <= len(items) <= 3 + len(usual):
        raise ValueError(f"{len(items)} items for a key")
    return [*items, *usual[len(items) - 3 :]]


def version_of(entry_id: str | bytes) -> int:
    """Return the id of an entry as a whole number of 63 bits that grows as the ids do.

    Milliseconds in the upper bits, the number within the millisecond in the lower 20. It holds until the
    year 2248, and for a million entries within one millisecond. More can only come while the server's
    clock, set back, stands still for the stream; they are counted into the milliseconds that follow.
    """
    ms, sequence = _id_parts(entry_id)
    version = (ms << _SEQUENCE_BITS) + sequence
    if version >= 2**63:
        raise InvalidOutboxRecord(entry_id, "the id is beyond 63 bits")
    return version


def id_of(version: int) -> str:
    """Return the id of the entry with this version."""
    return f"{version >> _SEQUENCE_BITS}-{version & (1 << _SEQUENCE_BITS) - 1}"


def written_at_ms(entry_id: str | bytes) -> int:
    """Return when an entry was written by Redis's clock, in milliseconds since the epoch."""
    return _id_parts(entry_id)[0]


def expires_at_ms(entry_id: str | bytes, record: Record) -> int | None:
    """Return when the part that `record` set expires by Redis's clock; None is never."""
    return None if record.ttl_ms is None else written_at_ms(entry_id) + record.ttl_ms


def _id_parts(entry_id: str | bytes) -> tuple[int, int]:
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    ms, _, sequence = text.partition("-")
    if not (text.isascii() and ms.isdecimal() and sequence.isdecimal()):
        raise InvalidOutboxRecord(entry_id, "no id of a stream entry")
    return int(ms), int(sequence)
