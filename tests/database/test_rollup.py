"""The roll-ups count every transition once, however late its transaction is committed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections, transaction

from fsm_storage import Expiry
from fsm_storage.lifecycle.sweeper import Sweeper
from fsm_storage.models import FSMHourlyMove, FSMHourlyPath, FSMRollupMark, FSMRun, FSMTransition
from fsm_storage.rollup import Count, Roller, Row, hour_of, span_of
from tests.conftest import POSTGRES
from tests.database.conftest import wait_for
from tests.database.test_expiry_handlers import running
from tests.rows import in_thread

START = datetime(2026, 3, 1, 10, 30, tzinfo=UTC)
STATES = ["Order:item", "Order:size", "Order:address", "Order:payment"]
on_postgres = pytest.mark.parametrize("database", [POSTGRES], indirect=True)


def conversation(number: int, steps: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Give the changes of one conversation that wanders about, ends and begins anew."""
    state, at = None, START + timedelta(minutes=chance.randrange(300))
    for _ in range(steps):
        to = chance.choice([*STATES, None] if state else STATES)
        yield {
            "alias": "default", "key": f"1:{number}:{number}",
            "bot_id": number % 2, "chat_id": number, "user_id": number,
            "from_state": state, "to_state": to, "at": at,
            "source": "expiry" if to is None and chance.random() < 0.3 else "bot",
        }  # fmt: skip
        state, at = to, at + timedelta(seconds=chance.randrange(7200))


def fill(database: str, seed: int = 1) -> None:
    chance = random.Random(seed)
    waiting = [conversation(number, 12, chance) for number in range(40)]
    rows = []
    while waiting:  # side by side, each in its own order
        one = chance.choice(waiting)
        row = next(one, None)
        rows.append(row) if row else waiting.remove(one)
    FSMTransition.objects.using(database).bulk_create(FSMTransition(**row) for row in rows)


def roll(database: str, batch_size: int = 5000) -> int:
    return sum(Roller(database, batch_size).roll())


def moves(database: str, *kinds: str) -> Counter[tuple[Any, ...]]:
    found = FSMHourlyMove.objects.using(database).filter(kind__in=kinds)
    columns = ("kind", "bot_id", "hour", "from_state", "to_state")
    counted: Counter[tuple[Any, ...]] = Counter()
    for *what, count in found.values_list(*columns, "count"):
        counted[tuple(what)] += count
    return counted


def moves_by_hand(database: str) -> Counter[tuple[Any, ...]]:
    """The slow, obvious way."""
    return Counter(
        (
            "expiry" if row.source == "expiry" else "move",
            row.bot_id,
            hour_of(row.at),
            row.from_state,
            row.to_state,
        )
        for row in FSMTransition.objects.using(database)
        if row.from_state != row.to_state
    )


def paths(database: str) -> Counter[tuple[Any, ...]]:
    found = FSMHourlyPath.objects.using(database).values_list("bot_id", "hour", "states", "count")
    return Counter({(bot, hour, tuple(states)): count for bot, hour, states, count in found})


def paths_by_hand(database: str) -> Counter[tuple[Any, ...]]:
    counted: Counter[tuple[Any, ...]] = Counter()
    rows = FSMTransition.objects.using(database).order_by("key", "id")
    for _, of_key in groupby(rows, lambda row: row.key):
        run: list[FSMTransition] = []
        for row in [*of_key, None]:
            if run and (row is None or row.from_state is None):
                states = tuple(dict.fromkeys(r.to_state for r in run if r.to_state is not None))
                counted[run[0].bot_id, hour_of(run[0].at), states] += 1
                run = []
            if row is not None:
                run.append(row)
    return counted


@pytest.mark.parametrize("batch_size", [1, 7, 5000])
def test_the_sums_are_what_counting_by_hand_gives(database: str, batch_size: int) -> None:
    fill(database)
    assert roll(database, batch_size) == 480
    assert moves(database, "move", "expiry") == moves_by_hand(database)
    assert paths(database) == paths_by_hand(database)
    assert roll(database) == 0
    assert moves(database, "move", "expiry") == moves_by_hand(database)


def test_the_time_in_a_state_and_between_first_entries_is_counted_by_its_class(database: str) -> None:
    at = START
    for before, after, seconds in [
        (None, "A", 0),
        ("A", "B", 5),
        ("B", "A", 100),
        ("A", "B", 3),
        ("B", None, 9),
    ]:
        at += timedelta(seconds=seconds)
        note(database, before, after, at)
    roll(database)
    rows = set(
        FSMHourlyMove.objects.using(database).values_list("kind", "from_state", "to_state", "span", "count")
    )
    second = timedelta(seconds=1)
    assert rows == {
        ("move", None, "A", -1, 1),
        ("move", "A", "B", span_of(5 * second), 1),
        ("move", "B", "A", span_of(100 * second), 1),
        ("move", "A", "B", span_of(3 * second), 1),
        ("move", "B", None, span_of(9 * second), 1),
        ("reach", "A", "B", span_of(5 * second), 1),
    }  # fmt: skip
    run = FSMRun.objects.using(database).get()
    assert (run.entries, run.state, run.started_at) == ([["A", 0.0], ["B", 5.0]], None, START)


def note(
    database: str, before: str | None, after: str | None, at: datetime = START, **fields: Any
) -> FSMTransition:
    known = {"alias": "default", "key": "1:2:3", "bot_id": 1, "chat_id": 2, "user_id": 3}
    return FSMTransition.objects.using(database).create(
        **{**known, "from_state": before, "to_state": after, "at": at, **fields}
    )


def test_a_hole_in_the_history_ends_the_run_and_counts_no_time(database: str) -> None:
    note(database, None, "A")
    note(database, "B", "C", START + timedelta(hours=2))  # how it came to B was not written
    roll(database)
    assert FSMHourlyMove.objects.using(database).get(from_state="B").span == -1
    assert paths(database) == {
        (1, hour_of(START), ("A",)): 1,
        (1, hour_of(START + timedelta(hours=2)), ("C",)): 1,
    }
    assert FSMRun.objects.using(database).filter(state__isnull=False).count() == 1


def test_data_that_changed_is_no_move(database: str) -> None:
    note(database, None, "A")
    note(database, "A", "A")
    roll(database)
    assert moves(database, "move", "expiry").total() == 1


class Session:
    """A transaction of somebody else, as long as it likes."""

    def __init__(self, database: str) -> None:
        options = connections[database].settings_dict
        self.connection = psycopg.connect(
            host=options["HOST"], user=options["USER"], dbname=options["NAME"], autocommit=False
        )

    def close(self) -> None:
        self.connection.close()

    def note(self, key: str, after: str) -> None:
        self.connection.execute(
            "INSERT INTO fsm_storage_transition"
            " (alias, key, bot_id, chat_id, user_id, from_state, to_state, at, source)"
            " VALUES ('default', %s, 1, 2, 3, NULL, %s, %s, 'bot')",
            [key, after, START],
        )


@pytest.fixture
def slow(database: str) -> Iterator[Session]:
    with closing(Session(database)) as session:
        yield session


@on_postgres
def test_a_transaction_that_is_committed_late_is_counted_once(database: str, slow: Session) -> None:
    slow.note("late", "A")
    for number in range(5):
        note(database, None, "B", key=f"early{number}")
    slow.note("late too", "A")
    assert roll(database, 2) == 5
    mark = FSMRollupMark.objects.using(database).get()
    assert len(mark.gaps) == 1  # what lies behind the newest id is no gap yet
    assert roll(database) == 0
    assert len(FSMRollupMark.objects.using(database).get().gaps) == 1
    note(database, None, "B", key="early5")
    assert roll(database) == 1
    slow.connection.commit()
    assert roll(database) == 2
    assert moves(database, "move") == moves_by_hand(database)
    assert paths(database) == paths_by_hand(database)
    assert roll(database) == 0
    assert FSMRollupMark.objects.using(database).get().gaps == []


@on_postgres
def test_a_transaction_that_fails_leaves_no_gap_for_ever(database: str, slow: Session) -> None:
    slow.note("never", "A")
    note(database, None, "B")
    assert roll(database) == 1
    slow.connection.rollback()

    def is_given_up() -> bool:
        roll(database)
        return FSMRollupMark.objects.using(database).get().gaps == []

    wait_for(is_given_up)  # the server itself may have a transaction open


@on_postgres
def test_a_gap_stays_while_an_older_transaction_is_open_beside_it(database: str, slow: Session) -> None:
    """The id that is missing may belong to it: only when it has ended is the gap given up."""
    slow.note("late", "A")
    with closing(Session(database)) as other:
        other.note("failed", "A")
        note(database, None, "B")
        roll(database)
        other.connection.rollback()
        roll(database)
        slow.connection.commit()
    assert roll(database) == 1
    assert moves(database, "move") == moves_by_hand(database)


@on_postgres
def test_two_that_roll_at_once_count_once(database: str) -> None:
    fill(database)
    roller = Roller(database)
    FSMRollupMark.objects.using(database).get_or_create(pk=1)
    with transaction.atomic(database):
        FSMRollupMark.objects.using(database).select_for_update().get(pk=1)
        counted: list[int] = []
        thread = threading.Thread(target=lambda: counted.append(_in_own_connection(database)))
        thread.start()
        thread.join(20)
    assert counted == [0]
    assert sum(roller.roll()) == 480


def _in_own_connection(database: str) -> int:
    try:
        return roll(database)
    finally:
        connections.close_all()


def test_many_that_roll_at_once_beside_a_writer_count_each_once(database: str) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                roll(database, 50)
        except BaseException as error:
            failures.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(150):
        note(database, None, "A", key=f"1:{number}:1")
    for thread in threads:
        thread.join(60)
    assert failures == []
    roll(database)
    assert moves(database, "move").total() == 150
    assert FSMRun.objects.using(database).count() == 150


def test_a_batch_that_fails_is_counted_the_next_time(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(database)
    roller = Roller(database, 100)
    with monkeypatch.context() as patch:
        patch.setattr(roller, "_add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(roller.roll())
    assert not FSMRun.objects.using(database).exists()
    assert roll(database) == 480
    assert moves(database, "move", "expiry") == moves_by_hand(database)


async def test_the_sweep_counts_what_the_storage_wrote(
    make_storage: Callable[..., Any], database: str, key: StorageKey
) -> None:
    storage = make_storage(history="full")
    await storage.set_state(key, "A")
    await storage.set_data(key, {"a": 1})
    await storage.set_state(key, "B")
    await storage.set_state(key, None)
    await in_thread(lambda: list(Sweeper(storage).sweep()))
    counted = await in_thread(lambda: [(f, t) for _, _, _, f, t in moves(database, "move")])
    assert sorted(counted, key=str) == sorted([(None, "A"), ("A", "B"), ("B", None)], key=str)


async def test_the_bot_counts_beside_its_handlers(make_storage: Callable[..., Any], database: str) -> None:
    expiry = Expiry(interval=0.05)
    storage = make_storage(expiry=expiry)
    async with running(expiry, storage), asyncio.timeout(60):
        for seed in (1, 2):
            await in_thread(fill, database, seed)
            expected = await in_thread(moves_by_hand, database)
            while (counted := await in_thread(moves, database, "move", "expiry")).total() < expected.total():
                await asyncio.sleep(0.05)
            assert counted == expected


def test_the_path_of_a_run_has_an_end() -> None:
    count = Count([])
    for number in range(100):
        before = f"S{number - 1}" if number else None
        count.add(Row(number + 1, "default", "1", 1, 1, 1, before, f"S{number}", START, "bot"))
    assert [len(path.states) for path, added in count.paths.items() if added] == [32]
