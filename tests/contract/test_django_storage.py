"""`DjangoStorage` on each real database, in each way in which it writes."""

from collections.abc import Callable

import pytest
from aiogram.fsm.storage.base import BaseStorage
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.testing import LIFETIME, StorageContract
from tests.conftest import MARIADB, NO_MARIADB, POSTGRES, POSTGRES16, SQLITE
from tests.rows import in_thread, let_time_pass

Make = Callable[..., DjangoStorage]
PATIENT = {"timeout": 30.0}
"""A busy machine stands still for seconds, and where there is little room everybody waits for everybody."""


@pytest.fixture(params=[SQLITE, POSTGRES, POSTGRES16, MARIADB])
def database(request: pytest.FixtureRequest) -> str:
    if request.param == "mariadb" and NO_MARIADB:
        pytest.fail(NO_MARIADB)
    return request.param


class DjangoContract(StorageContract):
    options: dict = {}

    @pytest.fixture
    def storage(self, make_storage: Make) -> DjangoStorage:
        return make_storage(**PATIENT, **self.options)

    @pytest.fixture
    def expiring_storage(self, make_storage: Make) -> DjangoStorage:
        return make_storage(state_ttl=LIFETIME, data_ttl=LIFETIME, **PATIENT, **self.options)

    async def advance(self, storage: BaseStorage, seconds: float) -> None:
        await in_thread(let_time_pass, storage.database, seconds)

    async def reopen(self, storage: BaseStorage) -> BaseStorage:
        await storage.close()
        return DjangoStorage(storage.alias, database=storage.database, **self.options)


class TestDefault(DjangoContract):
    pass


# What a key and a value may be is decided before the way to write is chosen, so these need not show it again.
SAME = {"keys", "refusal"}


class TestFullHistory(DjangoContract, without=SAME):
    options = {"history": "full"}


class TestBatchesOfThree(DjangoContract, without=SAME):
    """Small batches and little room: every caller waits its turn."""

    options = {"batch_size": 3, "max_pending": 5}


class TestInTransaction(DjangoContract, without=SAME):
    """Without worker threads: the way of a Django `TestCase`."""

    options = {"in_transaction": True}


@pytest.mark.parametrize("database", [POSTGRES16], indirect=True)
def test_the_older_postgresql_is_16(database: str) -> None:
    assert connections[database].pg_version // 10_000 == 16
