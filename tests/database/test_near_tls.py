"""Connections that an event loop drives itself, to a server that it talks to over TLS.

An older libpq (18.0 is one, 18.6 is not) leaves in OpenSSL what of a record it had no room for, and no event tells of
it. With `PSYCOPG_IMPL=python` all this runs on the machine's libpq, in place of the one that psycopg brings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.backends import line as line_module
from fsm_storage.backends.line import Line
from tests.conftest import POSTGRES
from tests.database.test_near import Seen, chat
from tests.database.tls_wire import TlsWire

pytestmark = pytest.mark.parametrize("database", [POSTGRES], indirect=True)
LARGE = (65536,)
ANY_RECORDS = pytest.mark.parametrize("sizes", [(300, 7, 299), LARGE], ids=["small", "large"])


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def sizes() -> Sequence[int]:
    """How large the server's records are, by turns."""
    return LARGE


@pytest.fixture
def wire(
    database: str,
    sizes: Sequence[int],
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[TlsWire]:
    """What stands before the database, for connections that are opened from now on."""
    settings = connections[database].settings_dict
    root = tmp_path / "root.pem"
    authority.cert_pem.write_to_path(str(root))
    wire = TlsWire(f"{settings['HOST']}/.s.PGSQL.{settings['PORT'] or 5432}", authority, sizes)
    monkeypatch.setitem(settings, "HOST", "127.0.0.1")
    monkeypatch.setitem(settings, "PORT", wire.port)
    monkeypatch.setitem(settings, "OPTIONS", {"sslmode": "verify-ca", "sslrootcert": str(root)})
    yield wire
    wire.close()


@pytest.fixture
def storage(wire: TlsWire, make_storage: Callable[..., DjangoStorage]) -> Iterator[DjangoStorage]:
    storage = make_storage(timeout=20)
    yield storage
    storage.shut()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Why plans were given up; also those whose time was up."""
    faults: list[Exception] = []
    fail = Line._fail

    def noted(line: Line, error: Exception) -> None:
        if line._plan is not None:
            faults.append(error)
        fail(line, error)

    monkeypatch.setattr(Line, "_fail", noted)
    return faults


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read but what an event tells of."""
    monkeypatch.setattr(line_module, "LOOK_AGAIN_SECONDS", 60.0)


class Hoarder:
    """Passes for an older libpq: the end of each reply is only there when it was asked for so often once more."""

    def __init__(self, pgconn: Any, times: int) -> None:
        self._pgconn, self._times = pgconn, times
        self._left = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("send_"):
            self._left = self._times
        return getattr(self._pgconn, name)

    def consume_input(self) -> None:
        if self._left and not self._pgconn.is_busy():
            self._left -= 1
        self._pgconn.consume_input()

    def is_busy(self) -> bool:
        return bool(self._pgconn.is_busy() or self._left)


async def hoard(storage: DjangoStorage, seen: Seen, times: int) -> None:
    """Open connections, and have their libpq pass for an older one."""
    await warm(storage, seen)
    lines: list[Any] = [line for line, _ in storage._carrier._near._idle]
    for line in lines:
        line._pgconn = Hoarder(line._pgconn, times)


async def warm(storage: DjangoStorage, seen: Seen) -> None:
    """Have as many connections opened as 64 chats use at a time."""
    async with asyncio.timeout(60):
        seen.take()
        while True:
            writes = [storage.set_state(chat(number), "warm") for number in range(64)]
            await asyncio.gather(*writes, *(storage.get_state(chat(number)) for number in range(64)))
            if seen.take() == (128, 0):
                return


async def test_the_loop_drives_connections_that_are_encrypted(storage: DjangoStorage, seen: Seen) -> None:
    await warm(storage, seen)
    lines: list[Any] = [line for line, _ in storage._carrier._near._idle]
    assert lines
    assert all(line._pgconn.ssl_in_use and line._is_encrypted for line in lines)
    await storage.set_state(chat(1), "a")
    await storage.update_data(chat(1), {"n": 1})
    assert await storage.get_state(chat(1)) == "a"
    assert await storage.get_data(chat(1)) == {"n": 1}
    assert seen.take() == (4, 0)


@ANY_RECORDS
@pytest.mark.usefixtures("no_clock")
async def test_data_of_any_size_goes_and_comes_whole(
    storage: DjangoStorage, seen: Seen, faults: list[Exception]
) -> None:
    await warm(storage, seen)
    for count, size in ((64, 10), (64, 9000), (64, 20_000), (8, 300_000)):
        data: list[dict[str, Any]] = [{"text": "x" * (size + number), "n": number} for number in range(count)]
        merged = await asyncio.gather(*(storage.update_data(chat(one["n"]), one) for one in data))
        assert merged == data
        assert await asyncio.gather(*(storage.get_data(chat(number)) for number in range(count))) == data
        assert seen.take() == (2 * count, 0)
    assert not faults


@pytest.mark.usefixtures("no_clock")
async def test_records_that_an_older_libpq_has_no_room_for(
    storage: DjangoStorage, seen: Seen, faults: list[Exception]
) -> None:
    await warm(storage, seen)
    # Three records to a buffer of 16 KB, in which there is the beginning of a row when the last one comes.
    data = [{"text": "x" * 5750, "n": number} for number in range(8)]
    await asyncio.gather(*(storage.set_data(chat(number), one) for number, one in enumerate(data)))
    for _ in range(3):
        assert await asyncio.gather(*(storage.get_data(chat(number)) for number in range(8))) == data
    assert seen.take() == (32, 0)
    assert not faults


@pytest.mark.usefixtures("no_clock")
async def test_what_libpq_left_in_openssl_is_asked_for(
    storage: DjangoStorage, seen: Seen, faults: list[Exception]
) -> None:
    await hoard(storage, seen, times=1)
    for number in range(10):
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (20, 0)
    assert not faults


async def test_what_it_left_of_a_record_that_came_meanwhile_does_not_wait_for_the_timeout(
    storage: DjangoStorage, seen: Seen, faults: list[Exception]
) -> None:
    await hoard(storage, seen, times=2)
    for number in range(4):
        await storage.update_data(chat(number), {"n": number})
        assert await storage.get_data(chat(number)) == {"n": number}
    assert seen.take() == (8, 0)
    assert not faults


@ANY_RECORDS
@pytest.mark.usefixtures("no_clock")
async def test_conversations_go_on_at_the_same_time(
    storage: DjangoStorage, seen: Seen, faults: list[Exception]
) -> None:
    async def converse(number: int) -> None:
        for turn in range(5):
            await storage.set_state(chat(number), f"s{turn}")
            text = "x" * (number * 500 + turn)
            await storage.update_data(chat(number), {f"t{turn}": turn, "text": text})
            expected = {**{f"t{one}": one for one in range(turn + 1)}, "text": text}
            assert await storage.get_data(chat(number)) == expected
            assert await storage.get_state(chat(number)) == f"s{turn}"

    await warm(storage, seen)
    await asyncio.gather(*(converse(number) for number in range(64)))
    assert seen.take() == (64 * 5 * 4, 0)
    assert not faults


@ANY_RECORDS
async def test_reads_whose_reply_is_cut_are_answered_by_the_thread(
    storage: DjangoStorage, wire: TlsWire, seen: Seen, faults: list[Exception]
) -> None:
    data: list[dict[str, Any]] = [{"text": "x" * 40_000, "n": number} for number in range(8)]
    await asyncio.gather(*(storage.set_data(chat(one["n"]), one) for one in data))
    await warm(storage, seen)
    wire.cut_within_reply(longer_than=100_000)
    assert await asyncio.gather(*(storage.get_data(chat(number)) for number in range(8))) == data
    assert (wire.cuts, len(faults)) == (1, 1)
    assert seen.take() == (0, 8)
    await warm(storage, seen)


@ANY_RECORDS
async def test_writes_whose_reply_is_cut_are_not_lost(
    storage: DjangoStorage, wire: TlsWire, seen: Seen, faults: list[Exception]
) -> None:
    await asyncio.gather(*(storage.set_data(chat(number), {"n": number}) for number in range(8)))
    await warm(storage, seen)
    wire.cut_within_reply(longer_than=0)
    text = "x" * 40_000
    merged = await asyncio.gather(*(storage.update_data(chat(number), {"text": text}) for number in range(8)))
    assert merged == [{"n": number, "text": text} for number in range(8)]
    assert wire.cuts == 1
    assert faults
    assert seen.take()[1] > 0
    assert await asyncio.gather(*(storage.get_data(chat(number)) for number in range(8))) == merged
    await warm(storage, seen)
