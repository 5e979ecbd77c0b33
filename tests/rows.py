"""What tests ask of the tables, past the storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from django.db import OperationalError, connections
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


def now_of(database: str, seconds: float = 0) -> str:
    """Return the SQL of the database's clock, so many seconds from now."""
    if database == "default":
        return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '{seconds} seconds')"
    clock = "now()" if database == "postgres" else "UTC_TIMESTAMP(6)"
    return f"({clock} + interval '{seconds}' second)"


def data_as_text(database: str) -> str:
    return "data::text" if database == "postgres" else "data"


class OtherSession:
    """Somebody else's connection to a server, in a transaction until it commits or rolls back."""

    def __init__(self, database: str) -> None:
        facts = connections[database].settings_dict
        self._connection: Any
        if database == "postgres":
            self._connection = psycopg.connect(host=facts["HOST"], user=facts["USER"], dbname=facts["NAME"])
        else:
            import MySQLdb

            # At READ COMMITTED, as Django connects.
            self._connection = MySQLdb.connect(
                unix_socket=facts["HOST"],
                user=facts["USER"],
                database=facts["NAME"],
                init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            )

    def execute(self, sql: str, params: Any = None) -> Sequence[tuple[Any, ...]]:
        cursor = self._connection.cursor()
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []

    def commit(self) -> None:
        self._connection.commit()

    def rollback(self) -> None:
        self._connection.rollback()

    def close(self) -> None:
        self._connection.rollback()
        self._connection.close()


def is_deadlock(error: Exception) -> bool:
    return isinstance(error, psycopg.errors.DeadlockDetected) or error.args[0] == 1213


def others(database: str) -> int:
    """Return how many other connections there are to this database on a server; on SQLite, none count."""
    if database == "default":
        return 0
    if database == "mariadb":
        sql = """SELECT count(*) FROM information_schema.processlist
                 WHERE db = database() AND id <> connection_id()"""
    else:
        sql = """SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""
    return int(execute(database, sql)[0][0])


def drop_connections(database: str, who: str = "%") -> int:
    """End the connections of others whose last statement is like `who`; return how many they were."""
    if database == "mariadb":
        sql = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
        ids = [row[0] for row in execute(database, sql)]
        for number in ids:
            with suppress(OperationalError):  # it went by itself
                execute(database, f"KILL {number}")
        return len(ids)
    sql = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE %s"""
    return int(execute(database, sql, [who])[0][0])
