"""`update_data` is one atomic merge, whoever else merges or writes, and exact."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from pathlib import Path

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage
from fsm_storage.codec import MAX_LENGTH
from fsm_storage.exceptions import InvalidData, StorageTimeout
from tests.redis.conftest import Make
from tests.redis.patience import in_time
from tests.redis.proxy import Proxy
from tests.redis.replay import records
from tests.redis.writers import key_of
from tests.servers import finish_child, start_child

DATA = "fsm:-100200300:7:data"


def lost_fields(redis_url: str, raw: redis.Redis, notes: Path, kind: str) -> tuple[int, int]:
    """Let two processes hammer three keys; return the fields that were acknowledged, and those lost of them."""
    children = [
        start_child("tests.redis.writers", "add_fields", redis_url, str(notes), who, kind)
        for who in ("a", "b")
    ]
    for child in children:
        finish_child(child)
    acknowledged: dict[int, dict[str, int]] = defaultdict(dict)
    for line in notes.read_text().splitlines():
        if line.startswith("ready"):
            continue
        chat, name, n = line.split()
        acknowledged[int(chat)][name] = int(n)
    storage = RedisStorage.from_url(redis_url, mirror="apart")
    kept = {chat: asyncio.run(storage.get_data(key_of(chat))) for chat in acknowledged}
    lost = sum(
        kept[chat].get(name) != n for chat, fields in acknowledged.items() for name, n in fields.items()
    )
    return sum(map(len, acknowledged.values())), lost


def test_two_processes_lose_no_field(redis_url: str, raw: redis.Redis, tmp_path: Path) -> None:
    assert lost_fields(redis_url, raw, tmp_path / "notes", "ours") == (640, 0)


def test_the_same_with_aiograms_storage_loses_fields(
    redis_url: str, raw: redis.Redis, tmp_path: Path
) -> None:
    """Or the test above would show nothing."""
    count, lost = lost_fields(redis_url, raw, tmp_path / "notes", "theirs")
    print(f"aiogram's RedisStorage lost {lost} of {count}")
    assert count == 640
    assert lost > 0


async def test_numbers_keep_their_value(storage: RedisStorage, key: StorageKey) -> None:
    exact = {"a": 2**53 + 1, "b": -(2**70), "c": 0.1 + 0.2, "d": 5e-324, "e": 1.7976931348623157e308}
    await storage.set_data(key, exact)
    assert await storage.update_data(key, {"f": 2**64 + 1}) == {**exact, "f": 2**64 + 1}
    assert await storage.get_data(key) == {**exact, "f": 2**64 + 1}


async def test_merges_that_wait_go_together(storage: RedisStorage, raw: redis.Redis, key: StorageKey) -> None:
    replies = await asyncio.gather(*(storage.update_data(key, {f"k{n}": n}) for n in range(200)))
    assert await storage.get_data(key) == {f"k{n}": n for n in range(200)}
    assert all(reply[f"k{n}"] == n for n, reply in enumerate(replies))
    assert len(records(raw)) <= 3
    replies[0]["k5"] = "changed"  # is the caller's own
    assert replies[1].get("k5", 5) == 5
    assert storage._side().merger._waiting == {}


async def test_a_merge_and_a_write_at_once_are_in_some_order(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    for _ in range(30):
        await storage.set_data(key, {"old": 1})
        await asyncio.gather(storage.update_data(key, {"merged": 1}), storage.set_data(key, {"new": 1}))
        assert await storage.get_data(key) in ({"new": 1}, {"new": 1, "merged": 1})


async def test_a_write_of_another_client_in_between_is_not_lost(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    """Whatever the storage saw there last: a value, a large one, its own, or nothing."""
    large = "x" * 5000
    assert await storage.get_data(key) == {}
    raw.set(DATA, '{"a": 1}')
    assert await storage.update_data(key, {"b": 1}) == {"a": 1, "b": 1}
    raw.set(DATA, '{"a": 2}')
    assert await storage.update_data(key, {"b": 2}) == {"a": 2, "b": 2}
    await storage.set_data(key, {"own": large})
    raw.set(DATA, '{"a": 3}')
    assert await storage.update_data(key, {"b": 3}) == {"a": 3, "b": 3}
    raw.set(DATA, json.dumps({"a": large}))
    assert await storage.update_data(key, {"b": 4}) == {"a": large, "b": 4}
    raw.delete(DATA)
    assert await storage.update_data(key, {"b": 5}) == {"b": 5}
    assert json.loads(raw.get(DATA)) == {"b": 5}


async def test_a_merge_is_one_round_trip_where_nobody_else_writes(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    await storage.update_data(key, {"n": 0})

    def asked() -> int:
        stats = raw.info("commandstats")
        return sum(stats[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval"))

    before = asked()
    for n in range(5):
        await storage.update_data(key, {"n": n})
    await storage.set_data(key, {"set": 1})
    await storage.update_data(key, {"n": 6})
    assert asked() - before == 7


async def test_what_is_kept_to_guess_from_is_bounded(storage: RedisStorage) -> None:
    merger = storage._side().merger
    for n in range(5000):
        merger.saw(f"fsm:{n}", b"{}")
    merger.saw("fsm:904", b'{"a": 1}')  # the oldest of those that are left becomes the newest
    merger.saw("fsm:5001", b"{}")
    merger.saw("fsm:4000", b"x" * 5000)
    assert len(merger._guesses) == 4095
    assert "fsm:904" in merger._guesses
    assert not {"fsm:905", "fsm:4000"} & set(merger._guesses)


async def test_a_cancelled_leader_leaves_the_others_their_turn(
    make: Make, proxy: Proxy, key: StorageKey
) -> None:
    storage = make(proxy.url)
    await storage.get_data(key)
    for delay in (0, 0.02, 0.05):
        proxy.hold()
        merges = [asyncio.create_task(storage.update_data(key, {f"{delay}-{n}": n})) for n in range(6)]
        await asyncio.sleep(delay)
        merges[0].cancel()
        merges[3].cancel()
        proxy.mend()
        replies = await asyncio.gather(*merges, return_exceptions=True)
        assert [type(reply) for reply in replies].count(asyncio.CancelledError) == 2
        data = await storage.get_data(key)
        assert {f"{delay}-{n}" for n in (1, 2, 4, 5)} <= set(data)
    assert storage._side().merger._waiting == {}


async def test_a_follower_that_is_cancelled_as_its_turn_comes_passes_it_on(
    storage: RedisStorage, key: StorageKey
) -> None:
    merger = storage._side().merger
    leader = asyncio.create_task(storage.update_data(key, {"a": 1}))
    await asyncio.sleep(0)
    followers = [asyncio.create_task(storage.update_data(key, {f"b{n}": n})) for n in range(2)]
    await asyncio.sleep(0)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)  # the first follower has been told to lead
    followers[0].cancel()
    assert (await followers[1])["b1"] == 1
    assert merger._waiting == {}


async def test_one_merge_too_large_fails_alone(storage: RedisStorage, key: StorageKey) -> None:
    half = "x" * (MAX_LENGTH // 2 + 10)
    small, first, second, last = await asyncio.gather(
        storage.update_data(key, {"small": 1}),
        storage.update_data(key, {"one": half}),
        storage.update_data(key, {"two": half}),
        storage.update_data(key, {"last": 1}),
        return_exceptions=True,
    )
    assert small["small"] == 1
    assert last["last"] == 1
    assert sorted((type(first), type(second)), key=str) == sorted((dict, InvalidData), key=str)
    data = await storage.get_data(key)
    assert (data["small"], data["last"], len(data)) == (1, 1, 3)


async def test_a_caller_behind_merges_that_do_not_end_gets_an_error(
    make: Make, proxy: Proxy, key: StorageKey
) -> None:
    storage = make(proxy.url, timeout=0.3)
    await in_time(lambda: storage.get_data(key))
    proxy.hold()
    started = time.monotonic()
    replies = await asyncio.gather(
        *(storage.update_data(key, {f"k{n}": n}) for n in range(5)), return_exceptions=True
    )
    assert time.monotonic() - started < 10
    assert all(isinstance(reply, StorageTimeout) for reply in replies)
    proxy.mend()
    assert (await in_time(lambda: storage.update_data(key, {"after": 1})))["after"] == 1


async def test_what_was_merged_is_the_storages_own(storage: RedisStorage, key: StorageKey) -> None:
    mine = {"list": [1]}
    merge = asyncio.create_task(storage.update_data(key, mine))
    await asyncio.sleep(0)
    mine["list"].append(2)
    reply = await merge
    assert reply == {"list": [1]}
    reply["list"].append(3)
    assert await storage.get_data(key) == {"list": [1]}


@pytest.mark.parametrize(
    "value", [{1: "a", "1": "b"}, {"a": {1: 1, "1": 2}}, {"a": float("nan")}, {"a": "\0"}]
)
async def test_what_no_database_keeps_is_refused_before_it_is_written(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey, value: dict
) -> None:
    for write in (storage.update_data, storage.set_data):
        with pytest.raises(InvalidData):
            await write(key, value)
    assert raw.keys("*") == []
