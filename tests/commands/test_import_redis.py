"""`fsm_import --from redis://…`, from a real Redis that aiogram's own storage filled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisEventIsolation, RedisStorage

from fsm_storage import DjangoStorage
from fsm_storage.models import FSMRecord, UtcNow
from tests.commands.conftest import Run
from tests.rows import in_thread, record, records, transitions

BOT = 42
PRIVATE = StorageKey(BOT, 7, 7)
GROUP = StorageKey(BOT, -1001234567890, 8)
TOPIC = StorageKey(BOT, -1001234567890, 8, thread_id=5)
BUSINESS = StorageKey(BOT, 9, 9, business_connection_id="aBc_1")
BUSINESS_TOPIC = StorageKey(BOT, 9, 9, thread_id=6, business_connection_id="aBc_1")
OTHER_BOT = StorageKey(43, 7, 7)
DESTINY = StorageKey(BOT, 7, 7, destiny="wizard:2")
PLAIN = [PRIVATE, GROUP, TOPIC]

# The arguments of the bot's key builder, those of the command, and the keys that they keep apart.
VARIANTS: dict[str, tuple[dict[str, Any], list[Any], Sequence[StorageKey]]] = {
    "default": ({}, ["--bot-id", BOT], PLAIN),
    "prefix": ({"prefix": "shop*[1]"}, ["--bot-id", BOT, "--prefix", "shop*[1]"], PLAIN),
    "separator": ({"separator": "|"}, ["--bot-id", BOT, "--separator", "|"], PLAIN),
    "bot id": ({"with_bot_id": True}, ["--with-bot-id"], [*PLAIN, OTHER_BOT]),
    "business": (
        {"with_business_connection_id": True},
        ["--bot-id", BOT, "--with-business-connection-id"],
        [*PLAIN, BUSINESS, BUSINESS_TOPIC],
    ),
    "destiny": ({"with_destiny": True}, ["--bot-id", BOT, "--with-destiny"], [*PLAIN, DESTINY]),
    "all": (
        {"with_bot_id": True, "with_business_connection_id": True, "with_destiny": True},
        ["--with-bot-id", "--with-business-connection-id", "--with-destiny"],
        [*PLAIN, OTHER_BOT, BUSINESS, BUSINESS_TOPIC, DESTINY],
    ),
}
DATA = {"n": 2**70, "f": 0.1, "t": "é\n", "deep": [{"x": None, "yes": True}]}

Content = tuple[str | None, Mapping[str, Any]]


def fill(url: str, contents: Mapping[StorageKey, Content], *, ttl: int | None = None, **builder: Any) -> None:
    """Write as a bot on aiogram's RedisStorage does."""

    async def main() -> None:
        storage = RedisStorage.from_url(
            url, key_builder=DefaultKeyBuilder(**builder), state_ttl=ttl, data_ttl=ttl and ttl * 2
        )
        for key, (state, data) in contents.items():
            await storage.set_state(key, state)
            await storage.set_data(key, data)
        await storage.close()

    asyncio.run(main())


def read(storage: DjangoStorage, keys: Sequence[StorageKey]) -> dict[StorageKey, Content]:
    async def main() -> dict[StorageKey, Content]:
        return {key: (await storage.get_state(key), await storage.get_data(key)) for key in keys}

    return asyncio.run(main())


def contents_of(keys: Sequence[StorageKey]) -> dict[StorageKey, Content]:
    """Different contents for each key: both parts, only a state, only data."""
    kinds: list[Content] = [("Order:size", DATA), ("Order:item", {}), (None, {"n": 1})]
    return {key: kinds[place % len(kinds)] for place, key in enumerate(keys)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_conversation_of_every_key_builder_reads_back_equal(
    variant: str, storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    builder, arguments, keys = VARIANTS[variant]
    contents = contents_of(keys)
    fill(redis_url, contents, **builder)
    said = run("fsm_import", "--from", redis_url, "--alias", database, "--json", *arguments)
    assert (said.code, said.err) == (0, "")
    expected = {"written": len(keys), "same": 0, "skipped": 0, "refused": 0, "transitions": 0}
    assert said.json == expected
    assert read(storage, keys) == contents
    assert len(records(database)) == len(keys)
    sources = {(before, source) for before, _, source, _ in transitions(database)}
    assert sources == {(None, "import")}


def test_times_to_live_are_kept(storage: DjangoStorage, database: str, redis_url: str, run: Run) -> None:
    fill(redis_url, {PRIVATE: ("a", {"n": 1})}, ttl=1000)
    fill(redis_url, {GROUP: ("a", {"n": 1})})
    with redis.Redis.from_url(redis_url) as client:
        client.pexpire("fsm:7:7:state", 123_456)
    assert run("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT).code == 0
    now = FSMRecord.objects.using(database).clock()
    row, lasting = record(database, chat_id=7), record(database, chat_id=GROUP.chat_id)
    assert abs(row.state_expires_at - now - timedelta(milliseconds=123_456)) < timedelta(seconds=20)
    assert abs(row.data_expires_at - now - timedelta(seconds=2000)) < timedelta(seconds=20)
    assert (lasting.state_expires_at, lasting.data_expires_at) == (None, None)


def test_again_it_finds_the_same_and_writes_nothing(
    storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    fill(redis_url, contents_of(PLAIN), ttl=1000)
    arguments = ("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--json")
    assert run(*arguments).json["written"] == 3
    before = [(row.version, row.updated_at) for row in records(database)]
    counts = run(*arguments).json
    assert (counts["written"], counts["same"], counts["refused"]) == (0, 3, 0)
    assert [(row.version, row.updated_at) for row in records(database)] == before


def test_what_the_bot_wrote_since_is_kept_unless_told_otherwise(
    storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    fill(redis_url, {PRIVATE: ("old", {"n": 1}), GROUP: ("old", {})})
    arguments = ("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--json")
    run(*arguments)
    asyncio.run(storage.set_state(PRIVATE, "new"))
    counts = run(*arguments).json
    assert (counts["written"], counts["same"], counts["skipped"]) == (0, 1, 1)
    assert read(storage, [PRIVATE]) == {PRIVATE: ("new", {"n": 1})}
    counts = run(*arguments, "--overwrite").json
    assert (counts["written"], counts["same"], counts["skipped"]) == (1, 1, 0)
    assert read(storage, [PRIVATE]) == {PRIVATE: ("old", {"n": 1})}


def test_a_dry_run_counts_and_writes_nothing(
    storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    fill(redis_url, contents_of(PLAIN))
    said = run("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--dry-run")
    assert said.out.startswith("would write 3 conversations;")
    assert records(database) == []


def test_each_bad_value_is_named_with_its_key_and_the_rest_goes_on(
    storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    contents = contents_of(PLAIN)
    fill(redis_url, contents)
    with redis.Redis.from_url(redis_url) as client:
        client.set("fsm:1:1:data", "{no json")
        client.set("fsm:2:2:data", "[1]")
        client.set("fsm:3:3:data", '{"x": NaN}')
        client.set("fsm:4:4:state", b"\xff")
        client.set("fsm:5:5:state", "s" * 300)
        client.rpush("fsm:6:6:state", "a list")
        client.hset("fsm:8:8:data", "a", "hash")
        client.set("fsm:session:99", "of another program")
        client.set(f"fsm:{2**70}:1:state", "a")
        client.set("fsm:10:20:30:40:state", "a")
        client.set("fsm:\xff:\x1b[31m:state", "a")
        client.set("elsewhere:1:1:state", "not ours")
    said = run("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--json")
    assert said.code == 3
    assert said.json == {"written": 3, "same": 0, "skipped": 0, "refused": 11, "transitions": 0}
    for name, reason in (
        ("fsm:1:1:data", "is no JSON"),
        ("fsm:2:2:data", "is a list where an object belongs"),
        ("fsm:3:3", "x is nan"),
        ("fsm:4:4:state", "codec can't decode"),
        ("fsm:5:5", "has 300 characters"),
        ("fsm:6:6:state", "WRONGTYPE"),
        ("fsm:8:8:data", "WRONGTYPE"),
        ("fsm:session:99", "ends in none of"),
        (f"fsm:{2**70}:1", "does not fit"),
        ("fsm:10:20:30:40", "does not fit"),
    ):
        assert any(name in line and reason in line for line in said.err.splitlines()), (name, said.err)
    assert "\x1b" not in said.err
    assert "11 could not be imported" in said.err
    assert read(storage, PLAIN) == contents
    assert len(records(database)) == 3


def test_locks_are_no_conversations(storage: DjangoStorage, database: str, redis_url: str, run: Run) -> None:
    async def lock() -> Any:
        isolation = RedisEventIsolation.from_url(redis_url)
        async with isolation.lock(PRIVATE):
            said = await in_thread(
                run, "fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--dry-run"
            )
        await isolation.redis.aclose(close_connection_pool=True)
        return said

    said = asyncio.run(lock())
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("would write 0 conversations")


def test_more_than_a_batch_and_parts_that_expire_soon(
    storage: DjangoStorage, database: str, redis_url: str, run: Run
) -> None:
    keys = [StorageKey(BOT, number, number) for number in range(1, 1301)]
    contents = {key: ("s", {"n": key.chat_id}) for key in keys}
    fill(redis_url, contents, ttl=290)  # both keys of each are read, as one may be gone by then
    said = run("fsm_import", "--from", redis_url, "--alias", database, "--bot-id", BOT, "--json")
    assert said.json["written"] == 1300
    assert FSMRecord.objects.using(database).filter(state_expires_at__gt=UtcNow()).count() == 1300
    assert read(storage, keys) == contents


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --bot-id, the number before the colon of the bot's token"),
        (["--bot-id", "42", "--with-bot-id"], "leave --bot-id out"),
        (["--bot-id", "42", "--separator", ""], "must not be empty"),
        (["--bot-id", "42", "--resume-from", "5"], "--resume-from is for files"),
        (["--bot-id", "42", "a-file.jsonl"], "name a file, or a storage"),
    ],
)
@pytest.mark.django_db
def test_arguments_that_do_not_go_together(arguments: list[str], reason: str, run: Run) -> None:
    said = run("fsm_import", "--from", "redis://127.0.0.1:1", *arguments)
    assert said.code == 2
    assert reason in said.err


@pytest.mark.django_db
def test_a_redis_that_does_not_answer_is_named_without_its_password(run: Run) -> None:
    said = run("fsm_import", "--from", "redis://me:secret@127.0.0.1:1/0", "--bot-id", 1)
    assert said.code == 1
    assert "127.0.0.1:1/0 failed" in said.err
    assert "secret" not in said.err


@pytest.mark.django_db
@pytest.mark.parametrize("url", ["http://x", "nonsense", "redis:"])
def test_a_source_that_is_none(url: str, run: Run) -> None:
    said = run("fsm_import", "--from", url, "--bot-id", 1)
    assert said.code == 1
    assert "Traceback" not in said.err
