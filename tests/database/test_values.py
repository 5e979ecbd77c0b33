"""Extreme values, keys and states; and data that somebody else has broken."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from django.db import connections
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_storage import DjangoStorage
from fsm_storage.codec import MAX_LENGTH
from fsm_storage.exceptions import CorruptData, InvalidData, InvalidKey, InvalidKeyType, InvalidState
from tests.conftest import MARIADB
from tests.rows import data_as_text, execute, in_thread, record, records

Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


# Exactness

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=12,
)
DATA = st.dictionaries(TEXTS, VALUES, max_size=6)


def same(one: Any, other: Any) -> bool:
    """Compare to the last bit; but a whole float may come back as the int of the same value, and -0.0 as 0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    return one == other


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=DATA, second=DATA)
def test_any_json_comes_back_exactly(storage: DjangoStorage, first: dict, second: dict) -> None:
    key = chat(1)

    async def main() -> None:
        await storage.set_data(key, first)
        assert same(await storage.get_data(key), first)
        assert same(await storage.update_data(key, second), {**first, **second})
        assert same(await storage.get_data(key), {**first, **second})
        # And in a batch.
        await asyncio.gather(*(storage.set_data(chat(n), second) for n in range(2, 5)))
        merged = await asyncio.gather(*(storage.update_data(chat(n), first) for n in range(2, 5)))
        assert all(same(data, {**second, **first}) for data in merged)

    asyncio.run(main())


async def test_floats_of_every_size_come_back_to_the_last_bit(storage: DjangoStorage) -> None:
    floats = [1.1 * 10.0**exponent for exponent in range(-307, 308, 7)]
    floats += [
        struct.unpack("<d", struct.pack("<Q", bits * 0x0100_0193_0000_0001 % 2**63))[0]
        for bits in range(1, 200)
    ]
    floats = [value for value in floats if value == value and abs(value) != float("inf")]
    await storage.set_data(chat(1), {"floats": floats})
    read = (await storage.get_data(chat(1)))["floats"]
    assert [value.hex() for value in map(float, read)] == [value.hex() for value in floats]
    merged = (await storage.update_data(chat(1), {"more": floats}))["more"]
    assert [value.hex() for value in map(float, merged)] == [value.hex() for value in floats]


@pytest.mark.parametrize("digits", [19, 20, 40, 4300])
async def test_integers_of_any_length_come_back_exactly(storage: DjangoStorage, digits: int) -> None:
    for number in (10**digits - 1, -(10**digits - 7), 10 ** (digits - 1)):
        await storage.set_data(chat(1), {"n": number, "list": [number]})
        assert await storage.get_data(chat(1)) == {"n": number, "list": [number]}
        assert await storage.update_data(chat(1), {"m": number}) == {
            "n": number,
            "list": [number],
            "m": number,
        }


async def test_nesting_of_500_levels(storage: DjangoStorage) -> None:
    data: dict[str, Any] = {}
    for _ in range(499):
        data = {"d": data}
    await storage.set_data(chat(1), data)
    assert await storage.get_data(chat(1)) == data
    assert await storage.update_data(chat(1), {"other": 1}) == {**data, "other": 1}
    for levels in (5_000, 100_000):
        deep: Any = []
        for _ in range(levels):
            deep = [deep]
        with pytest.raises(ValueError, match="deeper than 500"):
            await storage.set_data(chat(1), {"deep": deep})
        # Python takes the interpreter's stack apart, one level at a time.
        while deep:
            deep = deep.pop()
    assert await storage.get_data(chat(1)) == {**data, "other": 1}


@pytest.mark.parametrize("history", ["off", "states", "full"])
async def test_merges_grow_no_longer_than_what_may_be_written(make_storage: Make, history: str) -> None:
    """Alone or in a batch; the rest of the batch is done, and what is there can be written back as it is."""
    storage = make_storage(history=history)
    piece = "x" * (MAX_LENGTH * 4 // 9)
    for number in range(2):
        await storage.update_data(chat(1), {f"piece {number}": piece})
    before = await storage.get_data(chat(1))
    too_long = rf"data of '1:1:1' .* takes 18\d{{5}} characters of JSON, over the limit of {MAX_LENGTH}"
    with pytest.raises(InvalidData, match=too_long):
        await storage.update_data(chat(1), {"both": piece * 2})
    *done, refused = await asyncio.gather(
        *(storage.update_data(chat(number), {"small": 1}) for number in range(2, 6)),
        storage.update_data(chat(1), {"both": piece * 2}),
        return_exceptions=True,
    )
    assert done == [{"small": 1}] * 4
    assert isinstance(refused, InvalidData)
    assert await storage.get_data(chat(1)) == before
    await storage.set_data(chat(1), before)
    await storage.update_data(chat(1), {"piece 0": "short", "piece 1": "short"})
    assert len(await storage.update_data(chat(1), {"both": piece * 2})) == 3


async def test_keys_that_are_no_strings_become_what_json_makes_of_them(storage: DjangoStorage) -> None:
    data = {"map": {5: "a", True: "b", None: "c", 2.5: "d"}}
    await storage.set_data(chat(1), data)
    assert await storage.get_data(chat(1)) == json.loads(json.dumps(data))


class Types(json.JSONEncoder):
    def default(self, value: Any) -> Any:
        return {"$": type(value).__name__, "v": str(value)}


def revive(value: dict[str, Any]) -> Any:
    makers: dict[str, Callable[[str], Any]] = {
        "datetime": datetime.fromisoformat, "Decimal": Decimal, "UUID": UUID,
    }  # fmt: skip
    return makers[value["$"]](value["v"]) if "$" in value else value


def dump_types(data: Any) -> str:
    return json.dumps(data, cls=Types)


def load_types(text: str) -> Any:
    return json.loads(text, object_hook=revive)


async def test_types_of_ones_own_go_through_ones_own_functions(make_storage: Make) -> None:
    data = {"at": datetime(2026, 5, 1, 12, 30), "price": Decimal("0.10"), "ids": [UUID(int=5)]}
    with pytest.raises(TypeError, match="at"):
        await make_storage().set_data(chat(1), data)
    for functions in (
        {"json_dumps": dump_types, "json_loads": load_types},
        {"json_dumps": f"{__name__}.dump_types", "json_loads": f"{__name__}.load_types"},
    ):
        storage = make_storage(**functions)
        await storage.set_data(chat(1), data)
        assert await storage.get_data(chat(1)) == data
        assert await storage.update_data(chat(1), {"more": Decimal(5)}) == {**data, "more": Decimal(5)}


async def test_sql_in_a_text_is_text(storage: DjangoStorage, database: str) -> None:
    evil = "'; DROP TABLE fsm_storage_record; -- %s %(key)s {} \\ \" $1 ?"
    key = StorageKey(1, 2, 3, business_connection_id=evil, destiny=evil)
    await storage.set_state(key, evil)
    await storage.update_data(key, {evil: evil})
    assert await storage.get_state(key) == evil
    assert await storage.get_data(key) == {evil: evil}
    assert (await in_thread(record, database)).destiny == evil


# Keys


@pytest.mark.parametrize("part", ["bot_id", "chat_id", "user_id", "thread_id"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (2**63, InvalidKey),
        (-(2**63) - 1, InvalidKey),
        ("5", InvalidKeyType),
        (5.0, InvalidKeyType),
        (True, InvalidKeyType),
    ],
)
async def test_ids_that_do_not_fit_are_refused(
    storage: DjangoStorage, database: str, part: str, value: Any, error: type[Exception]
) -> None:
    key = StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value})
    for operation in (
        storage.set_state(key, "a"),
        storage.get_state(key),
        storage.update_data(key, {"a": 1}),
    ):
        with pytest.raises(error, match=part):
            await operation
    assert await in_thread(records, database) == []


@pytest.mark.parametrize("part", ["bot_id", "chat_id", "user_id"])
async def test_an_id_of_none_is_refused(storage: DjangoStorage, part: str) -> None:
    key = StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: None})
    with pytest.raises(TypeError, match=part):
        await storage.get_state(key)


@pytest.mark.parametrize("part", ["business_connection_id", "destiny"])
@pytest.mark.parametrize("value", ["a\0b", "a\ud800", "x" * 513])
async def test_texts_that_do_not_fit_are_refused(storage: DjangoStorage, part: str, value: str) -> None:
    key = StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value})
    with pytest.raises(ValueError, match="key"):
        await storage.set_state(key, "a")


async def test_negative_ids_and_zero_keep_their_sign(storage: DjangoStorage, database: str) -> None:
    keys = [StorageKey(1, chat_id, user_id) for chat_id in (-5, 0, 5) for user_id in (-(2**63), 0, 2**63 - 1)]
    await asyncio.gather(*(storage.set_state(key, str(key)) for key in keys))
    for key in keys:
        assert await storage.get_state(key) == str(key)
    assert {row.storage_key for row in await in_thread(records, database)} == set(keys)


async def test_texts_that_look_alike_are_different_keys(storage: DjangoStorage, database: str) -> None:
    alike = [
        "e",
        "E",
        "\u00e9",
        "e\u0301",
        "e ",
        " e",
        "e\t",
        "ｅ",
        "е",
        "🛒",
        "🍵",
        "",
        "default ",
        "ß",
        "ss",
        "ı",
        "i",
        "I",
        "İ",
    ]
    keys = [StorageKey(1, 2, 3, destiny=text) for text in alike]
    keys += [StorageKey(1, 2, 3, business_connection_id=text) for text in alike]
    await asyncio.gather(*(storage.set_state(key, f"s{n}") for n, key in enumerate(keys)))
    assert [await storage.get_state(key) for key in keys] == [f"s{n}" for n in range(len(keys))]
    assert {row.storage_key for row in await in_thread(records, database)} == set(keys)


async def test_two_bots_share_nothing(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100)
    one, other = StorageKey(1, 5, 5), StorageKey(2, 5, 5)
    await storage.set_state(one, "one")
    await storage.set_data(one, {"of": 1})
    assert (await storage.get_state(other), await storage.get_data(other)) == (None, {})
    await storage.set_state(other, "other")
    await storage.set_state(one, None)
    await storage.set_data(one, {})
    await in_thread(storage.sweep)
    assert await storage.get_state(other) == "other"


async def test_two_aliases_share_nothing(make_storage: Make, database: str, key: StorageKey) -> None:
    one, other = make_storage(alias="one"), make_storage(alias="other")
    await one.set_state(key, "one")
    await one.set_data(key, {"of": 1})
    assert (await other.get_state(key), await other.get_data(key)) == (None, {})
    await other.set_state(key, "other")
    assert await one.get_state(key) == "one"
    assert sorted(row.alias for row in await in_thread(records, database)) == ["one", "other"]


async def test_any_key_builder_of_aiograms_can_be_used(
    make_storage: Make, database: str, key: StorageKey
) -> None:
    storage = make_storage(key_builder=DefaultKeyBuilder(prefix="bot", with_bot_id=True, with_destiny=True))
    await storage.set_state(key, "a")
    row = await in_thread(record, database)
    assert row.key.startswith("bot:42:")
    assert row.storage_key == key
    assert await storage.get_state(key) == "a"


# States


@pytest.mark.parametrize(
    "state", ["x" * 256, "x" * 1000, "a\0b", "a\ud800"], ids=["256", "1000", "nul", "surrogate"]
)
async def test_a_state_that_does_not_fit_is_refused(
    storage: DjangoStorage, key: StorageKey, state: str
) -> None:
    await storage.set_state(key, "old")
    with pytest.raises(InvalidState, match=r"255|NUL|surrogate"):
        await storage.set_state(key, state)
    assert await storage.get_state(key) == "old"


# Broken data

BROKEN = {
    "list": "[1, 2]",
    "null": "null",
    "text": '"text"',
    "number": "5",
}
DEEP = '{"a": ' + "[" * 3000 + "]" * 3000 + "}"
NO_JSON = {
    "no JSON": "{'a': 1}",
    "cut": '{"a": ',
    "empty": "",
    "byte order mark": '\ufeff{"a": 1}',
    "pickle": "\x80\x04}q\x00.",
    "NaN": '{"a": NaN}',
}


def break_data(database: str, text: str) -> None:
    with connections[database].cursor() as cursor:
        if database == "default":
            cursor.execute("PRAGMA ignore_check_constraints = 1")
        cursor.execute("UPDATE fsm_storage_record SET data = %s WHERE chat_id = 3", [text])
        if database == "default":
            cursor.execute("PRAGMA ignore_check_constraints = 0")


@pytest.mark.parametrize("history", ["states", "full"])
@pytest.mark.parametrize("what", [*BROKEN, *NO_JSON])
async def test_broken_data_is_a_clear_error_and_set_data_repairs_it(
    make_storage: Make, database: str, what: str, history: str
) -> None:
    storage = make_storage(history=history)
    # jsonb lets no such text in
    in_vain = database == "postgres" and what in NO_JSON
    text = BROKEN["list"] if in_vain else {**BROKEN, **NO_JSON}[what]
    for n in range(6):
        await storage.set_state(chat(n), f"s{n}")
        await storage.set_data(chat(n), {"n": n})
    await in_thread(break_data, database, text)
    sql = f"SELECT {data_as_text(database)} FROM fsm_storage_record WHERE chat_id = 3"
    raw = await in_thread(execute, database, sql)

    for call in (
        lambda: storage.get_data(chat(3)),
        lambda: storage.get_value(chat(3), "n"),
        lambda: storage.update_data(chat(3), {"m": 1}),
    ):
        with pytest.raises(CorruptData, match="1:3:3") as error:
            await call()
        assert error.value.key == "1:3:3"
    # The update that raised wrote nothing.
    assert await in_thread(execute, database, sql) == raw
    # Nobody else is hurt, alone or in one batch with it.
    outcomes = await asyncio.gather(
        *(storage.update_data(chat(n), {"m": n}) for n in range(6)), return_exceptions=True
    )
    assert [type(outcome) is CorruptData for outcome in outcomes] == [n == 3 for n in range(6)]
    outcomes = await asyncio.gather(*(storage.get_data(chat(n)) for n in range(6)), return_exceptions=True)
    assert [n for n, data in enumerate(outcomes) if data == {"n": n, "m": n}] == [0, 1, 2, 4, 5]
    # The state of the record can be read and set.
    assert await storage.get_state(chat(3)) == "s3"
    await storage.set_state(chat(3), "s4")
    await storage.set_data(chat(3), {"whole": True})
    assert await storage.get_data(chat(3)) == {"whole": True}
    assert await storage.update_data(chat(3), {"again": 1}) == {"whole": True, "again": 1}


@pytest.mark.parametrize("history", ["states", "full"])
async def test_deep_data_is_read_whole_or_is_a_clear_error(
    make_storage: Make, database: str, history: str
) -> None:
    """How deep Python can read depends on its version; 3.11 cannot read this."""
    storage = make_storage(history=history)
    await storage.set_state(chat(3), "s3")
    await storage.set_data(chat(3), {"n": 3})
    await in_thread(break_data, database, DEEP)
    sql = f"SELECT {data_as_text(database)} FROM fsm_storage_record WHERE chat_id = 3"
    raw = await in_thread(execute, database, sql)
    try:
        assert "a" in await storage.get_data(chat(3))
    except CorruptData as refused:
        named = refused.key
    else:
        named = "1:3:3"
    assert named == "1:3:3"
    try:
        assert (await storage.update_data(chat(3), {"m": 1}))["m"] == 1
    except CorruptData:
        assert await in_thread(execute, database, sql) == raw
    else:
        assert await in_thread(execute, database, sql) != raw
    await storage.set_state(chat(3), "s4")
    await storage.set_data(chat(3), {"whole": True})
    assert await storage.get_data(chat(3)) == {"whole": True}
    assert await storage.update_data(chat(3), {"again": 1}) == {"whole": True, "again": 1}


# What a server's settings limit


@pytest.mark.parametrize("database", [MARIADB], indirect=True)
@pytest.mark.parametrize("history", ["states", "full"])
async def test_data_that_no_packet_holds_is_refused_by_name_and_alone(
    make_storage: Make, database: str, history: str
) -> None:
    """A million characters of four bytes each are as much as the server takes, and then there is the rest."""
    [(usual,)] = await in_thread(execute, database, "SELECT @@GLOBAL.max_allowed_packet")
    await in_thread(execute, database, f"SET GLOBAL max_allowed_packet = {4 * 1024 * 1024}")
    try:
        storage = make_storage(history=history, timeout=30)
        await storage.set_data(chat(0), {"old": 0})
        large = {"text": "\U0001f600" * 1_048_000}
        refused, *kept = await asyncio.gather(
            storage.set_data(chat(0), large),
            *(storage.set_data(chat(n), {"text": "x" * 400_000, "n": n}) for n in range(1, 15)),
            return_exceptions=True,
        )
    finally:
        await in_thread(execute, database, f"SET GLOBAL max_allowed_packet = {usual}")
    assert isinstance(refused, InvalidData)
    assert "max_allowed_packet" in str(refused)
    assert kept == [None] * 14  # together more than a packet
    assert await storage.get_data(chat(0)) == {"old": 0}
    for n in (1, 14):
        assert (await storage.get_data(chat(n)))["n"] == n
