"""Statements straight to libpq, on a psycopg connection that commits by itself.

A cursor of psycopg costs about 30 µs a statement for what we do not need: it parses the text,
looks up how to dump each parameter and how to load each column. Ours are few, and known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import OperationalError
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus

from fsm_storage.dialects import Rows

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGconn, PGresult

_PLACEHOLDER = re.compile(r"%(?:\((\w+)\))?s|%%")
_LOADERS: dict[int, Callable[[bytes], Any]] = {
    16: b"t".__eq__,  # boolean
    20: int,  # bigint
    23: int,
    25: bytes.decode,  # text
    701: float,
    705: bytes.decode,  # a literal
    1043: bytes.decode,  # varchar
    1184: lambda text: datetime.fromisoformat(text.decode()),
    2278: bytes.decode,  # void
}
"""How to read a column, by the type's OID."""


class _Native(NamedTuple):
    """A statement as the server knows it, and the names of its parameters where they have names."""

    sql: bytes
    names: tuple[str, ...]


class Bound(NamedTuple):
    """A statement as it was written, as the server knows it, and the values of its parameters."""

    text: str
    sql: bytes
    values: list[bytes | None]


class Prepared:
    """Executes statements on one connection, each prepared at its first time if `prepares`.

    Raises what psycopg's cursors raise. Not within a transaction that psycopg begins by itself.
    """

    def __init__(self, connection: Connection[Any], *, prepares: bool) -> None:
        self._pgconn: PGconn = connection.pgconn
        self._encoding = connection.info.encoding
        self._prepares = prepares
        self._names: dict[str, bytes] = {}

    def execute(self, sql: str, params: Sequence[Any] | Mapping[str, Any]) -> Rows:
        bound = self.bound(sql, params)
        if self._prepares:
            name = self._names.get(sql) or self._prepare(bound)
            # A NULL is None here too, which the annotation forgets.
            result = self._pgconn.exec_prepared(name, bound.values)  # type: ignore[arg-type]
        else:
            result = self._pgconn.exec_params(bound.sql, bound.values)
        return self._rows(result)

    @staticmethod
    def bound(sql: str, params: Sequence[Any] | Mapping[str, Any]) -> Bound:
        """Return the statement and its parameters as they go to the server."""
        native = _native(sql)
        values = [params[name] for name in native.names] if isinstance(params, Mapping) else params
        return Bound(sql, native.sql, [dumped(value) for value in values])

    @staticmethod
    def name_of(bound: Bound) -> bytes:
        """Return what a prepared statement is called: on whichever connection a pooler gives us, it is this one."""
        return b"fsm_storage_" + sha256(bound.sql).hexdigest()[:24].encode()

    def _prepare(self, bound: Bound) -> bytes:
        name = self.name_of(bound)
        self._check(self._pgconn.prepare(name, bound.sql))
        self._names[bound.text] = name
        return name

    def _rows(self, result: PGresult) -> Rows:
        self._check(result)
        columns = range(result.nfields)
        loaders = [_LOADERS[result.ftype(column)] for column in columns]
        get = result.get_value
        return [
            tuple(
                [
                    None if (value := get(row, column)) is None else loader(value)
                    for column, loader in zip(columns, loaders, strict=True)
                ]
            )
            for row in range(result.ntuples)
        ]

    def _check(self, result: PGresult) -> None:
        if result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            return
        # Without an SQLSTATE it is libpq that speaks: the connection is lost, though it may not know yet.
        if self._pgconn.status == ConnStatus.BAD or not result.error_field(DiagnosticField.SQLSTATE):
            raise OperationalError(f"the connection is lost: {result.get_error_message(self._encoding)}")
        raise error_from_result(result, self._encoding)


@cache
def _native(sql: str) -> _Native:
    """Number the parameters; those of one name are one."""
    names: list[str] = []
    count = 0

    def numbered(match: re.Match[str]) -> str:
        nonlocal count
        if match[0] == "%%":
            return "%"
        if match[1] is None:
            count += 1
            return f"${count}"
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return _Native(_PLACEHOLDER.sub(numbered, sql).encode(), tuple(names))


def dumped(value: Any) -> bytes | None:
    """Return the text of a parameter, whose type the statement says. A list becomes an array."""
    if isinstance(value, str):
        return value.encode()
    if value is None:
        return None
    if isinstance(value, list):
        return f"{{{','.join(map(_element, value))}}}".encode()
    return _scalar(value).encode()


def _element(value: Any) -> str:
    if isinstance(value, str):
        if "\\" in value or '"' in value:
            value = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{value}"'
    return "NULL" if value is None else _scalar(value)


def _scalar(value: Any) -> str:
    if value is True or value is False:
        return "t" if value else "f"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"no parameter is made of {type(value).__name__}")
