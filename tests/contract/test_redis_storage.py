"""`RedisStorage` on a real Redis: with and without the mirror's outbox, with each kind of key."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder

from fsm_storage import RecordKeyBuilder, RedisStorage
from fsm_storage.testing import LIFETIME, StorageContract


class RedisContract(StorageContract, without={"keys"}):
    """aiogram's default keys leave out the bot and the business connection."""

    options: dict[str, Any] = {"key_builder": DefaultKeyBuilder(with_destiny=True)}

    @pytest.fixture
    async def make(self, redis_url: str) -> AsyncIterator[Callable[..., RedisStorage]]:
        made: list[RedisStorage] = []

        def make(**options: Any) -> RedisStorage:
            chosen = {"mirror": "apart", "timeout": 30.0, **self.options, **options}
            made.append(RedisStorage.from_url(redis_url, **chosen))
            return made[-1]

        self.make = make
        yield make
        await asyncio.gather(*(storage.close() for storage in made))

    @pytest.fixture
    def storage(self, make: Callable[..., RedisStorage]) -> RedisStorage:
        return make()

    @pytest.fixture
    def expiring_storage(self, make: Callable[..., RedisStorage]) -> RedisStorage:
        return make(state_ttl=LIFETIME, data_ttl=LIFETIME)

    async def advance(self, storage: BaseStorage, seconds: float) -> None:
        """Take so much from the time that every key has left."""
        client = storage.redis
        for name in await client.keys():
            left = await client.pttl(name)
            if left >= 0:
                await client.pexpire(name, int(left - seconds * 1000))

    async def reopen(self, storage: BaseStorage) -> BaseStorage:
        await storage.close()
        return self.make()


class TestMirrored(RedisContract):
    pass


class TestAlone(RedisContract):
    options = {**RedisContract.options, "mirror": False}


class TestWholeKeys(StorageContract):
    """With this package's keys, of which every part counts."""

    options = {"key_builder": RecordKeyBuilder()}
    make, storage, expiring_storage = (
        RedisContract.make,
        RedisContract.storage,
        RedisContract.expiring_storage,
    )
    advance, reopen = RedisContract.advance, RedisContract.reopen


class TestLittleRoom(RedisContract, without={"refusal"}):
    """Every caller waits its turn."""

    options = {**RedisContract.options, "max_pending": 1}
