"""The system check that finds conversations which a deploy has stranded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import connections
from django.test.utils import CaptureQueriesContext

from fsm_storage import DjangoStorage, discovery
from fsm_storage.operations import RenameState
from tests.rows import let_time_pass


@pytest.fixture
def all_apps(database: str, settings: Any) -> None:
    """A test with committed rows has only our own app at first."""
    settings.INSTALLED_APPS = list(settings.INSTALLED_APPS)


def put(storage: DjangoStorage, *states: str) -> None:
    async def main() -> None:
        for chat, state in enumerate(states):
            await storage.set_state(StorageKey(bot_id=1, chat_id=chat, user_id=chat), state)

    asyncio.run(main())


def warnings(database: str) -> list[Any]:
    return [found for found in run_checks(databases=[database]) if found.id == "fsm_storage.W002"]


@pytest.mark.usefixtures("all_apps")
def test_it_warns_of_live_states_that_no_app_declares(storage: DjangoStorage, database: str) -> None:
    put(storage, "Order:payment", "Order:pay", "Gone:b", "Gone:b")
    (warning,) = warnings(database)
    assert warning.msg.endswith("no app declares: 'Gone:b', 'Order:pay'.")
    assert repr(database) in warning.msg
    assert "RenameState('Gone:b'" in warning.hint
    RenameState("Gone:b", "Order:payment").apply(database)
    RenameState("Order:pay", "Order:payment").apply(database)
    assert warnings(database) == []


@pytest.mark.usefixtures("all_apps")
def test_what_has_expired_strands_nobody(make_storage: Callable[..., DjangoStorage], database: str) -> None:
    put(make_storage(state_ttl=100), "Order:pay")
    assert len(warnings(database)) == 1
    let_time_pass(database, 200)
    assert warnings(database) == []


@pytest.mark.usefixtures("all_apps")
def test_the_database_is_asked_only_with_the_option(storage: DjangoStorage, database: str) -> None:
    put(storage, "Order:pay")
    with CaptureQueriesContext(connections[database]) as queries:
        # Of no models, for which Django 6.1 asks databases that this test may not.
        assert [found for found in run_checks(app_configs=[]) if found.id == "fsm_storage.W002"] == []
    assert len(queries) == 0
    errors = StringIO()
    call_command("check", databases=[database], stderr=errors)
    assert "fsm_storage.W002" in errors.getvalue()


@pytest.mark.usefixtures("all_apps")
def test_many_conversations_cost_no_more(storage: DjangoStorage, database: str) -> None:
    """One look for each different state, and one for each that is not declared."""
    counts = []
    warnings(database)  # Django asks a database once what it can do
    for _ in range(2):
        put(storage, *["Order:payment"] * 150, "Order:pay")
        with CaptureQueriesContext(connections[database]) as queries:
            warnings(database)
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 6


@pytest.mark.usefixtures("all_apps")
def test_a_project_whose_states_are_elsewhere_is_not_bothered(
    storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, "Order:pay")
    monkeypatch.setattr("fsm_storage.checks.declared_states", lambda: discovery.Catalog(()))
    assert warnings(database) == []


def test_a_database_without_the_tables_is_fine(own_postgres: Any, django_db_blocker: Any) -> None:
    from tests.database.conftest import another_database

    with (
        django_db_blocker.unblock(),
        another_database("empty", "postgres", HOST=own_postgres.host, NAME="template1") as alias,
    ):
        assert warnings(alias) == []
