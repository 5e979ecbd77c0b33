"""Storages on a real Redis: one for all tests, or one of the test's own, which it may stop."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
from aiogram.fsm.storage.base import DefaultKeyBuilder
from django.conf import settings

from fsm_storage import RedisStorage
from fsm_storage.conf import storages
from tests.conftest import POSTGRES, SQLITE
from tests.redis.proxy import Proxy
from tests.servers import RedisServer

Make = Callable[..., RedisStorage]
Mirrored = Callable[..., RedisStorage]
BUILDER = DefaultKeyBuilder(with_bot_id=True, with_business_connection_id=True, with_destiny=True)
ALIAS = "mirrored"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask or stop a Redis themselves, on their loop, stand still for as long as it gets no processor."""
    for item in items:
        if isinstance(item, pytest.Function) and item.module.__name__.startswith("tests.redis."):
            own = {"raw", "own_redis"} & inspect.signature(item.obj).parameters.keys()
            if own and item.get_closest_marker("loop_gap") is None:
                item.add_marker(pytest.mark.loop_gap(4))


@pytest.fixture
async def make(redis_url: str) -> AsyncIterator[Make]:
    """Make storages, by default on the common Redis, with an outbox that nobody reads; they are closed at the end."""
    made: list[RedisStorage] = []

    def make(url: str = redis_url, **options: Any) -> RedisStorage:
        made.append(RedisStorage.from_url(url, **{"mirror": "apart", **options}))
        return made[-1]

    yield make
    await asyncio.gather(*(storage.close() for storage in made))


@pytest.fixture
def storage(make: Make) -> RedisStorage:
    return make()


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    """A plain client, to look at what is really there."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may stop, kill and configure."""
    server = RedisServer(settings.TEST_DIR / f"redis-{uuid.uuid4().hex[:8]}")
    yield server
    server.remove()


@pytest.fixture
async def proxy(redis_server: RedisServer, redis_url: str) -> AsyncIterator[Proxy]:
    """A TCP proxy in front of the common Redis, which cuts and stalls lines when told to."""
    async with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture(params=[SQLITE, POSTGRES])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FSM_STORAGES have the alias; the storage itself is put in by the test."""
    monkeypatch.setitem(storages.settings, ALIAS, {"BACKEND": "fsm_storage.RedisStorage"})


@pytest.fixture
def mirrored(make: Make, configured: None, database: str, raw: redis.Redis) -> Mirrored:
    """Make storages that are mirrored into `database`, of one alias; the last is the configured one."""
    raw.flushall()

    def make_one(**options: Any) -> RedisStorage:
        storage = make(**{"alias": ALIAS, "database": database, "key_builder": BUILDER, **options})
        storages[ALIAS] = storage
        return storage

    return make_one
