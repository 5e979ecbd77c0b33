"""All of a project on one real database, for tests that need people and Django's log beside the records."""

from __future__ import annotations

from typing import Any

import pytest


def whole(alias: str, *marks: pytest.MarkDecorator) -> Any:
    """Return the parameter for a test on one database with the tables of all apps, unlike `tests.conftest.on`."""
    return pytest.param(alias, marks=[pytest.mark.django_db(transaction=True, databases=[alias]), *marks])


class OneDatabase:
    """A router that keeps everything in one database, as most projects have it."""

    database = "default"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.database

    db_for_write = db_for_read

    def allow_relation(self, *objects: Any, **hints: Any) -> bool:
        return True
