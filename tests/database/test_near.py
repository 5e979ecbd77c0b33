"""Connections that an event loop drives itself: what goes there, what does not, and that nobody notices."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.backends import here, near
from fsm_storage.backends.carrying import Carrier
from fsm_storage.exceptions import StorageTimeout, StorageUnavailable
from tests.conftest import POSTGRES, SQLITE
from tests.database.conftest import in_time
from tests.loop_watch import watched_loop
from tests.rows import OtherSession, drop_connections, in_thread

ONLY_SQLITE = pytest.mark.parametrize("database", [SQLITE], indirect=True)
ONLY_POSTGRES = pytest.mark.parametrize("database", [POSTGRES], indirect=True)
BOTH = pytest.mark.parametrize("database", [SQLITE, POSTGRES], indirect=True)
Make = Callable[..., DjangoStorage]


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


class Seen:
    """Which operations were carried out in which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = self.apart = 0
        lock = threading.Lock()
        drive, work = Carrier._drive, Carrier._work

        def noted_drive(carrier: Carrier, ops: Any, done: Any) -> bool:
            def noted_done(replies: Any) -> None:
                with lock:
                    self.here += len(ops) if replies is not None else 0
                done(replies)

            return drive(carrier, ops, noted_done)

        def noted_work(carrier: Carrier, ops: Any, deadline: float) -> Any:
            with lock:
                self.apart += len(ops)
            return work(carrier, ops, deadline)

        monkeypatch.setattr(Carrier, "_drive", noted_drive)
        monkeypatch.setattr(Carrier, "_work", noted_work)

    def take(self) -> tuple[int, int]:
        """Return how many went here and how many apart, since the last call."""
        counts = self.here, self.apart
        self.here = self.apart = 0
        return counts


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture(autouse=True)
def _never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is now, the loop's own connection goes on."""
    monkeypatch.setattr(here, "SLOW_SECONDS", 60.0)


async def warm(storage: DjangoStorage) -> None:
    """Let the worker threads open what they open, and come to rest."""
    await storage.get_state(chat(0))
    await idle(storage)


async def idle(storage: DjangoStorage) -> None:
    while storage._carrier._near.is_held or not (
        storage._carrier._near._opened or storage._carrier._near._not_before
    ):
        await asyncio.sleep(0.001)


@contextmanager
def other_process() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(connections["default"].settings_dict["NAME"], isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def end_all(_django_db_marker: None) -> Iterator[Callable[[], int]]:
    """Have the server end every other connection."""
    yield partial(drop_connections, "postgres")
    connections["postgres"].close()  # that of this thread, with which the tables are emptied, was ended too


@ONLY_SQLITE
async def test_only_the_first_operation_needs_the_thread(storage: DjangoStorage, seen: Seen) -> None:
    await warm(storage)
    assert seen.take() == (0, 1)
    for number in range(10):
        await storage.set_state(chat(number), "a")
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_state(chat(number)) == "a"
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (40, 0)


@ONLY_SQLITE
async def test_what_another_writer_holds_is_waited_for_in_the_thread(
    storage: DjangoStorage, seen: Seen
) -> None:
    await warm(storage)
    seen.take()
    with other_process() as other:
        other.execute("BEGIN IMMEDIATE")
        write = asyncio.ensure_future(storage.set_state(chat(1), "a"))
        later = asyncio.ensure_future(storage.set_state(chat(2), "a"))
        await asyncio.sleep(0.3)  # a loop that waited itself would stand still until the timeout
        assert not write.done()
        assert await storage.get_state(chat(1)) is None  # reads wait for nobody
        other.execute("COMMIT")
        await asyncio.gather(write, later)
    assert seen.take() == (1, 2)
    await idle(storage)
    await storage.set_state(chat(1), "b")
    assert seen.take() == (1, 0)


@ONLY_SQLITE
async def test_a_lock_that_stays_is_a_clear_error(make_storage: Make) -> None:
    storage = make_storage(timeout=0.5)
    await in_time(lambda: warm(storage), 0.5)
    with other_process() as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises((StorageTimeout, StorageUnavailable)):
            await storage.set_state(chat(1), "a")
        other.execute("COMMIT")
    await in_time(lambda: storage.set_state(chat(1), "b"), 0.5)
    assert await in_time(lambda: storage.get_state(chat(1)), 0.5) == "b"


@ONLY_SQLITE
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


@BOTH
async def test_who_watches_the_queries_sees_them(storage: DjangoStorage, seen: Seen, settings: Any) -> None:
    settings.DEBUG = True
    await warm(storage)
    await storage.set_state(chat(1), "a")
    assert await storage.get_state(chat(1)) == "a"
    assert seen.take() == (0, 3)


@ONLY_SQLITE
async def test_where_it_is_slow_the_thread_does_all(
    storage: DjangoStorage, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    await warm(storage)
    seen.take()
    [(connection, _)] = storage._carrier._near._idle
    monkeypatch.setattr(here, "SLOW_SECONDS", 0.0)
    await storage.get_state(chat(1))
    await storage.get_state(chat(1))
    assert seen.take() == (1, 1)
    monkeypatch.setattr(here, "SLOW_SECONDS", 10.0)
    connection._paused_until -= here.PAUSE_SECONDS  # type: ignore[attr-defined] # so much time has passed
    await storage.get_state(chat(1))
    assert seen.take() == (1, 0)


def log_length() -> int:
    return Path(f"{connections['default'].settings_dict['NAME']}-wal").stat().st_size


@ONLY_SQLITE
@pytest.mark.loop_gap(3)  # however slow this machine's disk is now
@pytest.mark.parametrize(("count", "size"), [(3000, 10), (400, 200_000)])
async def test_the_write_ahead_log_does_not_grow_for_ever(
    storage: DjangoStorage, seen: Seen, count: int, size: int
) -> None:
    for number in range(count):
        await storage.set_state(chat(number % 50), f"s{number}")
        await storage.set_data(chat(number % 50), {"text": "x" * size, "number": number})
    here, apart = seen.take()
    assert here > 20 * apart > 0
    assert log_length() < 20 * 2**20


@ONLY_SQLITE
@pytest.mark.loop_gap(3)
async def test_a_log_that_a_reader_keeps_from_beginning_anew_does_not_send_all_to_the_thread(
    storage: DjangoStorage, seen: Seen
) -> None:
    await warm(storage)
    with other_process() as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM fsm_storage_record").fetchall()
        for number in range(300):
            await storage.set_data(chat(number % 50), {"text": "x" * 200_000, "number": number})
        assert log_length() > 30 * 2**20
        here, apart = seen.take()
        assert here > 3 * apart > 0
        other.execute("COMMIT")
    for number in range(200):
        await storage.set_data(chat(number % 50), {"text": "x" * 200_000, "number": number})
    assert log_length() < 20 * 2**20


@ONLY_SQLITE
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


@ONLY_SQLITE
async def test_closing_closes_the_connections(storage: DjangoStorage) -> None:
    await warm(storage)
    [(connection, _)] = storage._carrier._near._idle
    await storage.close()
    assert not storage._carrier._near._idle
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection._connection.execute("SELECT 1")  # type: ignore[attr-defined]


@BOTH
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


@ONLY_POSTGRES
async def test_postgresql_needs_the_thread_for_the_first_operations_only(
    storage: DjangoStorage, seen: Seen
) -> None:
    await opened(storage)
    seen.take()
    for number in range(10):
        await storage.set_state(chat(number), "a")
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_state(chat(number)) == "a"
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (40, 0)


async def opened(storage: DjangoStorage) -> None:
    """Wait for the first connection; ask again where none was opened after all."""
    while True:
        await storage.get_state(chat(0))
        for _ in range(1000):
            if storage._carrier._near._idle:
                return
            await asyncio.sleep(0.001)


@BOTH
async def test_where_none_could_be_opened_it_is_tried_again_later(
    storage: DjangoStorage, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "PAUSE_SECONDS", 0.2)
    connect = near.Near._connect
    monkeypatch.setattr(near.Near, "_connect", lambda *args: None)
    for _ in range(3):
        await storage.get_state(chat(1))
    assert seen.take() == (0, 3)
    monkeypatch.setattr(near.Near, "_connect", connect)
    await asyncio.sleep(0.25)
    await opened(storage)
    seen.take()
    await storage.get_state(chat(1))
    assert seen.take() == (1, 0)


@ONLY_POSTGRES
async def test_more_than_a_socket_takes_at_a_time(make_storage: Make, seen: Seen) -> None:
    storage = make_storage(timeout=30)
    await opened(storage)
    seen.take()
    text = "x" * 40_000
    async with watched_loop() as watch:
        await asyncio.gather(*(storage.update_data(chat(n), {"text": text, "n": n}) for n in range(300)))
    found = await asyncio.gather(*(storage.get_data(chat(n)) for n in range(300)))
    assert found == [{"text": text, "n": n} for n in range(300)]
    assert seen.take()[0] > 300
    assert watch.longest < 0.5


@ONLY_POSTGRES
@pytest.mark.parametrize("history", ["off", "states", "full"])
async def test_connections_that_the_server_ends_are_replaced(
    make_storage: Make, seen: Seen, history: str, end_all: Callable[[], int]
) -> None:
    storage = make_storage(history=history, timeout=20)
    await opened(storage)
    for round_ in range(5):
        writes = [asyncio.ensure_future(storage.update_data(chat(n), {f"r{round_}": n})) for n in range(100)]
        await asyncio.sleep(0.001 * round_)
        await in_thread(end_all)
        await asyncio.gather(*writes)
    for n in range(100):
        assert await storage.get_data(chat(n)) == {f"r{round_}": n for round_ in range(5)}
    await opened(storage)
    seen.take()
    assert await storage.get_state(chat(1)) is None
    assert seen.take() == (1, 0)


@ONLY_POSTGRES
async def test_a_server_that_does_not_answer_is_a_clear_error_and_then_it_works_again(
    make_storage: Make, seen: Seen
) -> None:
    storage = make_storage(timeout=3.0)
    await storage.set_state(chat(1), "a")
    await opened(storage)
    other = OtherSession("postgres")
    other.execute("LOCK TABLE fsm_storage_record IN ACCESS EXCLUSIVE MODE")
    began = time.monotonic()
    asked = [asyncio.ensure_future(storage.get_state(chat(1)))]
    await asyncio.sleep(0.1)
    asked += [asyncio.ensure_future(storage.get_data(chat(n))) for n in range(3)]
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(error) for error in errors} <= {StorageTimeout, StorageUnavailable}
    assert time.monotonic() - began < 5.8  # not twice the timeout
    other.rollback()
    other.close()
    assert await storage.get_state(chat(1)) == "a"


@ONLY_POSTGRES
async def test_a_held_record_is_left_to_the_thread_and_the_others_go_on(
    make_storage: Make, seen: Seen
) -> None:
    storage = make_storage(timeout=30)
    await asyncio.gather(*(storage.set_state(chat(n), "before") for n in range(10)))
    await opened(storage)
    other = OtherSession("postgres")
    other.execute("UPDATE fsm_storage_record SET state = 'held' WHERE chat_id = 3")
    writes = [asyncio.ensure_future(storage.set_state(chat(n), "after")) for n in range(10)]
    await asyncio.wait([write for n, write in enumerate(writes) if n != 3])
    seen.take()
    for _ in range(5):
        await storage.set_state(chat(4), "later")
    assert seen.take()[0] == 5
    assert not writes[3].done()
    other.rollback()
    other.close()
    await asyncio.gather(*writes)
    assert await storage.get_state(chat(3)) == "after"


@ONLY_POSTGRES
async def test_where_a_pooler_swaps_connections_nothing_is_prepared(
    storage: DjangoStorage, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections["postgres"].settings_dict, "DISABLE_SERVER_SIDE_CURSORS", True)
    await opened(storage)
    seen.take()
    for number in range(10):
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (20, 0)
    assert all(not line._names for line, _ in storage._carrier._near._idle)  # type: ignore[attr-defined]


@ONLY_POSTGRES
def test_a_loop_that_ends_in_mid_write_takes_no_connection_with_it(storage: DjangoStorage) -> None:
    async def main() -> None:
        await opened(storage)
        left = [asyncio.ensure_future(storage.set_state(chat(n), "a")) for n in range(50)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert storage._carrier._near._lent
        assert not any(task.done() for task in left)

    for _ in range(3):
        asyncio.run(main())
    storage.shut()
    assert not storage._carrier._near._idle
    assert not storage._carrier._near._lent


@ONLY_POSTGRES
async def test_one_that_the_server_ends_while_it_is_idle_is_known_before_the_next_operation(
    storage: DjangoStorage, seen: Seen, end_all: Callable[[], int]
) -> None:
    await opened(storage)
    await storage.get_state(chat(1))
    [(line, _)] = storage._carrier._near._idle
    await in_thread(end_all)
    async with asyncio.timeout(10):
        while line.is_usable:
            await asyncio.sleep(0.001)
    # The end of a stream can be read for ever: a loop that went on to watch it would go round and round.
    assert not asyncio.get_running_loop().remove_reader(line._socket)  # type: ignore[attr-defined]
    seen.take()
    assert await storage.get_state(chat(1)) is None
    assert seen.take() == (0, 1)
    await opened(storage)
    seen.take()
    await storage.get_state(chat(1))
    assert seen.take() == (1, 0)


@ONLY_POSTGRES
def test_the_next_loop_goes_on_with_the_connections_of_one_that_was_closed(
    storage: DjangoStorage, seen: Seen
) -> None:
    asyncio.run(opened(storage))
    seen.take()
    for _ in range(5):
        assert asyncio.run(storage.get_state(chat(1))) is None  # type: ignore[arg-type]
    assert seen.take() == (5, 0)
    assert storage._carrier._near._opened == 1
    storage.shut()


@ONLY_POSTGRES
def test_a_loop_that_is_not_closed_keeps_its_connection_and_shutting_takes_it(
    storage: DjangoStorage, seen: Seen
) -> None:
    loops = [asyncio.new_event_loop() for _ in range(2)]
    for loop in loops:
        loop.run_until_complete(opened_for(storage))
        seen.take()
        loop.run_until_complete(read(storage))
        assert seen.take() == (1, 0)
    sockets = [line._socket.fileno() for line, _ in storage._carrier._near._idle]  # type: ignore[attr-defined]
    assert len(sockets) == storage._carrier._near._opened == 2
    storage.shut()
    for loop in loops:
        assert not any(loop.remove_reader(socket) for socket in sockets)
        loop.close()


async def opened_for(storage: DjangoStorage) -> None:
    """Wait for a connection that this loop may use."""
    while not any(line.may_serve(asyncio.get_running_loop()) for line, _ in storage._carrier._near._idle):
        await read(storage)


async def read(storage: DjangoStorage) -> None:
    await storage.get_state(chat(1))


@ONLY_POSTGRES
async def test_closing_takes_the_sockets_out_of_the_loop(storage: DjangoStorage) -> None:
    await opened(storage)
    await asyncio.gather(*(storage.set_state(chat(n), "a") for n in range(20)))
    await asyncio.gather(*(storage.get_state(chat(n)) for n in range(20)))
    sockets = [line._socket.fileno() for line, _ in storage._carrier._near._idle]  # type: ignore[attr-defined]
    assert sockets
    await storage.close()
    assert not any(asyncio.get_running_loop().remove_reader(socket) for socket in sockets)


@ONLY_POSTGRES
async def test_an_ended_connection_that_a_forked_child_still_has_does_not_keep_the_loop_busy(
    storage: DjangoStorage, end_all: Callable[[], int]
) -> None:
    await opened(storage)
    await storage.get_state(chat(1))
    [(line, _)] = storage._carrier._near._idle
    childs = os.dup(line._pgconn.socket)  # type: ignore[attr-defined]
    try:
        await in_thread(end_all)
        async with asyncio.timeout(10):
            while line.is_usable:
                await asyncio.sleep(0.001)
        began = time.thread_time()
        await asyncio.sleep(0.3)
        assert time.thread_time() - began < 0.1
    finally:
        os.close(childs)


class Wire:
    """Carries bytes between a TCP port and a PostgreSQL, until it is cut."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def cut(self) -> None:
        """Leave the server, and tell the clients that nothing more will come; but take nothing more from them."""
        for server in self._servers:
            server.shutdown(socket.SHUT_RDWR)
        for client in self._clients:
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for one in (*self._clients, *self._servers):
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._clients.append(client)
                self._servers.append(server)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while some := source.recv(65536):
                sink.sendall(some)


@ONLY_POSTGRES
@pytest.mark.loop_gap(3)  # it sends 24 MB in one turn
async def test_a_connection_that_is_lost_in_the_midst_of_sending_is_left_to_the_thread(
    make_storage: Make, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = connections["postgres"].settings_dict
    wire = Wire(f"{settings['HOST']}/.s.PGSQL.{settings['PORT'] or 5432}")
    monkeypatch.setitem(settings, "HOST", "127.0.0.1")
    monkeypatch.setitem(settings, "PORT", wire.port)
    storage = make_storage(timeout=30.0)
    await opened(storage)
    for _ in range(3):
        await asyncio.gather(*(storage.set_state(chat(n), "a") for n in range(9)))
    seen.take()
    began = time.monotonic()
    writes = [asyncio.ensure_future(storage.set_data(chat(n), {"text": "x" * 400_000})) for n in range(60)]
    async with asyncio.timeout(10):
        while not any(line._has_writer for line in storage._carrier._near._lent):  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    wire.cut()
    await asyncio.gather(*writes)
    assert time.monotonic() - began < 20
    assert seen.take()[1] > 0
    await storage.close()
    wire.close()
