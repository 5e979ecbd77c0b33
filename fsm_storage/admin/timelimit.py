"""Limits to the time that a database may take for a question, and that a change may wait for a locked row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from django.db import OperationalError, connections, router, transaction

from fsm_storage.backends.session import Session
from fsm_storage.conf import storages
from fsm_storage.models import FSMRecord

PATIENCE = 5.0
"""Seconds for which a change waits for a record of a storage that is not configured any more."""
_STEPS = 10_000
"""Of SQLite's machine, between two looks at the clock: some tenths of a millisecond."""
# What MariaDB and MySQL give as the number of the error.
_STOPPED = {1969, 3024}


class TookTooLong(Exception):
    """The database was stopped; nothing is known of the answer."""


@contextmanager
def time_limit(using: str, seconds: float) -> Iterator[None]:
    """Let no statement of the block on `using` run for longer. Raises `TookTooLong`; for reading only.

    Elsewhere than on PostgreSQL, MariaDB, MySQL and SQLite there is no limit.
    """
    connection = connections[using]
    connection.ensure_connection()
    limits: dict[str, Callable[..., AbstractContextManager[None]]] = {
        "postgresql": _on_postgresql,
        "mysql": _on_mysql,
        "sqlite": _on_sqlite,
    }
    if connection.vendor not in limits:
        yield
        return
    try:
        with limits[connection.vendor](connection, seconds):
            yield
    except OperationalError as error:
        if _was_stopped(error):
            raise TookTooLong from error
        raise


@contextmanager
def lock_limit(alias: str) -> Iterator[None]:
    """Let the block wait for a locked record of the storage `alias` no longer than that one's `timeout`.

    A storage does so itself in a transaction of its own, but not in one that somebody else has begun.
    Not one within another.
    """
    storage: Any = storages[alias] if alias in storages.settings else None
    database = getattr(storage, "database", None) or router.db_for_write(FSMRecord)
    if not connections[database].in_atomic_block:
        yield
        return
    with Session(database, getattr(storage, "timeout", PATIENCE)).limited():
        yield


@contextmanager
def _on_postgresql(connection: Any, seconds: float) -> Iterator[None]:
    with transaction.atomic(using=connection.alias):  # a pooler may give the next transaction another session
        before = _setting(connection, "SELECT current_setting('statement_timeout')")
        _setting(connection, "SELECT set_config('statement_timeout', %s, true)", str(int(1000 * seconds)))
        yield
        _setting(connection, "SELECT set_config('statement_timeout', %s, true)", before)


@contextmanager
def _on_mysql(connection: Any, seconds: float) -> Iterator[None]:
    name, limit = ("max_statement_time", seconds)
    if not connection.mysql_is_mariadb:
        name, limit = "max_execution_time", int(1000 * seconds)
    before = _setting(connection, f"SELECT @@SESSION.{name}")
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION {name} = %s", [limit])
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION {name} = %s", [before])


@contextmanager
def _on_sqlite(connection: Any, seconds: float) -> Iterator[None]:
    ends = time.monotonic() + seconds
    connection.connection.set_progress_handler(lambda: time.monotonic() > ends, _STEPS)
    try:
        yield
    finally:
        connection.connection.set_progress_handler(None, 0)


def _setting(connection: Any, sql: str, *parameters: Any) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchone()[0]


def _was_stopped(error: OperationalError) -> bool:
    cause = error.__cause__
    if getattr(cause, "sqlstate", getattr(cause, "pgcode", None)) == "57014":  # query_canceled
        return True
    if getattr(cause, "sqlite_errorname", "") == "SQLITE_INTERRUPT":
        return True
    return bool(cause and cause.args and cause.args[0] in _STOPPED)
