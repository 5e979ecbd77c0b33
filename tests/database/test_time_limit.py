"""A question that takes too long is stopped by the database, and the connection is as it was."""

from __future__ import annotations

import time

import pytest
from django.db import OperationalError, connections

from fsm_storage.admin.timelimit import TookTooLong, time_limit

LONG = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT count(*) FROM seq_1_to_1000000 a, seq_1_to_1000000 b",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e9) SELECT max(i) FROM n",
}
LIMITS = {"postgresql": "SHOW statement_timeout", "mysql": "SELECT @@SESSION.max_statement_time"}


def ask(using: str, sql: str) -> object:
    with connections[using].cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()


def test_what_takes_too_long_is_stopped(database: str) -> None:
    vendor, began = connections[database].vendor, time.monotonic()
    before = ask(database, LIMITS[vendor]) if vendor in LIMITS else None
    with pytest.raises(TookTooLong), time_limit(database, 0.2):
        ask(database, LONG[vendor])
    assert time.monotonic() - began < 15
    assert ask(database, "SELECT 7") == (7,)
    if vendor in LIMITS:
        assert ask(database, LIMITS[vendor]) == before


def test_what_is_quick_is_not_and_has_no_limit_afterwards(database: str) -> None:
    vendor = connections[database].vendor
    before = ask(database, LIMITS[vendor]) if vendor in LIMITS else None
    with time_limit(database, 5):
        assert ask(database, "SELECT 7") == (7,)
    if vendor in LIMITS:
        assert ask(database, LIMITS[vendor]) == before


def test_other_errors_stay_what_they_are(database: str) -> None:
    def fail() -> None:
        raise OperationalError("the server went away")

    with pytest.raises(OperationalError, match="went away"), time_limit(database, 5):
        fail()
