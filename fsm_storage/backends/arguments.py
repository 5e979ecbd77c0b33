"""What the arguments of operations mean: states, times to live, actors. Refuses what is none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.dialects import Spared
from fsm_storage.exceptions import InvalidTtl, InvalidTtlType
from fsm_storage.keys import MAX_ACTOR_LENGTH
from fsm_storage.patches import KEEP, Keep, Ttl, ttl_seconds

TtlOption = timedelta | float | None


class Handlers(Protocol):
    """What a sweep asks of expiry handlers."""

    def spared(self) -> Spared: ...


class Mirroring(Protocol):
    """A thread that mirrors a storage."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...


class Identified(Protocol):
    """What `edit` needs of a record: its key, as text and taken apart."""

    key: str
    version: int

    @property
    def storage_key(self) -> StorageKey: ...


def own_ttl(ttl: TtlOption, key: str) -> Ttl:
    """Return the rule for a write that brings its own `ttl`. Raises `InvalidTtl` or `InvalidTtlType`."""
    try:
        return Ttl(ttl_seconds(ttl))
    except TypeError as error:
        raise InvalidTtlType(str(error), key) from None
    except ValueError as error:
        raise InvalidTtl(str(error), key) from None


def edit_ttl(ttl: TtlOption | Keep, default: Ttl) -> Ttl:
    if ttl is KEEP:
        return Ttl(default.seconds, keep=True)
    return Ttl(ttl_seconds(ttl), renew=True)


def actor_name(by: Any) -> str:
    if by is None:
        return ""
    name = by.get_username() if hasattr(by, "get_username") else str(by)
    return str(name)[:MAX_ACTOR_LENGTH]
