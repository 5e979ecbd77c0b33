"""What setting, reading and merging do, one at a time, side by side and when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from fsm_storage.testing.promises import KEY, Cart, Contract, Order, promise


class Operations(Contract):
    """What aiogram's own storages do."""

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
