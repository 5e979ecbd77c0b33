"""Databases that are not migrated, and migrations under a running bot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.apps import apps
from django.core.management import call_command
from django.db import connections

from fsm_storage import DjangoStorage
from fsm_storage.checks import check_servers
from fsm_storage.exceptions import NotMigrated
from fsm_storage.models import FSMRecord
from tests.conftest import MARIADB, SKIP_MARIADB
from tests.database.conftest import another_database
from tests.rows import execute, in_thread
from tests.servers import Mariadb, Postgres


def chat(number: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=number, user_id=number)


@pytest.fixture(params=["sqlite", "postgres", pytest.param("mariadb", marks=SKIP_MARIADB)])
def fresh(
    request: pytest.FixtureRequest, tmp_path: Path, django_db_setup: None, django_db_blocker: Any
) -> Any:
    """A database in which nothing was migrated."""
    with django_db_blocker.unblock():
        if request.param == "sqlite":
            with another_database("fresh", "default", NAME=str(tmp_path / "fresh.sqlite3")) as alias:
                yield alias
        else:
            server: Postgres | Mariadb = request.getfixturevalue(f"own_{request.param}")
            server.create_database("fresh")
            with another_database("fresh", request.param, HOST=server.host, NAME="fresh") as alias:
                yield alias


async def test_an_unmigrated_database_is_named_with_what_to_do(fresh: str) -> None:
    storage = DjangoStorage(fresh, database=fresh)
    for call in (
        lambda: storage.get_state(chat(1)),
        lambda: storage.set_state(chat(1), "a"),
        lambda: storage.get_data(chat(1)),
        lambda: storage.update_data(chat(1), {"a": 1}),
        lambda: in_thread(storage.sweep),
    ):
        with pytest.raises(NotMigrated, match=r"migrate fsm_storage --database fresh"):
            await call()
    outcomes = await asyncio.gather(
        *(storage.set_state(chat(n), "a") for n in range(5)), return_exceptions=True
    )
    assert {type(outcome) for outcome in outcomes} == {NotMigrated}

    # And the storage goes on as soon as it is migrated.
    await in_thread(call_command, "migrate", "fsm_storage", database=fresh, verbosity=0)
    await storage.set_state(chat(1), "a")
    assert await storage.get_state(chat(1)) == "a"
    await storage.close()


async def test_an_additive_migration_fails_no_call(
    make_storage: Callable[..., DjangoStorage], database: str
) -> None:
    """The old code goes on, on the new table."""
    storage = make_storage(timeout=20)
    goes_on = True
    count = 0

    async def talk(n: int) -> None:
        nonlocal count
        while goes_on:
            count += 1
            await storage.set_state(chat(n), f"s{count}")
            await storage.update_data(chat(n), {"count": count})
            await storage.get_state(chat(n))
            await storage.get_data(chat(n))
            await asyncio.sleep(0.001)

    async def wait_for_more() -> None:
        goal = count + 60
        async with asyncio.timeout(25):
            while count < goal:
                await asyncio.sleep(0.005)

    tasks = [asyncio.create_task(talk(n)) for n in range(6)]
    try:
        await wait_for_more()
        for table in ("fsm_storage_record", "fsm_storage_transition"):
            await in_thread(
                execute, database, f"ALTER TABLE {table} ADD COLUMN extra integer NOT NULL DEFAULT 5"
            )
            await wait_for_more()
        await in_thread(execute, database, "CREATE INDEX fsm_storage_extra ON fsm_storage_record (extra)")
        await wait_for_more()
    finally:
        goes_on = False
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        of = "ON fsm_storage_record" if database == "mariadb" else ""
        await in_thread(execute, database, f"DROP INDEX IF EXISTS fsm_storage_extra {of}")
        for table in ("fsm_storage_record", "fsm_storage_transition"):
            await in_thread(execute, database, f"ALTER TABLE {table} DROP COLUMN extra")
    assert outcomes == [None] * 6
    assert await storage.get_state(chat(0)) is not None


def test_constraints_and_indexes_have_our_names(database: str) -> None:
    connection = connections[database]
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, FSMRecord._meta.db_table)
    named = {name for name in found if name.startswith("fsm_storage_record_")}
    assert {
        "fsm_storage_record_key",
        "fsm_storage_record_chat",
        "fsm_storage_record_user",
        "fsm_storage_record_updated",
        "fsm_storage_record_state",
        "fsm_storage_record_state_exp",
        "fsm_storage_record_data_exp",
    } <= named


def test_there_is_one_record_for_an_alias_and_a_key(database: str) -> None:
    from django.db import IntegrityError, transaction

    values = {"alias": "a", "key": "k", "bot_id": 1, "chat_id": 1, "user_id": 1, "version": 1}
    FSMRecord.objects.using(database).create(**values)
    with pytest.raises(IntegrityError), transaction.atomic(using=database):
        FSMRecord.objects.using(database).create(**values)


@pytest.mark.parametrize("database", [MARIADB], indirect=True)
class TestColumnsOnMariaDB:
    """What `migrations/0007_mariadb` does has to be done for each table and column that comes later."""

    def test_texts_that_differ_in_a_byte_differ(self, database: str) -> None:
        sql = """SELECT table_name, column_name, collation_name FROM information_schema.columns
            WHERE table_schema = database() AND table_name LIKE 'fsm_storage%'
            AND table_name <> 'fsm_storage_peer' AND collation_name NOT IN ('utf8mb4_nopad_bin', 'utf8mb4_bin')"""
        assert execute(database, sql) == ()

    def test_all_characters_of_names_are_kept(self, database: str) -> None:
        sql = """SELECT table_name, column_name FROM information_schema.columns
            WHERE table_schema = database() AND table_name LIKE 'fsm_storage%' AND character_set_name <> 'utf8mb4'"""
        assert execute(database, sql) == ()

    def test_instants_are_in_utc_by_default(self, database: str) -> None:
        sql = """SELECT table_name, column_name FROM information_schema.columns
            WHERE table_schema = database() AND table_name LIKE 'fsm_storage%' AND column_default LIKE 'current%'"""
        assert execute(database, sql) == ()

    def test_deep_data_is_not_refused(self, database: str) -> None:
        sql = """SELECT table_name, constraint_name FROM information_schema.check_constraints
            WHERE constraint_schema = database() AND constraint_name IN ('data', 'data_before', 'data_after', 'before')
            AND table_name LIKE 'fsm_storage%'"""
        assert execute(database, sql) == ()

    def test_every_index_of_a_model_is_there(self, database: str) -> None:
        connection = connections[database]
        missing = []
        for model in apps.get_app_config("fsm_storage").get_models():
            with connection.cursor() as cursor:
                found = connection.introspection.get_constraints(cursor, model._meta.db_table)
            missing += [index.name for index in model._meta.indexes if index.name not in found]
        assert missing == []

    def test_the_checks_name_no_index_that_is_there(self, database: str) -> None:
        """Django 6.1 would with each `check`, others with `check --database` and `migrate`."""
        assert FSMRecord.check(databases=[database]) == []

    def test_the_checks_ask_the_server(self, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert check_servers(databases=[database]) == []
        server = connections[database]
        monkeypatch.setattr(server, "sql_mode", {"ANSI_QUOTES"})
        monkeypatch.setattr(server, "mysql_version", (10, 5, 23))
        assert [message.id for message in check_servers(databases=[database])] == [
            "fsm_storage.E010",
            "fsm_storage.W003",
        ]
