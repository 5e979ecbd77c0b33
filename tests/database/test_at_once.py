"""SQLite on the event loop's own thread: what goes there, what does not, and that nobody notices the difference."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.backends import at_once
from fsm_storage.exceptions import StorageTimeout, StorageUnavailable
from tests.conftest import SQLITE
from tests.loop_watch import watched_loop
from tests.rows import in_thread

pytestmark = pytest.mark.parametrize("database", [SQLITE], indirect=True)
Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


class Seen:
    """Which operations were carried out in which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = self.apart = 0
        at_once_, commit = DjangoStorage._at_once, DjangoStorage._commit

        def noted_at_once(storage: DjangoStorage, ops: Any) -> Any:
            replies = at_once_(storage, ops)
            self.here += len(ops) if replies is not None else 0
            return replies

        def noted_commit(storage: DjangoStorage, ops: Any, deadline: float) -> Any:
            self.apart += len(ops)
            return commit(storage, ops, deadline)

        monkeypatch.setattr(DjangoStorage, "_at_once", noted_at_once)
        monkeypatch.setattr(DjangoStorage, "_commit", noted_commit)

    def take(self) -> tuple[int, int]:
        """Return how many went here and how many apart, since the last call."""
        counts = self.here, self.apart
        self.here = self.apart = 0
        return counts


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


async def warm(storage: DjangoStorage) -> None:
    """Let the worker thread open what it opens, and come to rest."""
    await storage.get_state(chat(0))
    await idle(storage)


async def idle(storage: DjangoStorage) -> None:
    while any(batcher._is_busy for batcher in storage._writes):
        await asyncio.sleep(0.001)


@contextmanager
def other_process() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(connections["default"].settings_dict["NAME"], isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


async def test_only_the_first_operation_needs_the_thread(storage: DjangoStorage, seen: Seen) -> None:
    await warm(storage)
    assert seen.take() == (0, 1)
    for number in range(10):
        await storage.set_state(chat(number), "a")
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_state(chat(number)) == "a"
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (40, 0)


async def test_what_another_writer_holds_is_waited_for_in_the_thread(
    storage: DjangoStorage, seen: Seen
) -> None:
    await warm(storage)
    seen.take()
    with other_process() as other:
        async with watched_loop() as watch:
            other.execute("BEGIN IMMEDIATE")
            write = asyncio.ensure_future(storage.set_state(chat(1), "a"))
            later = asyncio.ensure_future(storage.set_state(chat(2), "a"))
            await asyncio.sleep(0.3)
            assert not write.done()
            assert await storage.get_state(chat(1)) is None  # reads wait for nobody
            other.execute("COMMIT")
            await asyncio.gather(write, later)
        assert watch.longest < 0.2
    assert seen.take() == (1, 2)
    await idle(storage)
    await storage.set_state(chat(1), "b")
    assert seen.take() == (1, 0)


async def test_a_lock_that_stays_is_a_clear_error(make_storage: Make) -> None:
    storage = make_storage(timeout=0.5)
    await warm(storage)
    with other_process() as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises((StorageTimeout, StorageUnavailable)):
            await storage.set_state(chat(1), "a")
        other.execute("COMMIT")
    await storage.set_state(chat(1), "b")
    assert await storage.get_state(chat(1)) == "b"


async def test_a_commit_that_waits_for_the_disk_is_left_to_the_thread(
    storage: DjangoStorage, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = connections["default"].settings_dict["OPTIONS"]
    full = options["init_command"].replace("synchronous=NORMAL", "synchronous=FULL")
    monkeypatch.setitem(options, "init_command", full)
    await warm(storage)
    seen.take()
    await storage.set_state(chat(1), "a")
    assert await storage.get_state(chat(1)) == "a"
    assert seen.take() == (1, 1)


async def test_who_watches_the_queries_sees_them(storage: DjangoStorage, seen: Seen, settings: Any) -> None:
    settings.DEBUG = True
    await warm(storage)
    await storage.set_state(chat(1), "a")
    assert await storage.get_state(chat(1)) == "a"
    assert seen.take() == (0, 3)


async def test_where_it_is_slow_the_thread_does_all(
    storage: DjangoStorage, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    await warm(storage)
    seen.take()
    monkeypatch.setattr(at_once, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(at_once, "PAUSE_SECONDS", 0.2)
    await storage.get_state(chat(1))
    await storage.get_state(chat(1))
    assert seen.take() == (1, 1)
    monkeypatch.setattr(at_once, "SLOW_SECONDS", 10.0)
    await asyncio.sleep(0.25)
    await storage.get_state(chat(1))
    assert seen.take() == (1, 0)


async def test_the_write_ahead_log_does_not_grow_for_ever(storage: DjangoStorage, seen: Seen) -> None:
    for number in range(3000):
        await storage.set_state(chat(number % 50), f"s{number}")
    here, apart = seen.take()
    assert here > 20 * apart > 0
    log = Path(f"{connections['default'].settings_dict['NAME']}-wal")
    assert log.stat().st_size < 64 * 2**20


async def test_a_poisoned_operation_fails_alone(storage: DjangoStorage) -> None:
    await warm(storage)
    await in_thread(
        lambda: (
            connections["default"]
            .cursor()
            .execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON fsm_storage_record WHEN NEW.state = 'bad' "
                "BEGIN SELECT RAISE(ABORT, 'no such thing'); END"
            )
        )
    )
    try:
        replies = await asyncio.gather(
            *(storage.set_state(chat(number), "bad" if number == 3 else "good") for number in range(6)),
            return_exceptions=True,
        )
    finally:
        await in_thread(lambda: connections["default"].cursor().execute("DROP TRIGGER refuse"))
    assert [type(reply).__name__ for reply in replies] == ["NoneType"] * 3 + ["InvalidData"] + [
        "NoneType"
    ] * 2
    assert [await storage.get_state(chat(number)) for number in (2, 3, 4)] == ["good", None, "good"]


async def test_closing_closes_the_connections(storage: DjangoStorage) -> None:
    await warm(storage)
    idle_ones = list(storage._near._idle)
    assert idle_ones
    await storage.close()
    assert not storage._near._idle
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        idle_ones[0].execute("SELECT 1")


def test_loops_in_several_threads_have_connections_of_their_own(storage: DjangoStorage, seen: Seen) -> None:
    wrong: list[object] = []

    async def work(who: int) -> None:
        for number in range(200):
            await storage.update_data(chat(who), {f"n{number}": number})
            await asyncio.sleep(0)
        data = await storage.get_data(chat(who))
        if len(data) != 200:
            wrong.append(data)

    threads = [threading.Thread(target=lambda who=who: asyncio.run(work(who))) for who in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    here, apart = seen.take()
    assert here + apart == 804
    assert here
