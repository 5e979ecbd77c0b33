"""Which promises there are, how a test is marked as one of them, and what the tests need of a storage."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, Final, TypedDict, TypeVar

import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage, StorageKey

T = TypeVar("T")

PROMISES: Final = {
    "closing": "a closed storage refuses with an error that says so",
    "copies": "what is stored does not change when the caller changes what it wrote or read",
    "durability": "what was written is there for a new storage; needs `reopen`",
    "expiry": "state and data have a time to live; needs `expiring_storage` and `advance`",
    "keys": "every part of a key counts: no two keys share a record",
    "refusal": "what cannot be kept exactly is refused, and the old value stays",
}


def promise(name: str) -> Callable[[T], T]:
    """Mark a test as one of a promise of `PROMISES`."""

    def mark(test: T) -> T:
        test.promise = name  # type: ignore[attr-defined]
        return test

    return mark


class Order(StatesGroup):
    """States for the tests."""

    cart = State()
    payment = State()


class Cart(TypedDict, total=False):
    """Data that a type checker knows, and a dict when the program runs."""

    item: str
    count: int


KEY = StorageKey(bot_id=42, chat_id=-1001234567890, user_id=123)
LIFETIME = 100.0
"""Seconds that state and data live in `expiring_storage`."""


class Contract:
    """A part of the contract, and what it needs of a storage. `without` names promises that are not given."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    def __init_subclass__(cls, without: Collection[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unknown = sorted(set(without) - set(PROMISES))
        if unknown:
            raise TypeError(f"no such promise: {', '.join(unknown)}; there are {', '.join(PROMISES)}")
        for name in dir(cls):
            if getattr(getattr(cls, name), "promise", None) in without:
                setattr(cls, name, None)  # pytest then sees no test, where a skip would look like a gap

    @pytest.fixture
    def storage(self) -> BaseStorage:
        """Return an empty storage. Yours to give; close it when the test is over."""
        raise NotImplementedError(f"{type(self).__name__} must have a fixture named 'storage'")

    @pytest.fixture
    def expiring_storage(self) -> BaseStorage:
        """Return an empty storage whose states and data live for `LIFETIME` seconds."""
        raise NotImplementedError(f"{type(self).__name__} must have a fixture named 'expiring_storage'")

    async def advance(self, storage: BaseStorage, seconds: float) -> None:
        """Let so much time pass for `storage`; `asyncio.sleep` would do."""
        raise NotImplementedError(f"{type(self).__name__} must have a method named 'advance'")

    async def reopen(self, storage: BaseStorage) -> BaseStorage:
        """Close `storage` and return a new one on the same data."""
        raise NotImplementedError(f"{type(self).__name__} must have a method named 'reopen'")
