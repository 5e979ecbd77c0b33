"""What a mirror would make of the outbox: the slow obvious way, as the oracle."""

from __future__ import annotations

from typing import Any

import redis
from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder

from fsm_storage.outbox import Record, decode, stream_name, version_of

DEFAULT = DefaultKeyBuilder()


def entries(raw: redis.Redis, alias: str = "default") -> list[tuple[bytes, list[Record]]]:
    found: list[Any] = raw.xrange(stream_name(alias))
    read = [(entry_id, decode(fields)) for entry_id, fields in found]
    assert all(type(record) is Record for _, records in read for record in records)
    versions = [version_of(entry_id) for entry_id, _ in read]
    assert versions == sorted(set(versions))
    return read


def records(raw: redis.Redis, alias: str = "default") -> list[Record]:
    return [record for _, written in entries(raw, alias) for record in written]


def replayed(raw: redis.Redis, alias: str = "default", builder: KeyBuilder = DEFAULT) -> dict[bytes, bytes]:
    """Return what Redis has if the outbox tells everything."""
    kept: dict[bytes, bytes] = {}
    for record in records(raw, alias):
        name = builder.build(record.key, record.part).encode()
        if record.value is None:
            kept.pop(name, None)
        else:
            kept[name] = record.value.encode()
    return kept


def stored(raw: redis.Redis) -> dict[bytes, bytes]:
    """Return what Redis has, the outbox aside."""
    names = [name for name in raw.keys("*") if not name.startswith(b"fsm_storage:")]
    return dict(zip(names, raw.mget(names), strict=True)) if names else {}
