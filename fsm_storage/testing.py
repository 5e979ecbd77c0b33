"""The promises of a storage as a pytest class, for whoever writes a storage of their own.

    class TestMyStorage(StorageContract, without={"expiry"}):
        @pytest.fixture
        async def storage(self):
            storage = MyStorage()
            yield storage
            await storage.close()

Every promise is aiogram's own (what `MemoryStorage` and `RedisStorage` do) unless it is named in
`PROMISES`; those named there can be left out. Needs pytest and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Final, TypedDict, TypeVar

import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.context import FSMContext
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


class _Opaque:
    """Nothing that JSON, or anybody, could keep."""


KEY = StorageKey(bot_id=42, chat_id=-1001234567890, user_id=123)
LIFETIME = 100.0
"""Seconds that state and data live in `expiring_storage`."""


class StorageContract:
    """What a storage promises. Derive from it and give the fixture `storage`: an empty storage.

    `without` names the promises that the storage does not give.
    """

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

    # States

    async def test_an_unknown_key_has_no_state(self, storage: BaseStorage) -> None:
        assert await storage.get_state(KEY) is None

    async def test_a_state_is_read_as_it_was_set(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        assert await storage.get_state(KEY) == "waiting"

    async def test_a_state_replaces_the_one_before(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "first")
        await storage.set_state(KEY, "second")
        assert await storage.get_state(KEY) == "second"

    async def test_no_state_clears_the_state(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.set_state(KEY, None)
        assert await storage.get_state(KEY) is None

    async def test_set_state_without_a_state_clears_it(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.set_state(KEY)
        assert await storage.get_state(KEY) is None

    async def test_clearing_where_there_is_nothing_is_no_error(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, None)
        await storage.set_data(KEY, {})
        assert await storage.get_state(KEY) is None
        assert await storage.get_data(KEY) == {}

    async def test_a_state_object_is_kept_by_its_name(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, Order.cart)
        assert await storage.get_state(KEY) == "Order:cart"

    async def test_a_state_object_without_a_name_clears_the_state(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.set_state(KEY, State())
        assert await storage.get_state(KEY) is None

    @pytest.mark.parametrize(
        "state",
        ["", " ", "a b", "Order:cart", "*", "ожидание", "🛒", "quote ' \" \\ % _ {} $1 %s", "s" * 255],
    )
    async def test_any_text_is_a_state(self, storage: BaseStorage, state: str) -> None:
        await storage.set_state(KEY, state)
        assert await storage.get_state(KEY) == state

    # Data

    async def test_an_unknown_key_has_empty_data(self, storage: BaseStorage) -> None:
        assert await storage.get_data(KEY) == {}
        assert await storage.get_value(KEY, "item") is None
        assert await storage.get_value(KEY, "item", "nothing") == "nothing"

    async def test_data_is_read_as_it_was_set(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        assert await storage.get_data(KEY) == {"item": "tea"}
        assert await storage.get_value(KEY, "item") == "tea"
        assert await storage.get_value(KEY, "item", "nothing") == "tea"
        assert await storage.get_value(KEY, "count") is None

    async def test_set_data_replaces_everything(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"item": "tea", "count": 2})
        await storage.set_data(KEY, {"item": "rice"})
        assert await storage.get_data(KEY) == {"item": "rice"}

    async def test_an_empty_dict_clears_the_data(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        await storage.set_data(KEY, {})
        assert await storage.get_data(KEY) == {}
        assert await storage.get_value(KEY, "item") is None
        assert await storage.get_value(KEY, "item", "nothing") == "nothing"

    async def test_a_typed_dict_is_a_dict(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, Cart(item="tea", count=2))
        assert await storage.get_data(KEY) == {"item": "tea", "count": 2}

    @pytest.mark.parametrize("data", [(), [], None, "", "text", 5, [("item", "tea")]], ids=repr)
    async def test_set_data_refuses_what_is_no_dict(self, storage: BaseStorage, data: Any) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        with pytest.raises(DataNotDictLikeError):
            await storage.set_data(KEY, data)
        assert await storage.get_data(KEY) == {"item": "tea"}

    async def test_a_default_stands_in_for_what_is_absent_only(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"zero": 0, "no": False, "empty": "", "list": []})
        for name, value in (("zero", 0), ("no", False), ("empty", ""), ("list", [])):
            assert await storage.get_value(KEY, name, "nothing") == value

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            0,
            -1,
            2**53 + 1,
            2**63,
            -(2**64),
            10**40,
            0.1,
            -0.0,
            1.5e-300,
            1.7976931348623157e308,
            5e-324,
            1e23,
            123456789.123456789,
            "",
            "текст 🛒 é é \u2028 \x7f \\ \" ' </script>",
            [],
            {},
            [[], {}, [None]],
            {"": {"a": [1, {"b": [2.5, "c"]}]}},
            {"with space": 1, "quote'\"": 2, "доставка": 3, "$.a[0]": 4},
        ],
        ids=ascii,
    )
    async def test_a_value_is_read_as_it_was_written(self, storage: BaseStorage, value: Any) -> None:
        await storage.set_data(KEY, {"value": value})
        data = await storage.get_data(KEY)
        assert data == {"value": value}
        if isinstance(value, bool) or value is None:
            assert data["value"] is value
        assert await storage.get_value(KEY, "value", "nothing") == value
        assert await storage.update_data(KEY, {"other": value}) == {"value": value, "other": value}
        assert await storage.get_data(KEY) == {"value": value, "other": value}

    # Merging

    async def test_update_data_lays_keys_over_what_is_there(self, storage: BaseStorage) -> None:
        assert await storage.update_data(KEY, {"item": "tea"}) == {"item": "tea"}
        assert await storage.update_data(KEY, {"count": 2}) == {"item": "tea", "count": 2}
        assert await storage.get_data(KEY) == {"item": "tea", "count": 2}
        assert await storage.update_data(KEY, {"item": "rice"}) == {"item": "rice", "count": 2}
        assert await storage.get_data(KEY) == {"item": "rice", "count": 2}

    async def test_update_data_with_nothing_changes_nothing(self, storage: BaseStorage) -> None:
        assert await storage.update_data(KEY, {}) == {}
        await storage.set_data(KEY, {"item": "tea"})
        assert await storage.update_data(KEY, {}) == {"item": "tea"}
        assert await storage.get_data(KEY) == {"item": "tea"}

    async def test_update_data_is_shallow(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"cart": {"tea": 1, "rice": 2}, "list": [1, 2, 3]})
        merged = await storage.update_data(KEY, {"cart": {"tea": 5}, "list": [4]})
        assert merged == {"cart": {"tea": 5}, "list": [4]}

    async def test_update_data_keeps_a_none(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        assert await storage.update_data(KEY, {"item": None}) == {"item": None}
        assert await storage.get_data(KEY) == {"item": None}

    async def test_concurrent_updates_of_one_key_all_count(self, storage: BaseStorage) -> None:
        await asyncio.gather(*(storage.update_data(KEY, {f"field{n}": n}) for n in range(100)))
        assert await storage.get_data(KEY) == {f"field{n}": n for n in range(100)}

    async def test_the_reply_to_an_update_holds_it(self, storage: BaseStorage) -> None:
        replies = await asyncio.gather(*(storage.update_data(KEY, {f"f{n}": n}) for n in range(30)))
        assert all(reply[f"f{n}"] == n for n, reply in enumerate(replies))

    async def test_many_keys_at_once_stay_apart(self, storage: BaseStorage) -> None:
        keys = [StorageKey(bot_id=42, chat_id=n, user_id=n) for n in range(200)]

        async def talk(key: StorageKey) -> None:
            await storage.set_state(key, f"state{key.chat_id}")
            await storage.update_data(key, {"chat": key.chat_id})
            assert await storage.get_state(key) == f"state{key.chat_id}"
            assert await storage.get_data(key) == {"chat": key.chat_id}

        await asyncio.gather(*map(talk, keys))

    async def test_a_read_sees_every_write_that_was_finished(self, storage: BaseStorage) -> None:
        async def others() -> None:
            for n in range(50):
                await storage.set_state(StorageKey(bot_id=1, chat_id=n, user_id=n), "noise")

        noise = asyncio.create_task(others())
        for n in range(50):
            await storage.set_state(KEY, f"s{n}")
            assert await storage.get_state(KEY) == f"s{n}"
            await storage.set_data(KEY, {"n": n})
            assert await storage.get_data(KEY) == {"n": n}
        await noise

    async def test_a_cancelled_write_happens_whole_or_not_at_all(self, storage: BaseStorage) -> None:
        old, new = {"a": 1, "b": 1}, {"a": 2, "b": 2}
        for turns in range(8):
            await storage.set_data(KEY, old)
            task = asyncio.ensure_future(storage.set_data(KEY, new))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert await storage.get_data(KEY) in (old, new)

    # State and data

    async def test_state_and_data_do_not_touch_one_another(self, storage: BaseStorage) -> None:
        await storage.set_state(KEY, "waiting")
        await storage.set_data(KEY, {"item": "tea"})
        await storage.set_state(KEY, None)
        assert await storage.get_data(KEY) == {"item": "tea"}
        await storage.set_state(KEY, "again")
        await storage.set_data(KEY, {})
        assert await storage.get_state(KEY) == "again"

    async def test_a_context_talks_to_the_storage(self, storage: BaseStorage) -> None:
        context = FSMContext(storage=storage, key=KEY)
        await context.set_state(Order.payment)
        await context.set_data({"item": "tea"})
        assert await context.update_data(count=2) == {"item": "tea", "count": 2}
        assert await context.get_state() == Order.payment.state
        assert await context.get_value("count") == 2
        await context.clear()
        assert await context.get_state() is None
        assert await context.get_data() == {}

    # Keys

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

    # Copies

    async def test_the_reply_is_the_callers_to_change(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"item": "tea"})
        (await storage.get_data(KEY))["item"] = "changed"
        (await storage.update_data(KEY, {"count": 1}))["item"] = "changed"
        assert await storage.get_data(KEY) == {"item": "tea", "count": 1}

    @promise("copies")
    async def test_a_change_after_the_write_changes_nothing(self, storage: BaseStorage) -> None:
        data: dict[str, Any] = {"cart": {"tea": 1}, "list": [1]}
        for write in (storage.set_data, storage.update_data):
            await write(KEY, data)
            data["cart"]["tea"] = 99
            data["list"].append(99)
            assert await storage.get_data(KEY) == {"cart": {"tea": 1}, "list": [1]}
            data = {"cart": {"tea": 1}, "list": [1]}

    @promise("copies")
    async def test_a_change_to_what_was_read_changes_nothing(self, storage: BaseStorage) -> None:
        await storage.set_data(KEY, {"cart": {"tea": 1}})
        (await storage.get_data(KEY))["cart"]["tea"] = 99
        (await storage.update_data(KEY, {"count": 1}))["cart"]["tea"] = 99
        value = await storage.get_value(KEY, "cart")
        assert isinstance(value, dict)
        value["tea"] = 99
        assert await storage.get_data(KEY) == {"cart": {"tea": 1}, "count": 1}

    # Refusal

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
