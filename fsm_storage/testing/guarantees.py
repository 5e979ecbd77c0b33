"""Whose record is whose, what is refused, and how long a record is there."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from fsm_storage.testing.promises import KEY, LIFETIME, Contract, Order, promise


class _Opaque:
    """Nothing that JSON, or anybody, could keep."""


class Keys(Contract):
    """No two keys share a record."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (StorageKey(1, 2, 3), StorageKey(1, 2, 4)),
            (StorageKey(1, 2, 3), StorageKey(1, 3, 2)),
            (StorageKey(1, -2, 3), StorageKey(1, 2, 3)),
            (StorageKey(1, 0, 0), StorageKey(1, 0, 1)),
            (StorageKey(1, 2**63 - 1, 1), StorageKey(1, -(2**63), 1)),
        ],
        ids=str,
    )
    async def test_chats_and_users_are_apart(
        self, storage: BaseStorage, one: StorageKey, other: StorageKey
    ) -> None:
        await self._check_apart(storage, one, other)

    @promise("keys")
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (StorageKey(1, 2, 3), StorageKey(2, 2, 3)),
            (StorageKey(1, 2, 3), StorageKey(1, 2, 3, thread_id=0)),
            (StorageKey(1, 2, 3, thread_id=1), StorageKey(1, 2, 3, thread_id=2)),
            (StorageKey(1, 2, 3), StorageKey(1, 2, 3, business_connection_id="")),
            (StorageKey(1, 2, 3), StorageKey(1, 2, 3, business_connection_id="b")),
            (StorageKey(1, 2, 3, business_connection_id="b"), StorageKey(1, 2, 3, destiny="b")),
            (StorageKey(1, 2, 3, thread_id=5), StorageKey(1, 2, 3, business_connection_id="5")),
            (StorageKey(1, 2, 3), StorageKey(1, 2, 3, destiny="")),
            (StorageKey(1, 2, 3), StorageKey(1, 2, 3, destiny="other")),
            (
                StorageKey(1, 2, 3, business_connection_id="a:b", destiny="c"),
                StorageKey(1, 2, 3, business_connection_id="a", destiny="b:c"),
            ),
            (StorageKey(1, 2, 3, destiny="%"), StorageKey(1, 2, 3, destiny="")),
            (StorageKey(1, 2, 3, destiny=":"), StorageKey(1, 2, 3, destiny="%3A")),
            (StorageKey(1, 2, 3, destiny="case"), StorageKey(1, 2, 3, destiny="CASE")),
            (StorageKey(1, 2, 3, destiny="resume"), StorageKey(1, 2, 3, destiny="résumé")),
            (StorageKey(1, 2, 3, destiny="\u00e9"), StorageKey(1, 2, 3, destiny="e\u0301")),
            (StorageKey(1, 2, 3, destiny="end"), StorageKey(1, 2, 3, destiny="end ")),
            (StorageKey(1, 2, 3, destiny="🛒"), StorageKey(1, 2, 3, destiny="🍵")),
        ],
        ids=str,
    )
    async def test_every_part_of_a_key_counts(
        self, storage: BaseStorage, one: StorageKey, other: StorageKey
    ) -> None:
        await self._check_apart(storage, one, other)

    async def _check_apart(self, storage: BaseStorage, one: StorageKey, other: StorageKey) -> None:
        await storage.set_state(one, "one")
        await storage.set_data(one, {"of": "one"})
        assert await storage.get_state(other) is None
        assert await storage.get_data(other) == {}
        await storage.set_state(other, "other")
        await storage.update_data(other, {"of": "other"})
        assert await storage.get_state(one) == "one"
        assert await storage.get_data(one) == {"of": "one"}
        await storage.set_state(one, None)
        await storage.set_data(one, {})
        assert await storage.get_state(other) == "other"
        assert await storage.get_data(other) == {"of": "other"}


class Refusals(Contract):
    """What cannot be kept exactly is refused, and the old value stays."""

    @promise("refusal")
    @pytest.mark.parametrize(
        "value",
        [
            math.nan, math.inf, -math.inf, {1, 2}, b"bytes", _Opaque(), 1j, {(1, 2): 3},
            {1: "int", "1": "text"}, "\ud800",
        ],
        ids=["nan", "inf", "-inf", "set", "bytes", "object", "complex", "tuple key", "twins", "surrogate"],
    )  # fmt: skip
    async def test_what_json_cannot_keep_is_refused(self, storage: BaseStorage, value: Any) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        for write in (storage.set_data, storage.update_data):
            with pytest.raises((TypeError, ValueError)):
                await write(KEY, {"deep": [{"value": value}]})
        assert await storage.get_data(KEY) == {"item": "tea"}

    @promise("refusal")
    async def test_data_that_contains_itself_is_refused(self, storage: BaseStorage) -> None:
        loop: dict[str, Any] = {"item": "tea"}
        loop["self"] = loop
        await storage.set_data(KEY, {"item": "tea"})
        for write in (storage.set_data, storage.update_data):
            with pytest.raises((TypeError, ValueError)):
                await write(KEY, loop)
        assert await storage.get_data(KEY) == {"item": "tea"}

    @promise("refusal")
    @pytest.mark.parametrize("data", [(), [], None, "", "text", 5], ids=repr)
    async def test_update_data_refuses_what_is_no_dict(self, storage: BaseStorage, data: Any) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        with pytest.raises(DataNotDictLikeError):
            await storage.update_data(KEY, data)
        assert await storage.get_data(KEY) == {"item": "tea"}

    @promise("refusal")
    @pytest.mark.parametrize("state", [Order, 5, b"state", True, ["a"], {"a": 1}], ids=repr)
    async def test_a_state_is_a_text_or_a_state(self, storage: BaseStorage, state: Any) -> None:
        await storage.set_state(KEY, "waiting")
        with pytest.raises(TypeError):
            await storage.set_state(KEY, state)
        assert await storage.get_state(KEY) == "waiting"

    @promise("refusal")
    async def test_a_refused_operation_fails_alone(self, storage: BaseStorage) -> None:
        keys = [StorageKey(bot_id=1, chat_id=n, user_id=n) for n in range(20)]
        replies = await asyncio.gather(
            *(storage.set_data(key, {"value": math.nan if key.chat_id == 7 else 1}) for key in keys),
            return_exceptions=True,
        )
        assert [n for n, reply in enumerate(replies) if reply is not None] == [7]
        assert isinstance(replies[7], ValueError)
        for key in keys:
            assert await storage.get_data(key) == ({} if key.chat_id == 7 else {"value": 1})


class Lifetimes(Contract):
    """What is there after closing, and until when."""

    # Closing

    async def test_closing_twice_is_no_error(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.close()
        await storage.close()

    @promise("closing")
    async def test_a_closed_storage_says_so(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.close()
        with pytest.raises(Exception, match="closed"):
            await storage.get_state(KEY)
        with pytest.raises(Exception, match="closed"):
            await storage.set_data(KEY, {"item": "tea"})

    @promise("durability")
    async def test_a_new_storage_finds_what_was_written(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.set_data(KEY, {"item": "tea", "count": 2**60})
        again = await self.reopen(storage)
        assert await again.get_state(KEY) == "waiting"
        assert await again.get_data(KEY) == {"item": "tea", "count": 2**60}

    # Expiry

    @promise("expiry")
    async def test_what_expired_is_gone(self, expiring_storage: BaseStorage) -> None:
        await expiring_storage.set_state(KEY, "waiting")
        await expiring_storage.set_data(KEY, {"item": "tea"})
        await self.advance(expiring_storage, LIFETIME * 0.9)
        assert await expiring_storage.get_state(KEY) == "waiting"
        assert await expiring_storage.get_data(KEY) == {"item": "tea"}
        await self.advance(expiring_storage, LIFETIME * 0.2)
        assert await expiring_storage.get_state(KEY) is None
        assert await expiring_storage.get_data(KEY) == {}
        assert await expiring_storage.get_value(KEY, "item", "nothing") == "nothing"

    @promise("expiry")
    async def test_each_write_starts_the_time_anew(self, expiring_storage: BaseStorage) -> None:
        await expiring_storage.set_state(KEY, "waiting")
        await expiring_storage.update_data(KEY, {"item": "tea"})
        for _ in range(3):
            await self.advance(expiring_storage, LIFETIME * 0.7)
            await expiring_storage.set_state(KEY, "waiting")
            await expiring_storage.update_data(KEY, {"count": 2})
        assert await expiring_storage.get_state(KEY) == "waiting"
        assert await expiring_storage.get_data(KEY) == {"item": "tea", "count": 2}

    @promise("expiry")
    async def test_a_write_of_one_part_leaves_the_others_time(self, expiring_storage: BaseStorage) -> None:
        await expiring_storage.set_state(KEY, "waiting")
        await expiring_storage.set_data(KEY, {"item": "tea"})
        await self.advance(expiring_storage, LIFETIME * 0.7)
        await expiring_storage.set_state(KEY, "later")
        await self.advance(expiring_storage, LIFETIME * 0.7)
        assert await expiring_storage.get_state(KEY) == "later"
        assert await expiring_storage.get_data(KEY) == {}

    @promise("expiry")
    async def test_update_data_starts_from_nothing_after_expiry(self, expiring_storage: BaseStorage) -> None:
        await expiring_storage.set_data(KEY, {"item": "tea"})
        await self.advance(expiring_storage, LIFETIME * 1.1)
        assert await expiring_storage.update_data(KEY, {"count": 2}) == {"count": 2}
        assert await expiring_storage.get_data(KEY) == {"count": 2}

    @promise("expiry")
    async def test_reading_does_not_start_the_time_anew(self, expiring_storage: BaseStorage) -> None:
        await expiring_storage.set_state(KEY, "waiting")
        await self.advance(expiring_storage, LIFETIME * 0.7)
        await expiring_storage.get_state(KEY)
        await self.advance(expiring_storage, LIFETIME * 0.7)
        assert await expiring_storage.get_state(KEY) is None
