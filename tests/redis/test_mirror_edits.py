"""What Django does to mirrored records besides the page of one: migrations, and the note that a handler is at work."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.db import transaction
from django.utils import timezone

from fsm_storage import RedisStorage, storages
from fsm_storage.admin import page
from fsm_storage.backends import redis_editing
from fsm_storage.dialects import Claim
from fsm_storage.exceptions import RedisUnavailable
from fsm_storage.models import FSMRecord
from fsm_storage.operations import RenameDataKey, RenameState
from tests.redis.conftest import ALIAS, BUILDER, Make, Mirrored
from tests.redis.mirroring import becomes, mirror_all, mirroring, other
from tests.rows import in_thread, record, records, transitions
from tests.servers import RedisServer

# Migrations


async def test_a_state_is_renamed_in_many_conversations_at_once(mirrored: Mirrored, database: str) -> None:
    storage = mirrored(state_ttl=500)
    for chat in range(1, 101):
        await storage.set_state(other(chat), "Form:name")
        await storage.set_data(other(chat), {"phone": chat})
    async with mirroring(storage):
        await becomes(lambda: in_thread(lambda: sum(row.data != {} for row in records(database)) == 100))
        assert await in_thread(RenameState("Form:name", "Form:title").apply, database, by="shop") == 100
        assert await in_thread(RenameDataKey("phone", "tel").apply, database) == 100
    for chat in (1, 100):
        assert await storage.get_state(other(chat)) == "Form:title"
        assert await storage.get_data(other(chat)) == {"tel": chat}
    assert {row.state for row in await in_thread(records, database)} == {"Form:title"}
    renamed = await in_thread(transitions, database, source="migration")
    assert renamed == [("Form:name", "Form:title", "migration", "shop")] * 100


async def test_without_a_mirror_a_renaming_waits_once(
    mirrored: Mirrored, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_editing, "PATIENCE", 0.2)
    storage = mirrored()
    for chat in range(1, 41):
        await storage.set_state(other(chat), "a")
    await mirror_all(storage)
    rows = await in_thread(records, database)
    began = time.monotonic()
    replies = await in_thread(storage.edit_each, [(row, {"state": "b"}) for row in rows])
    assert time.monotonic() - began < 40 * 0.2
    assert all(isinstance(reply, int) for reply in replies)
    assert await storage.get_state(other(40)) == "b"


async def test_a_renaming_leaves_what_has_moved_on_or_gone(
    mirrored: Mirrored, database: str, raw: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    storage = mirrored()
    for chat in range(1, 5):
        await storage.set_state(other(chat), "a")
    await mirror_all(storage)
    await storage.set_state(other(2), "moved")
    # The fourth has expired in Redis, and nothing has swept its record.
    raw.delete(BUILDER.build(other(4), "state"))
    expired = FSMRecord.objects.using(database).filter(chat_id=4)
    await in_thread(expired.update, state_expires_at=timezone.now() - timedelta(seconds=1))
    with caplog.at_level(logging.WARNING, "fsm_storage"):
        rows = await in_thread(records, database)
        stale = rows[2]
        stale.version -= 1
        replies = await in_thread(storage.edit_each, [(row, {"state": "b"}) for row in rows])
    assert [type(reply).__name__ for reply in replies] == [
        "int",
        "RedisConflict",
        "VersionConflict",
        "NoneType",
    ]
    await mirror_all(storage)
    assert [await storage.get_state(other(chat)) for chat in range(1, 5)] == ["b", "moved", "a", None]


# Deleting


async def deleted(database: str) -> None:
    """Delete as the admin does, all in one transaction of the request."""

    def delete() -> None:
        with transaction.atomic(using=database):
            storages.editor(ALIAS).delete(records(database), by="ann")

    await in_thread(delete)


@pytest.mark.parametrize("history", ["states", "full"])
async def test_what_is_deleted_is_gone_from_redis_and_the_history_tells_once(
    mirrored: Mirrored, database: str, raw: redis.Redis, history: Any
) -> None:
    storage = mirrored(history=history)
    for chat in (1, 2):
        await storage.set_state(other(chat), "a")
    async with mirroring(storage):
        await becomes(lambda: in_thread(lambda: len(records(database)) == 2))
        await deleted(database)
        assert await storage.get_state(other(1)) is None
        await storage.set_state(other(2), "anew")
    await mirror_all(storage)
    assert [(row.chat_id, row.state) for row in await in_thread(records, database)] == [(2, "anew")]
    told = await in_thread(transitions, database, source="admin")
    assert told == [("a", None, "admin", "ann")] * 2


async def test_what_redis_does_not_take_is_not_deleted(
    make: Make, configured: None, own_redis: RedisServer, database: str
) -> None:
    storage = storages[ALIAS] = make(own_redis.url, alias=ALIAS, database=database, key_builder=BUILDER)
    await storage.set_state(other(7), "a")
    await mirror_all(storage)
    own_redis.kill()
    with pytest.raises(RedisUnavailable):
        await deleted(database)
    assert [row.state for row in await in_thread(records, database)] == ["a"]
    assert await in_thread(transitions, database, source="admin") == []


# A handler at work


async def is_noted(database: str) -> bool:
    return await in_thread(lambda: page._is_leased(record(database, alias=ALIAS)))


async def test_the_page_knows_of_a_lease_in_redis(mirrored: Mirrored, database: str) -> None:
    storage = mirrored()
    await storage.set_state(other(7), "a")
    await mirror_all(storage)
    assert not await is_noted(database)
    isolation = storage.create_isolation()
    async with isolation.lock(other(7)):
        await becomes(lambda: is_noted(database))  # which waits for Redis only for a moment
    await becomes(lambda: _is_not_noted(database))
    await isolation.close()


async def _is_not_noted(database: str) -> bool:
    return not await is_noted(database)


async def test_the_page_does_not_wait_for_a_redis_that_is_away(
    make: Make, configured: None, own_redis: RedisServer, database: str
) -> None:
    storage: RedisStorage = make(own_redis.url, alias=ALIAS, database=database, key_builder=BUILDER)
    storages[ALIAS] = storage
    await storage.set_state(other(7), "a")
    await mirror_all(storage)
    await storage.submit(Claim(storage.lease_key(other(7)), "me", 100.0))
    await becomes(lambda: is_noted(database))
    with redis.Redis.from_url(own_redis.url) as client:
        client.client_pause(8000)
    began = time.monotonic()
    assert not await is_noted(database)
    assert time.monotonic() - began < 7, "it waits for a Redis that says nothing"
    own_redis.kill()
    began = time.monotonic()
    assert not await is_noted(database)
    assert time.monotonic() - began < 7


async def test_a_storage_that_is_not_configured_has_no_lease_to_show(
    mirrored: Mirrored, database: str, settings: Any
) -> None:
    storage = mirrored()
    await storage.set_state(other(7), "a")
    await mirror_all(storage)
    settings.FSM_STORAGES = {}
    assert not await is_noted(database)
