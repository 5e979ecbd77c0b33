"""Has conversations announced in the outbox as they are in Redis now, for a mirror that has missed them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.backends.announcing import announcement, run
from fsm_storage.backends.redis import RedisStorage
from fsm_storage.backends.wire import Wire
from fsm_storage.exceptions import InvalidOutboxRecord
from fsm_storage.outbox import DATA, STATE, decode_key, missed_name, stream_name

logger = logging.getLogger("fsm_storage")

AT_ONCE = 100
BACKLOG = 5000
"""Entries in the outbox past which what was missed has to wait: it would only grow."""
SOURCE = "mirror"


async def announce(wire: Wire, storage: RedisStorage, keys: Sequence[StorageKey]) -> int:
    """Announce both parts of each conversation; return how many parts there were to speak of."""
    builder, parts = storage.key_builder, 0
    stream, missed = stream_name(storage.alias), missed_name(storage.alias)
    for start in range(0, len(keys), AT_ONCE):
        some = [
            (key, builder.build(key, STATE), builder.build(key, DATA))
            for key in keys[start : start + AT_ONCE]
        ]
        parts += await run(wire, *announcement(stream, missed, some, SOURCE))
    return parts


async def announce_missed(wire: Wire, storage: RedisStorage) -> int:
    """Announce some of what was written while the outbox was full; return how many conversations."""
    missed = missed_name(storage.alias)
    length, names = await wire.ask([("XLEN", stream_name(storage.alias)), ("SRANDMEMBER", missed, AT_ONCE)])
    for reply in (length, names):
        if isinstance(reply, Exception):
            raise reply
    if not names or length > BACKLOG:
        return 0
    keys = []
    for name in names:
        try:
            keys.append(decode_key(name))
        except InvalidOutboxRecord as error:
            logger.error("%r in %r is no key, and is dropped: %s", name, missed, error)
            await wire.ask([("SREM", missed, name)])
    await announce(wire, storage, keys)
    return len(names)
