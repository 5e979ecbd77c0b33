"""aiogram's `MemoryStorage` is the oracle: what it does is what every other storage is held to."""

import pytest
from aiogram.fsm.storage.memory import MemoryStorage

from fsm_storage.testing import StorageContract

GAPS = {"closing", "copies", "durability", "expiry", "refusal"}


class TestMemoryStorage(StorageContract, without=GAPS):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()


def test_a_promise_that_is_not_given_leaves_no_test() -> None:
    assert TestMemoryStorage.test_what_expired_is_gone is None
    assert StorageContract.test_what_expired_is_gone is not None


def test_a_misspelt_promise_is_an_error() -> None:
    with pytest.raises(TypeError, match="expirey"):

        class Misspelt(StorageContract, without={"expirey"}):
            pass
