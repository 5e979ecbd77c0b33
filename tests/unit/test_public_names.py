"""Importing the package: early, lazily, and with a clear word when it is used too early."""

from __future__ import annotations

import fsm_storage
from tests.servers import run_python

EARLY = """
import sys
import fsm_storage
assert "aiogram" not in sys.modules and "django" not in sys.modules, "importing the package loads neither"
for name in fsm_storage.__all__:
    assert getattr(fsm_storage, name) is not None, name
from fsm_storage import *
from fsm_storage import DjangoStorage, MemoryStorage, StorageKey, storages
import aiogram.fsm.storage.base, aiogram.fsm.storage.memory
assert MemoryStorage is aiogram.fsm.storage.memory.MemoryStorage
assert StorageKey is aiogram.fsm.storage.base.StorageKey

storage = DjangoStorage(state_ttl=5)  # a module of the bot's may make it before Django is set up
import asyncio, django
from django.apps import apps
assert not apps.ready
for operation in (lambda: storage.get_state(StorageKey(1, 2, 3)), lambda: storage.set_data(StorageKey(1, 2, 3), {})):
    try:
        asyncio.run(operation())
    except Exception as error:
        print(type(error).__name__, "django.setup()" in str(error))
django.setup()
assert storages["default"] is storages["default"]
try:
    fsm_storage.no_such_name
except AttributeError as error:
    print(error)
"""


def test_the_names_can_be_imported_before_django_is_set_up() -> None:
    assert run_python(EARLY).splitlines() == [
        "AppRegistryNotReady True",
        "AppRegistryNotReady True",
        "module 'fsm_storage' has no attribute 'no_such_name'",
    ]


def test_the_pytest_plugin_loads_nothing_of_weight() -> None:
    """pytest loads it in every run of an environment that has the package."""
    code = """
import sys
import fsm_storage.pytest_plugin
print(sorted({name.split(".")[0] for name in sys.modules} & {"aiogram", "django", "asgiref", "psycopg", "aiohttp"}))
"""
    assert run_python(code) == "[]\n"


def test_every_public_name_has_a_home() -> None:
    assert set(fsm_storage.__all__) == set(fsm_storage._HOMES)
