"""Builds each contender's storage, ready for work. The settings are those that `contenders` tells of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiogram.fsm.state import State
from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage, DefaultKeyBuilder, StateType, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.fsm.storage.redis import RedisStorage

from benchmarks.contenders import CONTENDERS, Places

_DATABASES = {"sqlite": "default", "postgres": "postgres"}


class OrmStorage(BaseStorage):
    """The storage that people write over Django's async ORM: a query an operation."""

    def __init__(self, database: str) -> None:
        from benchmarks.models import PlainState

        self._model = PlainState
        self._rows = PlainState.objects.using(database)
        self._keys = DefaultKeyBuilder(with_bot_id=True)

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        name = state.state if isinstance(state, State) else state
        await self._rows.aupdate_or_create(key=self._keys.build(key), defaults={"state": name})

    async def get_state(self, key: StorageKey) -> str | None:
        try:
            return (await self._rows.aget(key=self._keys.build(key))).state
        except self._model.DoesNotExist:
            return None

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        await self._rows.aupdate_or_create(key=self._keys.build(key), defaults={"data": dict(data)})

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        try:
            return (await self._rows.aget(key=self._keys.build(key))).data
        except self._model.DoesNotExist:
            return {}

    async def close(self) -> None:
        pass


@asynccontextmanager
async def open_storage(name: str, places: Places) -> AsyncIterator[BaseStorage]:
    """Open the contender's storage, and close all that it opened."""
    family, _, rest = name.partition("-")
    if family == "sqlalchemy":
        async with _sqlalchemy(rest, places) as storage:
            yield storage
        return
    storage = _make(name, places)
    try:
        yield storage
    finally:
        await storage.close()


@asynccontextmanager
async def open_isolation(storage: BaseStorage) -> AsyncIterator[BaseEventIsolation]:
    """Open the event isolation that comes with a contender's storage, and close it."""
    isolation: BaseEventIsolation = storage.create_isolation()  # type: ignore[attr-defined] # not all have one
    try:
        yield isolation
    finally:
        await isolation.close()


def _make(name: str, places: Places) -> BaseStorage:
    family, _, rest = name.partition("-")
    if family == "memory":
        return MemoryStorage()
    if family == "redis":
        return RedisStorage.from_url(places.redis)
    if family == "aiogram":
        from aiogram_sqlite_storage.sqlitestore import SQLStorage

        return SQLStorage(str(places.sqlite))
    if family == "orm":
        return OrmStorage(_DATABASES[rest])
    from fsm_storage import DjangoStorage
    from fsm_storage import RedisStorage as OurRedisStorage

    if rest.startswith("redis"):
        return OurRedisStorage.from_url(places.redis, mirror=CONTENDERS[name].mirror)
    database, history = rest.split("-")[:2]
    return DjangoStorage(database=_DATABASES[database], history=history)


@asynccontextmanager
async def _sqlalchemy(database: str, places: Places) -> AsyncIterator[BaseStorage]:
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
    from sqlalchemy_storage import SQLAlchemyStorage

    urls = {
        "sqlite": f"sqlite+aiosqlite:///{places.sqlite}",
        "postgres": f"postgresql+asyncpg://postgres@/postgres?host={places.postgres}",
    }
    engine = create_async_engine(urls[database])
    storage = SQLAlchemyStorage(async_sessionmaker(engine, expire_on_commit=False), metadata=MetaData())
    async with engine.begin() as connection:
        await connection.run_sync(storage.metadata.create_all)
    try:
        yield storage
    finally:
        await engine.dispose()
