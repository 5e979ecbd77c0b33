"""The promises of a storage as a pytest class, for whoever writes a storage of their own.

    class TestMyStorage(StorageContract, without={"expiry"}):
        @pytest.fixture
        async def storage(self):
            storage = MyStorage()
            yield storage
            await storage.close()

Every promise is aiogram's own (what `MemoryStorage` and `RedisStorage` do) unless it is named in
`PROMISES`; those named there can be left out. Needs pytest and pytest-asyncio.
"""

from __future__ import annotations

from fsm_storage.testing.guarantees import Keys, Lifetimes, Refusals
from fsm_storage.testing.operations import Operations
from fsm_storage.testing.promises import KEY, LIFETIME, PROMISES, Cart, Order, promise

__all__ = ["KEY", "LIFETIME", "PROMISES", "Cart", "Order", "StorageContract", "promise"]


class StorageContract(Operations, Keys, Refusals, Lifetimes):
    """What a storage promises. Derive from it and give the fixture `storage`: an empty storage.

    `without` names the promises that the storage does not give.
    """
