"""Sends the statements of a plan to the database, on one connection. No retries, no SQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import Error, InterfaceError, OperationalError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from fsm_storage.dialects import Dialect, Plan, Rows

if TYPE_CHECKING:
    from fsm_storage.backends.libpq import Prepared

T = TypeVar("T")


class Unit:
    """One attempt at one batch: a connection, and one cursor on it."""

    def __init__(self, connection: BaseDatabaseWrapper, dialect: Dialect) -> None:
        self.connection, self.dialect = connection, dialect
        self._is_watched = bool(connection.execute_wrappers) or connection.queries_logged
        self._cursor: Any = None
        self.direct: Prepared | None = None
        # Quiet statements that go with the next one.
        self._quiet: list[tuple[str, Any]] = []

    @property
    def is_nested(self) -> bool:
        """Whether somebody else's transaction is open, who will commit it."""
        connection = self.connection
        return connection.in_atomic_block or (connection.connection is not None and not connection.autocommit)

    @property
    def joins(self) -> bool:
        """Whether several statements can be sent as one, which is what mysqlclient does unless told not to."""
        connection = self.connection
        return (
            self.dialect.joins
            and connection.settings_dict["OPTIONS"].get("multi_statements", True)
            and getattr(connection, "Database").__name__ == "MySQLdb"  # noqa: B009 - it is not in the stubs
        )

    def execute(self, sql: str, params: Any = (), is_quiet: bool = False) -> Rows:
        if self.direct is not None and not self._is_watched and not self.connection.in_atomic_block:
            with self.connection.wrap_database_errors:
                return self.direct.execute(sql, params)
        if self._cursor is None:
            self._cursor = self._open()
        cursor = self._cursor
        if self._is_watched and self.dialect.paramstyle == "qmark":
            sql = sql.replace("%", "%%").replace("?", "%s")
        if is_quiet and self.joins:
            self._quiet.append((sql, params))
            return []
        if self._quiet:
            joined, self._quiet = [*self._quiet, (sql, params)], []
            sql, params = "; ".join(sql for sql, _ in joined), [value for _, some in joined for value in some]
        with self.connection.wrap_database_errors:
            cursor.execute(sql, params)
            rows = cursor.fetchall() if cursor.description else []
            while self.dialect.joins and cursor.nextset():
                rows = cursor.fetchall() if cursor.description else []
            return rows

    def flush(self) -> None:
        """Send the quiet statements that nothing followed."""
        if self._quiet:
            self.execute(*self._quiet.pop())

    def run(self, plan: Plan[T]) -> T:
        """Drive `plan` to its end and return its replies."""
        try:
            statement = next(plan)
            while True:
                statement = plan.send(self.execute(*statement))
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            plan.close()

    def run_committed(self, plan: Plan[T]) -> T:
        """Run a plan of which all or nothing shall happen."""
        if self.dialect.write_begin is None and not self.is_nested:
            return self.run(plan)  # one statement, which commits itself
        return self.run_in_transaction(plan)

    def run_in_transaction(self, plan: Plan[T]) -> T:
        with self.transaction():
            return self.run(plan)

    @contextmanager
    def transaction(self, wait: float | None = None) -> Iterator[None]:
        """A transaction that may write; within another one, a savepoint. `wait`: seconds for a locked row."""
        begin, is_outermost = self.dialect.write_begin, not self.is_nested
        before, after = self.dialect.lock_limits(wait) if wait is not None and is_outermost else ((), ())
        if begin is None or not is_outermost:
            with transaction.atomic(using=self.connection.alias):
                for sql in before:
                    self.execute(sql)
                yield
                self.flush()
            return
        # Not atomic(): it would begin a transaction that may fail half-way, at its first write.
        for sql in (*before, begin):
            self.execute(sql, is_quiet=True)
        try:
            yield
            for sql in after:
                self.execute(sql, is_quiet=True)
            self.execute("COMMIT")
        except BaseException:
            self._quiet.clear()
            with suppress(Error):
                for sql in ("ROLLBACK", *after):
                    self.execute(sql)
            raise

    def is_broken(self, error: Error) -> bool:
        """Say whether the connection is of no more use after `error`."""
        if isinstance(error, InterfaceError):
            return True
        if self.connection.connection is None:  # which Django's wrapper for MySQL does not stand
            return True
        return isinstance(error, OperationalError) and not self.connection.is_usable()

    def _open(self) -> Any:
        """Return a cursor of the driver's own: Django's rewrites each statement and its parameters.

        Where somebody watches the queries, they go through Django's wrapper, which tells them.
        """
        connection = self.connection
        connection.ensure_connection()
        if self.dialect.binds_on_server:
            from psycopg import Cursor

            cursor: Any = Cursor(connection.connection)
        else:
            cursor = connection.create_cursor() if self._is_watched else connection.connection.cursor()
        if not self._is_watched:
            return cursor
        watched = connection.make_debug_cursor if connection.queries_logged else connection.make_cursor
        return watched(cursor)
