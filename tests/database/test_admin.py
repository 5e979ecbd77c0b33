"""What the admin writes on real servers: it waits for a locked record as long as the storage would, and says so."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import connections
from django.test import Client

from fsm_storage import DjangoStorage
from fsm_storage.admin import timelimit
from fsm_storage.admin.bulkwork import Task, Worker
from fsm_storage.models import FSMBulkItem, FSMRecord, FSMTransition
from tests.conftest import SKIP_MARIADB
from tests.database.routing import whole
from tests.rows import OtherSession, execute
from tests.web.conftest import LIST, form_of, page_of

SERVERS = [whole("postgres"), whole("mariadb", SKIP_MARIADB)]
pytestmark = [pytest.mark.parametrize("database", SERVERS, indirect=True)]
PATIENCE = 1.0
HELD = 20.0
TOO_LONG = 10.0
"""A busy machine stands still for seconds; without a limit it is `HELD`."""


@pytest.fixture
def client(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def conversation(make_storage: Callable[..., DjangoStorage], user: User) -> FSMRecord:
    asyncio.run(make_storage().set_state(StorageKey(bot_id=1, chat_id=2, user_id=2), "Order:item"))
    make_storage(timeout=PATIENCE)  # from now on; a busy machine stands still for longer
    return FSMRecord.objects.with_clock().get()


@contextmanager
def held(database: str) -> Iterator[None]:
    """Let somebody else hold all records: not for ever, so that a page without a limit comes back too."""
    other = OtherSession(database)
    other.execute("SELECT 1 FROM fsm_storage_record FOR UPDATE")
    release = threading.Timer(HELD, other.rollback)
    release.start()
    try:
        yield
    finally:
        release.cancel()
        release.join()
        other.close()


def save(client: Client, record: FSMRecord) -> Any:
    return client.post(page_of(record), form_of(record, state="none"), follow=True)


def clear_many(client: Client, record: FSMRecord) -> Any:
    page = client.post(LIST, {"action": "clear_state", "_selected_action": [record.pk]})
    return client.post(f"{LIST}bulk/", {"token": page.context["token"], "run": "1"}, follow=True)


def delete_one(client: Client, record: FSMRecord) -> Any:
    return client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"}, follow=True)


def delete_many(client: Client, record: FSMRecord) -> Any:
    asked = {"action": "delete_selected", "_selected_action": [record.pk], "post": "yes"}
    return client.post(LIST, asked, follow=True)


WAYS = [save, clear_many, delete_one, delete_many]


def refuse(database: str, client: Client, record: FSMRecord, way: Callable[..., Any]) -> None:
    """Do it while the record is held: a message comes in time, and nothing was written."""
    client.get(LIST)
    limit = _limit(database)
    with held(database):
        began = time.monotonic()
        response = way(client, record)
        assert time.monotonic() - began < TOO_LONG
    assert response.status_code == 200
    assert "The database did not take the change" in response.content.decode()
    assert FSMRecord.objects.get().version == record.version
    assert not FSMTransition.objects.exclude(source="bot").exists()
    assert not LogEntry.objects.exists()
    assert not FSMBulkItem.objects.exclude(outcome=FSMBulkItem.Outcome.WAITING).exists()
    assert _limit(database) == limit, "the limit is left on the connection"


def _limit(database: str) -> Any:
    name = "lock_timeout" if database == "postgres" else "innodb_lock_wait_timeout"
    sql = f"SHOW {name}" if database == "postgres" else f"SELECT @@SESSION.{name}"
    return execute(database, sql)[0][0]


@pytest.mark.parametrize("way", WAYS)
def test_a_record_that_somebody_holds_is_a_message_in_time(
    database: str,
    client: Client,
    conversation: FSMRecord,
    way: Callable[..., Any],
    make_storage: Callable[..., DjangoStorage],
) -> None:
    refuse(database, client, conversation, way)
    make_storage()
    way(client, conversation)
    assert FSMTransition.objects.filter(to_state=None, source="admin", actor="agent").count() == 1
    assert LogEntry.objects.count() == 1
    assert not FSMRecord.objects.filter(state__isnull=False).exists()


@pytest.mark.parametrize("way", WAYS)
def test_so_it_is_in_a_transaction_of_the_request(
    database: str,
    client: Client,
    conversation: FSMRecord,
    way: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(connections[database].settings_dict, "ATOMIC_REQUESTS", True)
    refuse(database, client, conversation, way)


def test_a_record_that_is_read_again_under_its_lock(
    database: str, client: Client, conversation: FSMRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(worker: Worker, tasks: list[Task]) -> None:
        worker._change_again(tasks[0])

    monkeypatch.setattr(Worker, "_change", change)
    limit = _limit(database)
    with held(database):
        began = time.monotonic()
        response = clear_many(client, conversation)
        assert time.monotonic() - began < TOO_LONG
    assert "The database did not take the change" in response.content.decode()
    assert FSMBulkItem.objects.get().outcome == FSMBulkItem.Outcome.WAITING
    assert _limit(database) == limit


@pytest.mark.parametrize("way", [delete_one, delete_many])
def test_a_record_of_a_storage_that_is_not_configured_any_more(
    database: str,
    client: Client,
    conversation: FSMRecord,
    way: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timelimit, "PATIENCE", PATIENCE)
    FSMRecord.objects.update(alias="forgotten")
    refuse(database, client, conversation, way)
    way(client, conversation)
    assert not FSMRecord.objects.exists()
