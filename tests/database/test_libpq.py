"""The way past psycopg's cursors: what goes in comes out, and errors are psycopg's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connections

from fsm_storage.backends.libpq import Prepared, dumped
from tests.conftest import POSTGRES

NASTY = ["", " ", "NULL", "null", '"', "\\", 'a\\"b', "{a,b}", "é😀", "a\nb\t", "%s", "'; DROP", "{}", ","]
pytestmark = list(POSTGRES.marks)


@pytest.fixture(params=[True, False], ids=["prepared", "unprepared"])
def direct(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    connection = connections["postgres"]
    connection.ensure_connection()
    yield Prepared(connection.connection, prepares=request.param)
    connection.close()


def test_texts_come_back_as_they_went(direct: Prepared) -> None:
    for text in NASTY:
        assert direct.execute("SELECT %s::text", [text]) == [(text,)]
    rows = direct.execute("SELECT unnest(%s::text[])", [[*NASTY, None]])
    assert [text for (text,) in rows] == [*NASTY, None]


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("bigint", [0, -1, 2**63 - 1, -(2**63), None]),
        ("boolean", [True, False, None]),
        ("text", []),
    ],
)
def test_arrays_of_other_types(direct: Prepared, type_: str, values: list[Any]) -> None:
    rows = direct.execute(f"SELECT unnest(%s::{type_}[])", [values])
    assert [value for (value,) in rows] == values


@pytest.mark.parametrize("value", [0.1, 1e-300, 172800.0, 2.5])
def test_floats_keep_their_value(direct: Prepared, value: float) -> None:
    assert direct.execute("SELECT %s::float8 = %s::float8", [value, repr(value)]) == [(True,)]


def test_a_name_is_one_parameter_however_often_it_is_used(direct: Prepared) -> None:
    rows = direct.execute(
        "SELECT %(a)s::text, %(b)s::bigint, %(a)s::text, 7 %% 4", {"b": 5, "unused": 1, "a": "x"}
    )
    assert rows == [("x", 5, "x", 3)]


def test_a_statement_is_prepared_once() -> None:
    connections["postgres"].ensure_connection()
    connection = connections["postgres"].connection
    direct = Prepared(connection, prepares=True)
    for _ in range(3):
        direct.execute("SELECT %s::text", ["x"])
    names = direct.execute(
        "SELECT name::text FROM pg_prepared_statements WHERE name LIKE %s", ["fsm_storage%"]
    )
    assert len(names) == 2
    # By what it says: on a connection that a pooler gives instead, the name means the same or nothing.
    assert {name.encode() for (name,) in names} == set(direct._names.values())
    assert direct.name_of(direct.bound("SELECT 1", [])) != direct.name_of(direct.bound("SELECT 2", []))
    connections["postgres"].close()


def test_an_error_has_its_class_and_the_connection_goes_on(direct: Prepared) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable) as caught:
        direct.execute("SELECT * FROM no_such_table", [])
    assert caught.value.sqlstate == "42P01"
    with pytest.raises(psycopg.errors.DivisionByZero):
        direct.execute("SELECT 1 / %s::bigint", [0])
    assert direct.execute("SELECT %s::bigint", [1]) == [(1,)]


def test_a_lost_connection_is_an_operational_error(direct: Prepared) -> None:
    pid = direct.execute("SELECT pg_backend_pid()", [])[0][0]
    with psycopg.connect(connections["postgres"].connection.info.dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
    with pytest.raises(psycopg.OperationalError):
        _ask_until_it_notices(direct)


def _ask_until_it_notices(direct: Prepared) -> None:
    for _ in range(1000):
        direct.execute("SELECT 1", [])


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        dumped({1})
    with pytest.raises(TypeError, match="bytes"):
        dumped([b"x"])
