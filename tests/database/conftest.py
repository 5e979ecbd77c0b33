"""Fixtures for tests of effects: processes, more databases, and a look at the worker's statements."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from django.conf import settings
from django.core.management import call_command
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.test import override_settings

from fsm_storage.exceptions import StorageTimeout, StorageUnavailable
from tests.conftest import NO_MARIADB, SKIP_MARIADB
from tests.database.routing import OneDatabase
from tests.servers import Mariadb, Postgres, start_child

T = TypeVar("T")


class Launcher:
    """Starts writers in processes of their own, and knows how they ended."""

    def __init__(self) -> None:
        self._process = start_child("tests.database.launcher")
        self._statuses: dict[int, int] = {}

    def start(self, writer: str, *arguments: Any) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([writer, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._read_until(lambda words: len(words) == 1)

    def wait(self, pid: int) -> int:
        """Wait for the end of a writer and return its exit status."""
        while pid not in self._statuses:
            self._read_until(lambda words: len(words) == 2)
        return self._statuses[pid]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid) == -signal.SIGKILL

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(20)
        self._process.stdout.close()  # type: ignore[union-attr]
        self._process.stderr.close()  # type: ignore[union-attr]

    def _read_until(self, is_it: Callable[[list[str]], bool]) -> int:
        while True:
            words = self._process.stdout.readline().split()  # type: ignore[union-attr]
            if not words:
                self._process.kill()
                raise AssertionError(self._process.communicate()[1])
            if len(words) == 2:
                self._statuses[int(words[0])] = int(words[1])
            if is_it(words):
                return int(words[0])


@pytest.fixture(scope="session")
def launcher(django_db_setup: None) -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@contextmanager
def another_database(alias: str, like: str, **changes: Any) -> Iterator[str]:
    """Add a database to Django's, which no test case flushes."""
    connections.settings[alias] = {**copy.deepcopy(connections.settings[like]), **changes}
    try:
        yield alias
    finally:
        connections[alias].close()
        del connections[alias]
        del connections.settings[alias]


@pytest.fixture(scope="session")
def own_postgres(django_db_setup: None) -> Iterator[Postgres]:
    """A PostgreSQL that a test may stop and kill."""
    server = Postgres(settings.TEST_DIR / "own")
    yield server
    server.remove()


@pytest.fixture(scope="session")
def own_mariadb(django_db_setup: None) -> Iterator[Mariadb]:
    """A MariaDB that a test may stop and kill, and which keeps what it acknowledged."""
    if NO_MARIADB:
        pytest.fail(NO_MARIADB)
    server = Mariadb(settings.TEST_DIR / "own_mariadb")
    yield server
    server.remove()


@pytest.fixture(params=["postgres", pytest.param("mariadb", marks=SKIP_MARIADB)])
def own_server(request: pytest.FixtureRequest) -> Postgres | Mariadb:
    """A server that a test may stop and kill; `own_database` is on it."""
    server: Postgres | Mariadb = request.getfixturevalue(f"own_{request.param}")
    return server


@pytest.fixture
def own_database(own_server: Postgres | Mariadb, django_db_blocker: Any) -> Iterator[str]:
    """Not for a test with a `django_db` mark, which would forbid a database that it does not know."""
    like = "postgres" if isinstance(own_server, Postgres) else "mariadb"
    own_server.create_database("own")
    with (
        django_db_blocker.unblock(),
        another_database("own", like, HOST=own_server.host, NAME="own") as alias,
    ):
        call_command("migrate", "fsm_storage", database=alias, verbosity=0)
        connections[alias].close()
        yield alias


class Statements:
    """The statements of the storages' worker threads, and a gate that holds them up."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.connections = 0
        self._gate = threading.Event()
        self._gate.set()
        self._held = threading.Event()
        self._only = ""

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if self._only in threading.current_thread().name:
            self._held.set()
            assert self._gate.wait(30)
        self.seen.append(sql)
        return execute(sql, params, many, context)

    def watch(self, connection: BaseDatabaseWrapper) -> None:
        if threading.current_thread().name.startswith("fsm_storage"):
            connection.execute_wrappers.append(self)

    def connected(self, connection: BaseDatabaseWrapper, **_: Any) -> None:
        self.connections += threading.current_thread().name.startswith("fsm_storage")

    @contextmanager
    def held(self, only: str = "") -> Iterator[None]:
        """Let no statement through, so that operations gather behind the one that comes first.

        `only`: hold up the threads with this in their names.
        """
        self._only = only
        self._held.clear()
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def someone_is_held(self) -> bool:
        return self._held.is_set()


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Iterator[Statements]:
    """Ask for it before the first operation: it reaches the connections that are made from then on."""
    statements = Statements()
    create = connections.create_connection

    def create_watched(alias: str) -> BaseDatabaseWrapper:
        connection = create(alias)
        statements.watch(connection)
        return connection

    monkeypatch.setattr(connections, "create_connection", create_watched)
    connection_created.connect(statements.connected)
    yield statements
    connection_created.disconnect(statements.connected)


@pytest.fixture
def user(database: str) -> Iterator[Any]:
    """A superuser, in a project that keeps everything in `database`. For a test on a database that is `whole`."""
    from django.contrib.auth.models import User
    from django.contrib.contenttypes.models import ContentType

    OneDatabase.database = database
    with override_settings(DATABASE_ROUTERS=["tests.database.routing.OneDatabase"]):
        ContentType.objects.clear_cache()
        yield User.objects.create_superuser("agent")
    ContentType.objects.clear_cache()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)


async def in_time(ask: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Ask a storage with this short timeout; again if it was used up, for 5 s: a busy machine stands still for longer.

    An error that comes sooner is the answer.
    """
    deadline = time.monotonic() + 5
    while True:
        began = time.monotonic()
        try:
            return await ask()
        except (StorageTimeout, StorageUnavailable):
            if time.monotonic() - began < timeout / 2 or time.monotonic() > deadline:
                raise
