"""Beside aiogram's own class: the same keys and the same bytes, both ways, also while both run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import redis
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage as AiogramStorage

from fsm_storage import RedisStorage
from fsm_storage.exceptions import CorruptData
from tests.redis.conftest import Make

FLAGS = ("with_bot_id", "with_business_connection_id", "with_destiny")
BUILDERS = [
    {**dict(zip(FLAGS, flags, strict=True)), **extra}
    for flags in itertools.product([False, True], repeat=3)
    for extra in ({}, {"prefix": "bot", "separator": "|"})
]
KEYS = [
    StorageKey(42, -100200300, 7),
    StorageKey(42, 0, 0, thread_id=5),
    StorageKey(43, 5, 5, business_connection_id="a:b"),
    StorageKey(43, 5, 5, thread_id=9, business_connection_id="ü", destiny="other"),
]
VALUES: list[dict[str, Any]] = [
    {"b": 1, "a": 2, "nested": {"z": [1, 2.5, None, True, {"é": "🙂"}]}},
    {"text": "Привет", "emoji": "🙂", "quote": '"\\/\n\t', "empty": "", "big": 2**70, "float": 1e-7},
    {"one": 1},
    {},
]


class Form(StatesGroup):
    name = State()


@pytest.fixture
async def theirs(redis_url: str) -> AsyncIterator[AiogramStorage]:
    storage = AiogramStorage.from_url(redis_url)
    yield storage
    await storage.close()


def everything(raw: redis.Redis) -> dict[bytes, bytes]:
    return {name: raw.get(name) for name in raw.keys("*") if not name.startswith(b"fsm_storage:")}


@pytest.mark.parametrize("mirror", [True, False], ids=["mirrored", "alone"])
@pytest.mark.parametrize("flags", BUILDERS, ids=lambda flags: "-".join(f"{n}={v}" for n, v in flags.items()))
async def test_either_reads_what_the_other_wrote(
    make: Make, redis_url: str, raw: redis.Redis, flags: dict[str, Any], mirror: bool
) -> None:
    builder = DefaultKeyBuilder(**flags)
    theirs = AiogramStorage.from_url(redis_url, key_builder=builder)
    ours = make(key_builder=builder, mirror=mirror)
    for key, value in itertools.product(KEYS, VALUES):
        if key.destiny != "default" and not builder.with_destiny:
            continue
        raw.flushall()
        await theirs.set_state(key, Form.name)
        await theirs.set_data(key, value)
        written = everything(raw)
        assert (await ours.get_state(key), await ours.get_data(key)) == ("Form:name", value)
        raw.flushall()
        await ours.set_state(key, Form.name)
        await ours.set_data(key, value)
        assert everything(raw) == written
        assert (await theirs.get_state(key), await theirs.get_data(key)) == ("Form:name", value)
        assert await ours.update_data(key, {"more": 1}) == {**value, "more": 1}
        assert await theirs.update_data(key, {"last": 2}) == {**value, "more": 1, "last": 2}
        assert await ours.get_data(key) == {**value, "more": 1, "last": 2}
        await ours.set_data(key, {})
        await ours.set_state(key, None)
        assert everything(raw) == {}
    await theirs.close()


async def test_the_times_to_live_are_aiograms(
    make: Make, theirs: AiogramStorage, raw: redis.Redis, key: StorageKey
) -> None:
    for state_ttl, data_ttl in ((100, None), (None, timedelta(hours=1)), (timedelta(days=30), 500)):
        found = []
        for storage in (
            theirs.__class__(theirs.redis, state_ttl=state_ttl, data_ttl=data_ttl),
            make(state_ttl=state_ttl, data_ttl=data_ttl),
        ):
            raw.flushall()
            await storage.set_state(key, "a")
            await storage.set_data(key, {"a": 1})
            await storage.update_data(key, {"b": 1})
            found.append([raw.ttl(f"fsm:-100200300:7:{part}") for part in ("state", "data")])
        assert found[0] == pytest.approx(found[1], abs=10)  # a machine may stand still in between


async def test_a_time_to_live_has_milliseconds(make: Make, raw: redis.Redis, key: StorageKey) -> None:
    for asked, lasts in (({}, 1500), ({"ttl": 0.25}, 250)):
        began = time.monotonic()
        await make(state_ttl=1.5).set_state(key, "a", **asked)
        left = raw.pttl("fsm:-100200300:7:state")
        took = (time.monotonic() - began) * 1000
        assert left != -1
        assert lasts - took - 2 <= left <= lasts
    await make(data_ttl=60).set_data(key, {"a": 1}, ttl=None)
    assert raw.pttl("fsm:-100200300:7:data") == -1
    await make().update_data(key, {"b": 1}, ttl=timedelta(minutes=1))
    assert 55_000 < raw.pttl("fsm:-100200300:7:data") <= 60_000


async def test_json_of_ones_own(make: Make, redis_url: str, raw: redis.Redis, key: StorageKey) -> None:
    options = {
        "json_loads": partial(json.loads, parse_float=Decimal),
        "json_dumps": partial(json.dumps, ensure_ascii=False, separators=(",", ":"), default=float),
    }
    await make(**options).set_data(key, {"b": [1], "a": "ü", "price": Decimal("1.5")})
    assert raw.get("fsm:-100200300:7:data") == '{"b":[1],"a":"ü","price":1.5}'.encode()
    await make(**options).update_data(key, {"c": 1})
    theirs = AiogramStorage.from_url(redis_url, **options)
    assert await theirs.get_data(key) == {"b": [1], "a": "ü", "price": Decimal("1.5"), "c": 1}
    await theirs.close()


@pytest.mark.parametrize(
    "stored", [b"\x80\x04N.", b"{", b"[1]", b"null", b"\xef\xbb\xbf{}", b"[" * 100_000, b"\xff"],
    ids=["pickle", "cut", "list", "null", "bom", "deep", "no utf-8"],
)  # fmt: skip
async def test_unreadable_data_is_named_and_mended(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey, stored: bytes
) -> None:
    raw.set("fsm:-100200300:7:data", stored)
    for read in (storage.get_data(key), storage.update_data(key, {"a": 1}), storage.get_value(key, "a")):
        with pytest.raises(CorruptData, match=r"fsm:-100200300:7:data.*set_data"):
            await read
    assert raw.get("fsm:-100200300:7:data") == stored
    await storage.set_data(key, {"a": 1})
    assert await storage.get_data(key) == {"a": 1}


async def test_a_key_of_another_type_is_named_and_mended(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    raw.rpush("fsm:-100200300:7:data", "a")
    raw.rpush("fsm:-100200300:7:state", "a")
    with pytest.raises(CorruptData, match=r"data of 'fsm:-100200300:7:data'.*another type"):
        await storage.get_data(key)
    with pytest.raises(CorruptData, match=r"another type.*set_data"):
        await storage.update_data(key, {"a": 1})
    with pytest.raises(CorruptData, match=r"state of 'fsm:-100200300:7:state'.*set_state"):
        await storage.get_state(key)
    await storage.set_state(key, "b")
    await storage.set_data(key, {"a": 1})
    assert (await storage.get_state(key), await storage.get_data(key)) == ("b", {"a": 1})


async def test_a_state_that_is_no_text_is_named(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    raw.set("fsm:-100200300:7:state", b"\xff")
    with pytest.raises(CorruptData, match="set_state"):
        await storage.get_state(key)


async def test_nan_from_elsewhere_is_read_but_not_written_on(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    """aiogram writes it, and no database takes it."""
    raw.set("fsm:-100200300:7:data", b'{"a": NaN}')
    assert str(await storage.get_data(key)) == "{'a': nan}"
    with pytest.raises(ValueError, match="a is nan"):
        await storage.update_data(key, {"b": 1})
    await storage.update_data(key, {"a": 1})
    assert await storage.get_data(key) == {"a": 1}
