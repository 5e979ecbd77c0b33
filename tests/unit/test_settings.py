"""`FSM_STORAGES`: the handler, the constructor's errors and the system checks."""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test import override_settings

from fsm_storage import DjangoStorage, storages
from fsm_storage.conf import StorageHandler
from fsm_storage.exceptions import InvalidStorageError

DJANGO = "fsm_storage.DjangoStorage"


class OwnStorage(MemoryStorage):
    """A storage of the user's own, with an option."""

    def __init__(self, *, flavour: str = "plain") -> None:
        super().__init__()
        self.flavour = flavour


class NoStorage:
    pass


OWN, NONE = f"{__name__}.OwnStorage", f"{__name__}.NoStorage"


def one(backend: Any = DJANGO, **options: Any) -> dict[str, Any]:
    return {"default": {"BACKEND": backend, "OPTIONS": options}}


def messages(setting: Any) -> list[Any]:
    with override_settings(FSM_STORAGES=setting):
        return run_checks(tags=["fsm_storage"])


# The handler


def test_without_a_setting_there_is_a_working_default() -> None:
    handler = StorageHandler()
    with override_settings():
        from django.conf import settings

        del settings.FSM_STORAGES
        assert list(handler) == ["default"]
        assert isinstance(handler["default"], DjangoStorage)


def test_an_alias_has_one_object() -> None:
    found: list[BaseStorage] = []
    threads = [threading.Thread(target=lambda: found.append(storages["default"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(storage) for storage in found} == {id(storages["default"])}


def test_options_reach_the_storage() -> None:
    with override_settings(FSM_STORAGES={"orders": {"BACKEND": OWN, "OPTIONS": {"flavour": "hot"}}}):
        storage: Any = storages["orders"]
        assert storage.flavour == "hot"
        assert storages["orders"] is storage


def test_a_django_storage_knows_its_alias() -> None:
    with override_settings(FSM_STORAGES={"orders": {"BACKEND": DJANGO, "OPTIONS": {"database": "postgres"}}}):
        storage: Any = storages["orders"]
        assert (storage.alias, storage.database) == ("orders", "postgres")


def test_overriding_the_setting_makes_new_storages_and_closes_the_old() -> None:
    before: Any = storages["default"]
    with override_settings(FSM_STORAGES=one("fsm_storage.MemoryStorage")):
        assert before.closed
        assert isinstance(storages["default"], MemoryStorage)
    assert isinstance(storages["default"], DjangoStorage)
    assert storages["default"] is not before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ([], "dict"),
        ({"default": DJANGO}, "BACKEND"),
        ({"default": {}}, "BACKEND"),
        ({"default": {"BACKEND": DjangoStorage}}, "BACKEND"),
        ({"default": {"BACKEND": DJANGO, "TIMEOUT": 5}}, "TIMEOUT"),
        ({"default": {"BACKEND": DJANGO, "OPTIONS": 5}}, "OPTIONS"),
        ({"default": {"BACKEND": "nowhere.Storage"}}, "nowhere.Storage"),
        ({"default": {"BACKEND": "fsm_storage.NoSuch"}}, "NoSuch"),
        ({"orders": {"BACKEND": DJANGO}}, "no 'default'; it has 'orders'"),
        (one(DJANGO, flavour="hot"), "flavour"),
        (one(OWN, state_ttl=5), "state_ttl"),
        (one(state_ttl=-1), "state_ttl"),
        (one(NONE), "is no aiogram storage"),
    ],
)
def test_a_wrong_setting_is_named_when_the_storage_is_asked_for(setting: Any, words: str) -> None:
    with override_settings(FSM_STORAGES=setting), pytest.raises(InvalidStorageError, match=words) as error:
        storages["default"]
    assert isinstance(error.value, ImproperlyConfigured)


# The constructor

WRONG_OPTIONS: list[tuple[str, Any]] = [
    *((part, value) for part in ("state_ttl", "data_ttl") for value in (
        0, -1, 0.0, math.nan, math.inf, -math.inf, True, False, "5", [5], timedelta(0), timedelta(days=-1),
        timedelta.max, timedelta(days=36526), 10**12,
    )),
    *(("history", value) for value in ("all", None, True, "OFF", [])),
    *(("timeout", value) for value in (0, -1, math.nan, math.inf, True, "5", None, 1e9)),
    *((name, value) for name in ("max_pending", "batch_size") for value in (0, -1, 1.5, True, "5", None)),
    *(("database", value) for value in (None, 5, ["default"])),
    *(("key_builder", value) for value in (5, object, DefaultKeyBuilder, "nowhere.Builder", NONE)),
    *((name, value) for name in ("json_loads", "json_dumps") for value in (5, "nowhere.loads", "json.__name__")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS, ids=str)
def test_a_wrong_option_is_refused_by_constructor_and_check(name: str, value: Any) -> None:
    with pytest.raises(InvalidStorageError, match=name):
        DjangoStorage(**{name: value})
    found = messages(one(**{name: value}))
    assert len(found) == 1
    assert name in found[0].msg
    assert found[0].hint
    codes = {"state_ttl": "E004", "data_ttl": "E004", "database": "E005"}
    assert found[0].id == f"fsm_storage.{codes.get(name, 'E007')}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_ttl", None), ("state_ttl", 1), ("state_ttl", 0.1), ("data_ttl", timedelta(days=2)),
        ("data_ttl", timedelta(days=36525)), ("history", "off"), ("history", "full"), ("timeout", 0.5),
        ("max_pending", 1), ("batch_size", 1), ("key_builder", None),
        pytest.param("key_builder", DefaultKeyBuilder(), id="key_builder-object"),
        ("key_builder", "fsm_storage.DefaultKeyBuilder"), ("json_dumps", "json.dumps"), ("json_loads", None),
        ("database", "postgres"),
    ],
    ids=str,
)  # fmt: skip
def test_a_right_option_is_accepted(name: str, value: Any) -> None:
    DjangoStorage(**{name: value})
    assert messages(one(**{name: value})) == []


def test_a_storage_needs_no_argument() -> None:
    storage = DjangoStorage()
    assert (storage.alias, storage.database) == ("default", "default")


@pytest.mark.parametrize("alias", ["", "x" * 64, 5, None])
def test_an_alias_is_a_text_that_fits(alias: Any) -> None:
    with pytest.raises(InvalidStorageError, match="alias"):
        DjangoStorage(alias)


# The checks


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ([], "E001"),
        ({"default": {}}, "E001"),
        ({"default": {"BACKEND": DJANGO, "TIMEOUT": 5}}, "E001"),
        (one("nowhere.Storage"), "E002"),
        (one(NONE), "E002"),
        (one(colour="blue"), "E003"),
        (one(OWN, colour="blue"), "E003"),
        (one(database="nowhere"), "E005"),
    ],
)
def test_a_wrong_setting_is_a_check_error_with_a_hint(setting: Any, code: str) -> None:
    found = messages(setting)
    assert [message.id for message in found] == [f"fsm_storage.{code}"]
    assert found[0].is_serious()
    assert found[0].hint


def test_the_settings_of_the_example_project_pass() -> None:
    assert run_checks(tags=["fsm_storage"]) == []


def test_any_storage_of_aiograms_may_be_a_backend() -> None:
    assert messages(one("fsm_storage.MemoryStorage")) == []
    assert messages(one(OWN, flavour="hot")) == []


def test_every_alias_is_checked() -> None:
    found = messages(
        {
            "a": {"BACKEND": DJANGO, "OPTIONS": {"state_ttl": 0}},
            "b": {"BACKEND": DJANGO, "OPTIONS": {"data_ttl": -1}},
        }
    )
    assert len(found) == 2
    assert "'a'" in found[0].msg
    assert "'b'" in found[1].msg


def test_a_database_that_has_no_dialect_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(connections["default"]), "vendor", "oracle")
    found = messages(one())
    assert [message.id for message in found] == ["fsm_storage.E006"]
    assert "oracle" in found[0].msg


async def test_a_database_of_no_use_is_an_error_at_the_first_call_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bot that `manage.py` did not start has not seen the checks."""
    key = StorageKey(1, 2, 3)
    with pytest.raises(InvalidStorageError, match=r"'nope' is not in DATABASES\. It has default"):
        await DjangoStorage(database="nope").get_state(key)
    with monkeypatch.context() as patch:
        patch.setitem(connections["default"].settings_dict, "TIME_ZONE", "Europe/Berlin")
        with pytest.raises(InvalidStorageError, match="UTC"):
            await DjangoStorage().get_state(key)
    monkeypatch.setattr(type(connections["default"]), "vendor", "oracle")
    with pytest.raises(InvalidStorageError, match="oracle"):
        await DjangoStorage().get_state(key)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["IMMEDIATE", "journal_mode"]),
        ({"transaction_mode": "IMMEDIATE"}, ["journal_mode"]),
        ({"init_command": "PRAGMA journal_mode = WAL"}, ["IMMEDIATE"]),
        ({"transaction_mode": "DEFERRED", "init_command": "PRAGMA journal_mode=WAL"}, ["IMMEDIATE"]),
    ],
)
def test_a_sqlite_that_is_not_set_up_for_two_processes_is_a_warning(
    options: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "OPTIONS", options)
    found = messages(one())
    assert [message.id for message in found] == ["fsm_storage.W001"]
    assert all(word in found[0].hint for word in words)
    assert len([word for word in ("IMMEDIATE", "journal_mode") if word in found[0].hint]) == len(words)


def test_a_sqlite_in_local_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "TIME_ZONE", "Europe/Berlin")
    assert "fsm_storage.E008" in [message.id for message in messages(one())]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("tests.no_such_module.expiry", "cannot be imported"),
        ("tests.unit.test_settings.ROOT_OF_NOTHING", "cannot be imported"),
        ("django.conf.settings", "must be an Expiry"),
        (5, "must be an Expiry"),
    ],
)
def test_a_wrong_expiry_is_an_error(path: object, problem: str) -> None:
    with override_settings(FSM_STORAGES={"default": {"BACKEND": DJANGO, "OPTIONS": {"expiry": path}}}):
        (message,) = [one for one in run_checks(tags=["fsm_storage"]) if one.id == "fsm_storage.E007"]
        assert problem in message.msg
    good = {"expiry": "tests.database.expiring.expiry"}
    with override_settings(FSM_STORAGES={"default": {"BACKEND": DJANGO, "OPTIONS": good}}):
        assert [one for one in run_checks(tags=["fsm_storage"]) if one.id == "fsm_storage.E007"] == []
