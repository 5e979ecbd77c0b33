"""Conversation state of aiogram 3 bots, kept in Django.

The public names. They can be imported before `django.setup()`, and are loaded when first used, so
that a web process which never asks for them does not load aiogram.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, KeyBuilder, StorageKey
    from aiogram.fsm.storage.memory import MemoryStorage

    from fsm_storage.backends.context import with_ttl
    from fsm_storage.backends.django import DjangoStorage
    from fsm_storage.backends.redis import RedisStorage
    from fsm_storage.conf import storages
    from fsm_storage.exceptions import LeaseLost, LeaseTimeout
    from fsm_storage.isolation import DjangoEventIsolation
    from fsm_storage.keys import RecordKeyBuilder
    from fsm_storage.lifecycle.expiry import Expired, Expiry
    from fsm_storage.patches import KEEP

__version__ = "0.1.0"

__all__ = [
    "KEEP",
    "BaseStorage",
    "DefaultKeyBuilder",
    "DjangoEventIsolation",
    "DjangoStorage",
    "Expired",
    "Expiry",
    "KeyBuilder",
    "LeaseLost",
    "LeaseTimeout",
    "MemoryStorage",
    "RecordKeyBuilder",
    "RedisStorage",
    "StorageKey",
    "storages",
    "with_ttl",
]

_HOMES = {
    "KEEP": "fsm_storage.patches",
    "BaseStorage": "aiogram.fsm.storage.base",
    "DefaultKeyBuilder": "aiogram.fsm.storage.base",
    "DjangoEventIsolation": "fsm_storage.isolation",
    "DjangoStorage": "fsm_storage.backends.django",
    "Expired": "fsm_storage.lifecycle.expiry",
    "Expiry": "fsm_storage.lifecycle.expiry",
    "KeyBuilder": "aiogram.fsm.storage.base",
    "LeaseLost": "fsm_storage.exceptions",
    "LeaseTimeout": "fsm_storage.exceptions",
    "MemoryStorage": "aiogram.fsm.storage.memory",
    "RecordKeyBuilder": "fsm_storage.keys",
    "RedisStorage": "fsm_storage.backends.redis",
    "StorageKey": "aiogram.fsm.storage.base",
    "storages": "fsm_storage.conf",
    "with_ttl": "fsm_storage.backends.context",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
