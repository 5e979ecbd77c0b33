"""A change of many beside a bot that goes on writing: nothing that either side wrote is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import connections

from fsm_storage.admin import bulkwork
from fsm_storage.admin.bulk import ACTIONS
from fsm_storage.backends.django import DjangoStorage
from fsm_storage.models import FSMBulkItem, FSMRecord, FSMTransition
from fsm_storage.rights import rights_of
from tests.database.routing import whole

PEOPLE = 60
pytestmark = [pytest.mark.parametrize("database", [whole("default"), whole("postgres")], indirect=True)]
Outcome = FSMBulkItem.Outcome


def key(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


@pytest.fixture
def storage(make_storage: Callable[..., DjangoStorage]) -> DjangoStorage:
    return make_storage(history="full")


@pytest.fixture
def people(storage: DjangoStorage, user: User) -> list[tuple[int, str]]:
    async def fill() -> None:
        await asyncio.gather(*(storage.set_state(key(number), "Order:item") for number in range(PEOPLE)))
        await asyncio.gather(*(storage.update_data(key(number), {"n": 0}) for number in range(PEOPLE)))

    asyncio.run(fill())
    return list(FSMRecord.objects.order_by("pk").values_list("pk", "key"))


class Bot(threading.Thread):
    """Writes a key of its own into everybody's data, over and over, until it is told to stop."""

    def __init__(self, storage: DjangoStorage) -> None:
        super().__init__()
        self.storage, self.rounds, self.stopping = storage, 0, threading.Event()
        self.busy = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._write())
        except BaseException as error:
            self.error = error
        finally:
            connections.close_all()

    async def _write(self) -> None:
        while not self.stopping.is_set():
            self.rounds += 1
            fields = {"n": self.rounds, f"bot{self.rounds % 3}": self.rounds}
            await asyncio.gather(*(self.storage.update_data(key(number), fields) for number in range(PEOPLE)))
            self.busy.set()

    def __enter__(self) -> Bot:
        self.start()
        assert self.busy.wait(60), f"the bot did not write: {self.error!r}"
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopping.set()
        self.join()
        if self.error:
            raise self.error


def counts(bulk: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in bulk.items.values_list("outcome", flat=True):
        found[outcome] = found.get(outcome, 0) + 1
    return found


def test_a_key_is_set_beside_a_busy_bot_and_nothing_is_lost(
    storage: DjangoStorage, people: list[tuple[int, str]], user: User
) -> None:
    typed = {"name": "vip", "value": "true"}
    bulk = bulkwork.start(ACTIONS["set_key"], typed, people, user)
    with Bot(storage) as bot:
        bulkwork.work(bulk, {"name": "vip", "value": True}, user, rights_of(user), 60)
    assert counts(bulk) == {Outcome.CHANGED: PEOPLE}, "a busy bot keeps nobody from being reached"
    for record in FSMRecord.objects.all():
        assert record.data["n"] == bot.rounds, "the bot's last write is there"
        assert record.data["vip"] is True
    assert FSMTransition.objects.filter(source="admin").count() == LogEntry.objects.count() == PEOPLE


def test_many_are_moved_and_moved_back(
    storage: DjangoStorage, people: list[tuple[int, str]], user: User
) -> None:
    bulk = bulkwork.start(ACTIONS["move_state"], {"other_state": "Order:done"}, people, user)
    bulkwork.work(bulk, {"target": "Order:done"}, user, rights_of(user), 60)
    assert counts(bulk) == {Outcome.CHANGED: PEOPLE}
    assert set(FSMRecord.objects.values_list("state", flat=True)) == {"Order:done"}
    asyncio.run(storage.set_state(key(7), "Order:elsewhere"))
    undo = bulkwork.start_undo(bulk, user)
    bulkwork.work(undo, {}, user, rights_of(user), 60)
    assert counts(undo) == {Outcome.CHANGED: PEOPLE - 1, Outcome.MOVED: 1}
    assert set(FSMRecord.objects.values_list("state", flat=True)) == {"Order:item", "Order:elsewhere"}


def test_two_requests_at_a_time_do_everything_once(
    storage: DjangoStorage, people: list[tuple[int, str]], user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulkwork, "BATCH", 5)
    bulk = bulkwork.start(ACTIONS["clear_state"], {}, people, user)

    def work() -> None:
        try:
            bulkwork.work(bulk, {}, user, rights_of(user), 60)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(bulk) == {Outcome.CHANGED: PEOPLE}
    assert FSMTransition.objects.filter(source="admin").count() == LogEntry.objects.count() == PEOPLE
