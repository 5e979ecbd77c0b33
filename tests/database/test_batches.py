"""Group commit, counted in the worker's thread; and batches in which one operation is bad."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.exceptions import InvalidData, InvalidDataType, InvalidKey
from tests.conftest import MARIADB, POSTGRES
from tests.database.conftest import Statements
from tests.rows import in_thread, records, transitions

Make = Callable[..., DjangoStorage]
ONLY_POSTGRES = pytest.mark.parametrize("database", [POSTGRES], indirect=True)
ON_SERVERS = pytest.mark.parametrize("database", [POSTGRES, MARIADB], indirect=True)


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


async def in_one_batch(
    storage: DjangoStorage, statements: Statements, operations: list[Awaitable[Any]]
) -> list[Any]:
    """Let the operations gather behind one that is held up, and return their outcomes."""
    with statements.held():
        first = [
            asyncio.ensure_future(storage.set_state(chat(-1), "first")),
            asyncio.ensure_future(storage.get_state(chat(-1))),
        ]
        while not statements.someone_is_held():
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)  # the other worker, if there is one, is held up too
        tasks = [asyncio.ensure_future(operation) for operation in operations]
        await asyncio.sleep(0.02)
        statements.seen.clear()
    await asyncio.gather(*first)
    return await asyncio.gather(*tasks, return_exceptions=True)


def ours(statements: Statements) -> list[str]:
    """Without those that prepare a new connection."""
    return [sql for sql in statements.seen if "fsm_storage" in sql]


def kinds(statements: Statements) -> list[str]:
    return [sql.split(None, 1)[0].upper() for sql in statements.seen]


WRITES: dict[str, Callable[[DjangoStorage, int], Awaitable[Any]]] = {
    "set_state": lambda storage, n: storage.set_state(chat(n), f"s{n}"),
    "set_data": lambda storage, n: storage.set_data(chat(n), {"n": n}),
    "update_data": lambda storage, n: storage.update_data(chat(n), {"n": n}),
}


@pytest.mark.parametrize("history", ["off", "states", "full"])
@pytest.mark.parametrize("write", WRITES)
async def test_a_batch_of_50_takes_as_many_statements_as_one_of_10(
    make_storage: Make, statements: Statements, write: str, history: str
) -> None:
    storage = make_storage(history=history)
    counts = []
    for size in (10, 50):
        outcomes = await in_one_batch(storage, statements, [WRITES[write](storage, n) for n in range(size)])
        assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        counts.append(len(statements.seen))
    # 10 made records and 50 change some and make some: at most one more kind of statement.
    assert counts[1] <= counts[0] + 2
    assert counts[1] <= 12


async def test_a_batch_of_writes_is_one_transaction(
    storage: DjangoStorage, statements: Statements, database: str
) -> None:
    await in_one_batch(storage, statements, [WRITES["update_data"](storage, n) for n in range(50)])
    ends = [kind for kind in kinds(statements) if kind in ("BEGIN", "START", "COMMIT")]
    # The write that was held up, and all of the rest; on PostgreSQL in two queues.
    if database == "default":
        assert ends.count("COMMIT") <= 2
    elif database == "mariadb":
        # Each beginning travels with a SELECT, each COMMIT with what goes before it.
        assert ends.count("START") <= 2
        assert len(ours(statements)) <= 7  # a read, and two of new records
        assert sum(sql.endswith("COMMIT") for sql in statements.seen) <= 2
    else:
        assert ends == []
        assert len(statements.seen) <= 5


async def test_a_batch_of_reads_is_one_statement_for_each_part(
    storage: DjangoStorage, statements: Statements
) -> None:
    reads = [storage.get_state(chat(n)) for n in range(50)] + [storage.get_data(chat(n)) for n in range(50)]
    await in_one_batch(storage, statements, reads)
    assert len([sql for sql in ours(statements) if sql.lstrip().upper().startswith("SELECT")]) <= 5


@ONLY_POSTGRES
async def test_a_lone_write_on_postgresql_is_one_round_trip(
    storage: DjangoStorage, statements: Statements
) -> None:
    await storage.set_state(chat(1), "a")  # opens the connection
    for write in WRITES.values():
        for _ in range(2):
            statements.seen.clear()
            await write(storage, 1)
            assert len(statements.seen) == 1


@pytest.mark.parametrize("database", [MARIADB], indirect=True)
@pytest.mark.parametrize("history", ["off", "states", "full"])
async def test_a_lone_write_on_mariadb_is_two_round_trips(
    make_storage: Make, statements: Statements, history: str
) -> None:
    storage = make_storage(history=history)
    await storage.set_state(chat(1), "a")  # opens the connection
    for n in (1, 2):
        for write in WRITES.values():
            statements.seen.clear()
            await write(storage, n)
            is_new = n == 2 and write is WRITES["set_state"]
            assert len(statements.seen) == 2 + is_new  # whether somebody holds a row that is not seen


@pytest.mark.parametrize("database", [MARIADB], indirect=True)
async def test_statements_go_one_by_one_where_the_driver_must_not_join_them(
    storage: DjangoStorage, statements: Statements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections["mariadb"].settings_dict["OPTIONS"], "multi_statements", False)
    for n in (1, 2):
        await storage.set_state(chat(1), f"s{n}")
        await storage.update_data(chat(1), {f"f{n}": n})
    assert await storage.get_data(chat(1)) == {"f1": 1, "f2": 2}
    assert not [sql for sql in statements.seen if ";" in sql and "fsm_storage" in sql]
    assert kinds(statements).count("COMMIT") == 4


async def test_a_lone_read_is_one_statement(storage: DjangoStorage, statements: Statements) -> None:
    await storage.get_state(chat(1))
    for read in (storage.get_state, storage.get_data):
        statements.seen.clear()
        await read(chat(1))
        assert len(statements.seen) == 1


@ON_SERVERS
async def test_reads_do_not_wait_for_a_commit_on_a_server(make_storage: Make, statements: Statements) -> None:
    """The writer's thread is held up, and reads go on."""
    storage = make_storage(timeout=25)
    await storage.set_state(chat(1), "a")
    await storage.get_state(chat(1))
    with statements.held(only="writes"):
        write = asyncio.ensure_future(storage.set_state(chat(1), "b"))
        while not statements.someone_is_held():
            await asyncio.sleep(0.002)
        assert await asyncio.wait_for(storage.get_state(chat(1)), 15) == "a"
    await write
    assert await storage.get_state(chat(1)) == "b"


async def test_two_writes_of_a_key_in_the_queue_both_count(
    storage: DjangoStorage, statements: Statements, database: str
) -> None:
    """At most one write of a key is in a batch; the next one waits for the next batch."""
    await in_one_batch(
        storage,
        statements,
        [storage.update_data(chat(n % 3), {f"f{n}": n}) for n in range(30)]
        + [storage.set_state(chat(n % 3), f"s{n}") for n in range(30)],
    )
    for row in await in_thread(records, database):
        if row.chat_id >= 0:
            assert row.data == {f"f{n}": n for n in range(30) if n % 3 == row.chat_id}
            assert row.state in {f"s{n}" for n in range(30) if n % 3 == row.chat_id}
            noted = await in_thread(transitions, database, key=row.key)
            assert [before for before, *_ in noted] == [None, *(after for _, after, *_ in noted[:-1])]
            assert len(noted) == 10


def _deep(levels: int) -> dict[str, Any]:
    data: Any = 1
    for _ in range(levels):
        data = {"d": data}
    return {"root": data}


POISON: dict[str, tuple[StorageKey, Any, type[Exception], str]] = {
    "nan": (chat(7), {"cart": [{"price": math.nan}]}, InvalidData, "cart[0].price"),
    "infinity": (chat(7), {"a": -math.inf}, InvalidData, "a"),
    "nul": (chat(7), {"a": {"b": "x\0y"}}, InvalidData, "a.b"),
    "nul in a key": (chat(7), {"a": {"x\0y": 1}}, InvalidData, "a"),
    "surrogate": (chat(7), {"a": ["ok", "\udc80"]}, InvalidData, "a[1]"),
    "surrogate in a key": (chat(7), {"a": {"\ud800": 1}}, InvalidData, "a"),
    "too deep": (chat(7), _deep(100_000), InvalidData, ""),
    "twin keys": (chat(7), {"a": {1: "x", "1": "y"}}, InvalidData, "a"),
    "twin keys of truth": (chat(7), {"a": {True: "x", "true": "y"}}, InvalidData, "a"),
    "a number beyond Python's limit": (chat(7), {"a": 10**4301}, InvalidData, "a"),
    "set": (chat(7), {"a": {1, 2}}, InvalidDataType, "a"),
    "tuple key": (chat(7), {"a": {(1, 2): 3}}, InvalidDataType, "a"),
    "long key": (StorageKey(1, 7, 7, destiny="x" * 600), {"a": 1}, InvalidKey, ""),
    "big chat": (StorageKey(1, 2**63, 7), {"a": 1}, InvalidKey, ""),
}


@pytest.mark.parametrize("what", POISON)
async def test_a_poisoned_operation_fails_alone(
    storage: DjangoStorage, statements: Statements, database: str, what: str
) -> None:
    key, poison, error, path = POISON[what]
    await storage.set_data(chat(7), {"old": True})
    for write in (storage.set_data, storage.update_data):
        operations = [storage.update_data(chat(n), {"n": n}) for n in range(7)]
        outcomes = await in_one_batch(storage, statements, [*operations, write(key, poison)])
        assert outcomes[:7] == [{"n": n} for n in range(7)]
        refused = outcomes[7]
        assert type(refused) is error
        if isinstance(refused, InvalidData | InvalidDataType):
            assert refused.path == path
            assert "1:7:7" in str(refused)
    assert await storage.get_data(chat(7)) == {"old": True}
    assert len(await in_thread(records, database)) == 9  # 0 to 7, and the first one of the batches


def no_json(data: Any) -> str:
    """A `json_dumps` whose texts one of the databases refuses."""
    return json.dumps(data).replace("9999", "1e999999")


async def test_what_only_the_database_refuses_fails_alone(make_storage: Make, statements: Statements) -> None:
    """It takes the whole batch with it at first; the others are then carried out again."""
    storage = make_storage(json_dumps=no_json)
    await storage.set_data(chat(3), {"old": 1})
    operations = [storage.update_data(chat(n), {"n": 9999 if n == 3 else n}) for n in range(7)]
    outcomes = await in_one_batch(storage, statements, operations)
    good = [outcome for n, outcome in enumerate(outcomes) if n != 3]
    assert good == [{"n": n} for n in range(7) if n != 3]
    if isinstance(outcomes[3], ValueError):
        assert await storage.get_data(chat(3)) == {"old": 1}
    else:  # SQLite keeps the text, and a float of Python's is what it reads as
        assert outcomes[3] == {"old": 1, "n": math.inf}
