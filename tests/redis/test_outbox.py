"""The outbox: it tells everything that was written, in order, and nothing else; it does not grow for ever."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import RedisStorage
from fsm_storage.exceptions import RedisUnavailable
from fsm_storage.outbox import Record, decode_key, missed_name, stream_name, version_of
from tests.redis.conftest import Make
from tests.redis.replay import entries, records, replayed, stored
from tests.redis.writers import key_of
from tests.servers import finish_child, start_child

STREAM, MISSED = stream_name("default"), missed_name("default")


async def test_each_write_is_told(make: Make, raw: redis.Redis, key: StorageKey) -> None:
    storage = make(state_ttl=100)
    other = StorageKey(1, 2, 3, thread_id=4, business_connection_id="b")
    await storage.set_state(key, "Form:name")
    await storage.set_data(key, {"b": 1, "a": 2})
    await storage.update_data(key, {"c": 3}, ttl=20.5)
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    await storage.set_state(other, "", ttl=None)
    await storage.get_state(key)
    await storage.get_data(key)
    assert records(raw) == [
        Record(key, "state", "Form:name", 100_000),
        Record(key, "data", '{"b": 1, "a": 2}'),
        Record(key, "data", '{"b": 1, "a": 2, "c": 3}', 20_500),
        Record(key, "state", None),
        Record(key, "data", None),
        Record(other, "state", ""),
    ]
    now = int(float(".".join(map(str, raw.time()))) * 1000)
    assert all(0 <= now - (version_of(entry_id) >> 20) < 10_000 for entry_id, _ in entries(raw))


async def test_without_a_mirror_there_is_no_outbox(make: Make, raw: redis.Redis, key: StorageKey) -> None:
    storage = make(mirror=False)
    await storage.set_state(key, "a")
    await storage.update_data(key, {"a": 1})
    assert sorted(raw.keys("*")) == [b"fsm:-100200300:7:data", b"fsm:-100200300:7:state"]


async def test_each_alias_has_an_outbox_of_its_own(make: Make, raw: redis.Redis, key: StorageKey) -> None:
    await make(alias="one").set_state(key, "a")
    await make(alias="two").set_state(key, "b")
    assert [[r.value for r in records(raw, alias)] for alias in ("one", "two")] == [["a"], ["b"]]


async def test_concurrent_writes_share_an_entry_in_their_order(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    writes = [storage.set_state(key, f"s{n}") for n in range(100)]
    writes += [storage.set_data(key_of(n), {"n": n}) for n in range(100)]
    await asyncio.gather(*writes)
    assert len(entries(raw)) == 1
    assert [record.value for record in records(raw)[:100]] == [f"s{n}" for n in range(100)]
    assert await storage.get_state(key) == "s99"
    assert replayed(raw) == stored(raw)


@pytest.mark.parametrize("seed", range(5))
async def test_replaying_the_outbox_gives_what_redis_has(make: Make, raw: redis.Redis, seed: int) -> None:
    """Two storages, as of two processes, and few keys, so that writes and merges meet in every way."""
    dice = random.Random(seed)
    storages = [make(), make()]

    async def act(task: int) -> None:
        for n in range(25):
            storage, key = dice.choice(storages), key_of(dice.randrange(3))
            await dice.choice([
                lambda s=storage, k=key, n=n: s.set_state(k, f"{task}-{n}"),
                lambda s=storage, k=key: s.set_state(k, None),
                lambda s=storage, k=key, n=n: s.set_data(k, {f"{task}": n}),
                lambda s=storage, k=key: s.set_data(k, {}),
                lambda s=storage, k=key, n=n: s.update_data(k, {f"{task}-{n}": n}),
                lambda s=storage, k=key, n=n: s.update_data(k, {f"{task}-{n}": n}),
                lambda s=storage, k=key: s.get_data(k),
            ])()  # fmt: skip

    await asyncio.gather(*(act(task) for task in range(12)))
    assert replayed(raw) == stored(raw)


async def test_a_write_that_cannot_be_told_is_not_written(
    storage: RedisStorage, raw: redis.Redis, key: StorageKey
) -> None:
    await storage.set_state(key, "old")
    raw.delete(STREAM)
    raw.set(STREAM, "somebody else's")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
        await storage.set_state(key, "new")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
        await storage.update_data(key, {"a": 1})
    assert stored(raw) == {b"fsm:-100200300:7:state": b"old"}
    assert await storage.get_state(key) == "old"


# At the limit


async def test_a_full_outbox_takes_names_only_and_nothing_is_lost(make: Make, raw: redis.Redis) -> None:
    storage = make(outbox_bytes=20_000)
    for n in range(100):
        await storage.set_data(key_of(n % 50), {"n": n, "text": "x" * 500})
    size = raw.memory_usage(STREAM)
    assert 15_000 < size < 30_000  # a batch late at the most
    missed = {decode_key(member) for member in raw.smembers(MISSED)}
    told = {record.key for record in records(raw)}
    assert missed | told == {key_of(n) for n in range(50)}
    # What is not told as it is now is missed.
    newest = {record.key: record.value for record in records(raw)}
    for n in range(50, 100):
        now = json.dumps({"n": n, "text": "x" * 500})
        assert newest.get(key_of(n % 50)) == now or key_of(n % 50) in missed
    await asyncio.gather(
        storage.set_state(key_of(7), "a"),
        storage.update_data(key_of(1007), {"a": 1}),
        storage.set_data(key_of(8), {}),
    )
    assert raw.memory_usage(STREAM) == size
    assert key_of(1007) in {decode_key(member) for member in raw.smembers(MISSED)}
    assert (await storage.get_state(key_of(7)), await storage.get_data(key_of(1007))) == ("a", {"a": 1})


async def test_an_outbox_that_was_emptied_takes_all_again(make: Make, raw: redis.Redis) -> None:
    storage = make(outbox_bytes=20_000)
    for n in range(60):
        await storage.set_data(key_of(n), {"text": "x" * 500})
    assert raw.scard(MISSED)
    raw.xtrim(STREAM, maxlen=0)
    raw.delete(MISSED)
    await storage.set_data(key_of(1), {"text": "x" * 500})  # from its reply the storage learns of the room
    assert {decode_key(member) for member in raw.smembers(MISSED)} == {key_of(1)}
    await storage.set_state(key_of(2), "a")
    assert records(raw) == [Record(key_of(2), "state", "a")]
    assert raw.scard(MISSED) == 1


async def test_another_process_that_fills_the_outbox_is_noticed(make: Make, raw: redis.Redis) -> None:
    one, other = make(outbox_bytes=20_000), make(outbox_bytes=20_000)
    await one.set_state(key_of(1), "a")
    for n in range(60):
        await other.set_data(key_of(n), {"text": "x" * 500})
    await asyncio.sleep(0.6)  # the storage asks for the size now and then
    await one.set_state(key_of(900), "a")
    await one.set_state(key_of(901), "a")
    assert key_of(901) in {decode_key(member) for member in raw.smembers(MISSED)}


# Processes that die


def test_what_a_killed_process_was_told_is_written_and_told(
    redis_url: str, raw: redis.Redis, tmp_path: Path
) -> None:
    """Twenty rounds: Redis has what was acknowledged, and the outbox tells exactly what Redis has."""
    notes = tmp_path / "notes"
    finish_child(start_child("tests.redis.writers", "write_and_be_killed", redis_url, str(notes), "20"), 110)
    acknowledged: dict[tuple[str, int], int] = defaultdict(int)
    for line in notes.read_text().splitlines():
        kind, chat, n = line.split()
        acknowledged[kind, int(chat)] = int(n)
    assert len({chat // 100 for _, chat in acknowledged if chat < 1_000_000}) == 20
    kept = stored(raw)
    assert replayed(raw) == kept
    for (kind, chat), n in acknowledged.items():
        part = "state" if kind == "state" else "data"
        check(kind, kept[f"fsm:{chat}:{chat}:{part}".encode()], n)


def check(kind: str, value: bytes, n: int) -> None:
    """Whole, and the acknowledged write or the one that was in flight."""
    if kind == "state":
        assert value in (b"s%d" % n, b"s%d" % (n + 1))
        return
    data: dict[str, Any] = json.loads(value)
    if kind == "data":
        assert data["a"] == data["b"]
        assert data["a"] in (n, n + 1)
    else:
        assert set(data) - {f"f{n + 1}"} == {f"f{i}" for i in range(1, n + 1)}
