"""What tests ask of the tables, past the storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from django.db import connections
from django.db.models import F

from fsm_storage.models import FSMRecord, FSMTransition

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call Django from an async test, in a thread that leaves no connection behind."""

    def call() -> T:
        try:
            return function(*arguments, **named)
        finally:
            connections.close_all()

    return await asyncio.to_thread(call)


def let_time_pass(database: str, seconds: float) -> None:
    """Make everything expire `seconds` sooner: for the database's clock, so much time has passed."""
    for part in ("state_expires_at", "data_expires_at"):
        rows = FSMRecord.objects.using(database).filter(**{f"{part}__isnull": False})
        rows.update(**{part: F(part) - timedelta(seconds=seconds)})


def record(database: str, **filters: Any) -> FSMRecord:
    return FSMRecord.objects.using(database).get(**filters)


def records(database: str) -> list[FSMRecord]:
    return list(FSMRecord.objects.using(database).order_by("key"))


def transitions(database: str, **filters: Any) -> list[tuple[Any, ...]]:
    """Return from, to, source and actor of the transitions, oldest first."""
    rows = FSMTransition.objects.using(database).filter(**filters).order_by("id")
    return list(rows.values_list("from_state", "to_state", "source", "actor"))


def execute(database: str, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
    with connections[database].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []
