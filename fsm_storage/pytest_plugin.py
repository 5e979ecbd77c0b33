"""pytest fixtures for projects that use this app.

pytest loads this module in every run of an environment that has the package, so it imports nothing
of Django, of aiogram or of this app before a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aiogram.fsm.storage.base import BaseStorage

# The contract's assertions then explain themselves like those of a test module.
pytest.register_assert_rewrite("fsm_storage.testing")


@pytest.fixture
def fsm_storages_in_transaction(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every configured `DjangoStorage` work inside the transaction of a Django `TestCase`.

    A storage commits in a thread of its own, which sees nothing of a test's open transaction. With
    this fixture, each operation runs on the connection that `TestCase` uses, so its rows are seen
    by the test, and rolled back after it.

    It reaches what `sync_to_async` reaches: async methods of a `TestCase`, and `async_to_sync` in
    a synchronous test. A test that pytest-asyncio runs has its ORM calls in another thread than
    its transaction, whatever the storage does: mark it `django_db(transaction=True)`, and the
    storage needs no fixture.
    """
    from fsm_storage.backends.django import DjangoStorage
    from fsm_storage.conf import storages

    create = storages.create_connection

    def switched(alias: str) -> BaseStorage:
        storage = create(alias)
        if isinstance(storage, DjangoStorage):
            monkeypatch.setattr(storage, "in_transaction", True)
        return storage

    # Those that exist are changed and not made anew, because a Dispatcher may hold them already.
    monkeypatch.setattr(storages, "create_connection", switched)
    for alias in storages.settings:
        storage = storages[alias]
        if isinstance(storage, DjangoStorage):
            monkeypatch.setattr(storage, "in_transaction", True)
    yield
    monkeypatch.undo()
