"""Tests of users: `in_transaction`, and the fixture that switches it on."""

from __future__ import annotations

from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import async_to_sync
from django.conf import settings
from django.test import TestCase

from fsm_storage import DjangoStorage, storages
from fsm_storage.models import FSMRecord, FSMTransition
from tests.conftest import NO_MARIADB, SKIP_MARIADB

KEY = StorageKey(bot_id=1, chat_id=2, user_id=3)
fixture = pytest.mark.usefixtures("fsm_storages_in_transaction")


@fixture
class InTransaction:
    database = ""

    @property
    def rows(self) -> Any:
        return FSMRecord.objects.using(self.database)

    def test_a_synchronous_test_sees_what_the_bot_wrote(self) -> None:
        storage = storages[self.database]
        async_to_sync(storage.set_state)(KEY, "a")
        assert async_to_sync(storage.update_data)(KEY, {"n": 1}) == {"n": 1}
        record = self.rows.get()
        assert (record.state, record.data) == ("a", {"n": 1})
        record.edit(state="b", by="me", if_version=record.version)
        assert async_to_sync(storage.get_state)(KEY) == "b"
        assert FSMTransition.objects.using(self.database).count() == 2

    async def test_an_asynchronous_test_sees_what_the_bot_wrote(self) -> None:
        storage = storages[self.database]
        await storage.set_state(KEY, "a")
        await storage.set_data(KEY, {"n": 1})
        record = await self.rows.aget()
        assert (record.state, record.data) == ("a", {"n": 1})
        assert await storage.get_state(KEY) == "a"
        await self.rows.all().adelete()
        assert await storage.get_state(KEY) is None
        assert await storage.get_data(KEY) == {}

    async def test_a_bad_operation_leaves_the_tests_transaction_usable(self) -> None:
        storage = storages[self.database]
        await storage.set_state(KEY, "a")
        with pytest.raises(ValueError, match="n"):
            await storage.set_data(KEY, {"n": float("nan")})
        record = await self.rows.aget()
        assert record.state == "a"

    def test_nothing_is_left_by_the_tests_before(self) -> None:
        assert not self.rows.exists()
        async_to_sync(storages[self.database].set_state)(KEY, "a")

    def test_nothing_is_left_by_the_tests_before_nor_by_this_one(self) -> None:
        assert not self.rows.exists()
        async_to_sync(storages[self.database].set_state)(KEY, "a")

    def test_no_thread_is_started(self) -> None:
        import threading

        before = set(threading.enumerate())
        async_to_sync(storages[self.database].set_state)(KEY, "a")
        started = set(threading.enumerate()) - before
        assert not [thread for thread in started if thread.name.startswith("fsm_storage")]


class TestOnSQLite(InTransaction, TestCase):
    database = "default"
    databases = {"default"}


class TestOnPostgres(InTransaction, TestCase):
    database = "postgres"
    databases = {"postgres"}


@SKIP_MARIADB
class TestOnMariaDB(InTransaction, TestCase):
    database = "mariadb"
    databases = {"mariadb"} if not NO_MARIADB else set()


class TestThatAreNotSwitched(TestCase):
    """What the fixture is for: without it, a worker thread does not see the test's transaction."""

    def test_a_record_of_the_test_is_unseen(self) -> None:
        FSMRecord.objects.create(
            alias="other",
            key="1:2:3",
            bot_id=1,
            chat_id=2,
            user_id=3,
            state="a",
            version=1,
            destiny="default",
        )
        plain, switched = DjangoStorage("other"), DjangoStorage("other", in_transaction=True)
        assert async_to_sync(switched.get_state)(KEY) == "a"
        assert async_to_sync(plain.get_state)(KEY) is None


@pytest.mark.django_db(databases=list(settings.DATABASES))
@pytest.mark.parametrize("alias", settings.DATABASES)
@fixture
def test_a_synchronous_test_of_pytest(alias: str) -> None:
    storage = storages[alias]
    async_to_sync(storage.set_state)(KEY, "a")
    assert FSMRecord.objects.using(alias).get().state == "a"
    assert async_to_sync(storage.get_state)(KEY) == "a"


@pytest.mark.django_db(transaction=True, databases=list(settings.DATABASES))
@pytest.mark.parametrize("alias", settings.DATABASES)
@pytest.mark.parametrize("switched", [True, False])
async def test_an_asynchronous_test_of_pytest_commits(
    alias: str, switched: bool, request: pytest.FixtureRequest
) -> None:
    if switched:
        request.getfixturevalue("fsm_storages_in_transaction")
    await storages[alias].set_state(KEY, "a")
    assert (await FSMRecord.objects.using(alias).aget()).state == "a"


def test_the_fixture_reaches_storages_that_exist_and_those_to_come(
    request: pytest.FixtureRequest, settings: Any
) -> None:
    settings.FSM_STORAGES = {
        "old": {"BACKEND": "fsm_storage.DjangoStorage"},
        "memory": {"BACKEND": "fsm_storage.MemoryStorage"},
    }
    old: Any = storages["old"]
    assert not old.in_transaction
    request.getfixturevalue("fsm_storages_in_transaction")
    assert storages["old"] is old
    assert old.in_transaction
    old.shut()
    new: Any = storages["old"]
    assert new is not old
    assert new.in_transaction


async def test_a_closed_storage_refuses_in_a_transaction_too() -> None:
    storage = DjangoStorage(in_transaction=True)
    await storage.close()
    with pytest.raises(RuntimeError, match="closed"):
        await storage.get_state(KEY)
