"""Fixtures for all tests: databases, storages that are closed in time, and a watch on the event loop."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import shutil
import signal
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from importlib import import_module
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.db import connections

from fsm_storage.backends.carrying import Carrier
from fsm_storage.backends.django import DjangoStorage
from fsm_storage.conf import storages
from fsm_storage.isolation import DjangoEventIsolation
from tests.loop_watch import watched_loop
from tests.servers import Mariadb, Postgres, RedisServer, missing_for_mariadb

pytest.register_assert_rewrite("tests.contract")

MAX_LOOP_GAP = 1.0
"""Shared machines stand still for half a second by themselves; a test of a promise marks its own limit."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "loop_gap(seconds): the loop of this test may stand still for so long")
    # As its entry point does once the package is installed.
    if not config.pluginmanager.has_plugin("fsm_storage"):
        config.pluginmanager.register(import_module("fsm_storage.pytest_plugin"), "fsm_storage")
    # Or a session that is ended from outside would leave its servers running.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 128 + signal.SIGTERM))


def on(alias: str) -> Any:
    """Return the parameter for a test on one database, with committed rows and only our own tables flushed."""
    mark = pytest.mark.django_db(transaction=True, databases=[alias], available_apps=["fsm_storage"])
    return pytest.param(alias, id="sqlite" if alias == "default" else alias, marks=mark)


SQLITE, POSTGRES, POSTGRES16 = on("default"), on("postgres"), on("postgres16")
NO_MARIADB = missing_for_mariadb()
# In CI a missing server is a failure: see `database`.
SKIP_MARIADB = pytest.mark.skipif(bool(NO_MARIADB) and "CI" not in os.environ, reason=NO_MARIADB)
MARIADB = pytest.param("mariadb", marks=SKIP_MARIADB) if NO_MARIADB else on("mariadb")


@pytest.fixture(params=[SQLITE, POSTGRES, MARIADB])
def database(request: pytest.FixtureRequest) -> str:
    """Each real database in turn, by its alias in DATABASES; a storage with the same alias is configured."""
    alias: str = request.param
    if alias == "mariadb" and NO_MARIADB:
        pytest.fail(NO_MARIADB)
    return alias


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """The PostgreSQL of the database "postgres". Not to be stopped: see `own_postgres`."""
    server = Postgres(django_settings.TEST_DIR / "pg")
    server.configure(
        fsync="off"
    )  # what a killed server wrote survives all the same; a power cut is not tested
    django_settings.DATABASES["postgres"]["HOST"] = server.host
    yield server
    server.remove()


@pytest.fixture(scope="session")
def postgres16_server() -> Iterator[Postgres]:
    """An older PostgreSQL, for the contract of the storage."""
    server = Postgres(django_settings.TEST_DIR / "pg16", version=16)
    server.configure(fsync="off")
    django_settings.DATABASES["postgres16"]["HOST"] = server.host
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis for all tests. Not to be stopped."""
    server = RedisServer(django_settings.TEST_DIR / "redis")
    yield server
    server.remove()


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Mariadb]:
    """The MariaDB of the database "mariadb". Not to be stopped: see `own_mariadb`."""
    server = Mariadb(
        django_settings.TEST_DIR / "mariadb", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"
    )
    django_settings.DATABASES["mariadb"]["HOST"] = server.host
    yield server
    server.remove()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def django_db_modify_db_settings(request: pytest.FixtureRequest) -> None:
    """Start the servers before pytest-django makes the test databases, those that a test of this run asks for."""
    for alias in ("postgres", "postgres16", "mariadb"):
        if any(_needs(item, alias) for item in request.session.items):
            request.getfixturevalue(f"{alias}_server")


def _needs(item: pytest.Item, alias: str) -> bool:
    mark = item.get_closest_marker("django_db")
    wanted = mark.kwargs.get("databases") if mark else getattr(getattr(item, "cls", None), "databases", None)
    return wanted == "__all__" or alias in (wanted or ())


def pytest_unconfigure() -> None:
    if not django_settings.IS_CHILD:
        shutil.rmtree(django_settings.TEST_DIR, ignore_errors=True)


_opened: weakref.WeakSet[Carrier] = weakref.WeakSet()


@pytest.fixture(autouse=True, scope="session")
def _note_opened_storages() -> Iterator[None]:
    """Note what outlives a storage that nobody holds any more: its threads, and so its connections."""
    init = Carrier.__init__

    def noted(self: Carrier, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _opened.add(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(Carrier, "__init__", noted)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _close_storages(_django_db_marker: None) -> Iterator[None]:
    """Close every storage of a test before its tables are flushed, or the worker's connection is in the way."""
    yield
    storages.close_all()
    for carrier in list(_opened):
        # Or a thread that a busy machine holds up would write into the next test's tables.
        carrier._timeout = 30.0
        carrier.shut()
    _opened.clear()


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports() -> None:
    """A full collection over all that aiogram and Django load stops an event loop for 0.1 to 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_storage(database: str) -> Callable[..., DjangoStorage]:
    """Make a storage on `database`, by any options, which counts as the configured one of its alias."""

    def make(**options: Any) -> DjangoStorage:
        storage = DjangoStorage(**{"alias": database, "database": database, **options})
        storages[storage.alias] = storage
        return storage

    return make


@pytest.fixture
def storage(make_storage: Callable[..., DjangoStorage]) -> DjangoStorage:
    return make_storage()


@pytest.fixture
async def isolate(storage: Any) -> AsyncIterator[Callable[..., DjangoEventIsolation]]:
    """Make isolations on `storage`, each an owner of its own, as in processes of their own."""
    made: list[DjangoEventIsolation] = []

    def make(**options: Any) -> DjangoEventIsolation:
        made.append(DjangoEventIsolation(storage=storage, **options))
        return made[-1]

    yield make
    for isolation in made:
        await isolation.close()


@pytest.fixture
def key() -> StorageKey:
    return StorageKey(bot_id=42, chat_id=-100200300, user_id=7)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail an async test that keeps its event loop from turning. `loop_gap(seconds)` is another limit."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        mark = item.get_closest_marker("loop_gap")
        item.obj = _watched(item.obj, mark.args[0] if mark else MAX_LOOP_GAP)
    return (yield)


def _watched(test: Callable[..., Any], limit: float) -> Callable[..., Any]:
    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        async with watched_loop() as watch:
            await test(*args, **kwargs)
        await sync_to_async(connections.close_all)()  # of the thread in which Django's async ORM works
        if watch.longest > limit:
            pytest.fail(f"the event loop stood still for {watch.longest:.3f} s, over the limit of {limit} s")

    return watched
