"""Carries plans out on the calling thread's Django connection: transactions, retries, errors. No SQL."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from django.apps import apps
from django.core.exceptions import AppRegistryNotReady
from django.db import (
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    OperationalError,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper

from fsm_storage.backends.forks import at_work
from fsm_storage.backends.options import check_database
from fsm_storage.backends.unit import Unit
from fsm_storage.dialects import (
    LOCKED,
    AsOf,
    Dialect,
    Errand,
    Read,
    ReadReply,
    Scope,
    Spared,
    Sweep,
    Write,
    WriteReply,
    dialect_for,
)
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidData,
    InvalidStorageError,
    NotMigrated,
    StorageUnavailable,
    VersionConflict,
)

if TYPE_CHECKING:
    from fsm_storage.backends.libpq import Prepared

T = TypeVar("T")
logger = logging.getLogger("fsm_storage")

GIVE_UP_SHARE = 0.05
"""Stop trying this share of the timeout before the caller stops waiting, so that it learns the cause."""
MAX_CONTENDED = 1000
_NO_GUARD = nullcontext()


class Session:
    """The database of a storage, as seen from whichever thread calls."""

    def __init__(self, database: str, timeout: float) -> None:
        self.database, self.timeout = database, timeout
        self._dialect: Dialect | None = None
        self._is_embedded = False
        # The driver's connection of a worker thread on which the session statements have run.
        self._thread = threading.local()
        # Keys whose row was locked lately: they do not go the short way, on which the thread waits.
        self._contended: set[str] = set()
        # The server has lost what was prepared: a pooler stands between, and nothing is prepared any more.
        self._is_pooled = False

    @property
    def dialect(self) -> Dialect:
        """The dialect of the database. Raises `InvalidStorageError` where there is none."""
        if self._dialect is None:
            if not apps.ready:
                raise AppRegistryNotReady(
                    "a DjangoStorage was used before Django was set up: call django.setup() first, "
                    "with DJANGO_SETTINGS_MODULE in the environment"
                )
            # A bot that manage.py did not start has not seen the system checks.
            for flaw in check_database("DjangoStorage", self.database):
                if flaw.is_serious():
                    raise InvalidStorageError(f"{flaw.msg} {flaw.hint}")
            self._dialect = cast(Dialect, dialect_for(connections[self.database].vendor))
            self._is_embedded = self._dialect.is_embedded
        return self._dialect

    def read(self, reads: Sequence[Read], scope: Scope, deadline: float) -> Sequence[ReadReply]:
        """Answer each read, with an error too; never raises."""
        return self._each(reads, lambda unit, some: unit.run(unit.dialect.read(some, scope)), deadline)

    def write(self, writes: Sequence[Write], scope: Scope, deadline: float) -> Sequence[WriteReply]:
        """Carry the writes out in one transaction and answer each; never raises.

        A write that the database refuses (not for a passing reason) is found by carrying each out alone.
        """
        replies = self._each(writes, lambda unit, some: self._write(unit, some, scope), deadline)
        if self._contended or LOCKED in replies:
            self._remember_contended(writes, replies)
        return replies

    def carry_out(self, errands: Sequence[Errand], scope: Scope, deadline: float) -> Sequence[Any]:
        """Carry out errands of one kind in one transaction and answer each, with an error too; never raises."""
        plan = type(errands[0]).plan
        return self._each(
            errands, lambda unit, some: unit.run_committed(plan(unit.dialect, some, scope)), deadline
        )

    def are_free(self, ops: Sequence[Any]) -> bool:
        """Say whether none of the writes meets a row that was found locked lately."""
        return not self._contended or self._contended.isdisjoint(op.key for op in ops)

    def write_here(
        self, writes: Sequence[Write], scope: Scope, *, conflicts_raise: bool = True
    ) -> Sequence[WriteReply]:
        """Carry the writes out in the caller's transaction, or in one of their own; wait for locked rows.

        Raises the first error, after undoing all of them. Without `conflicts_raise`, a write whose
        record is at another version is answered with `VersionConflict`, and the others are done.
        """
        deadline = time.monotonic() + self.timeout
        attempt = 0
        while True:
            unit = self._unit()
            try:
                with self.guard(), unit.transaction(wait=self.timeout):
                    replies = self._until_done(partial(self._write_waiting, unit, scope), writes, deadline)
                    for reply in replies:
                        if isinstance(reply, BaseException) and (
                            conflicts_raise or not isinstance(reply, VersionConflict)
                        ):
                            raise reply
                    return replies
            except (DataError, IntegrityError) as error:
                raise _refused(writes[0].key if len(writes) == 1 else None, self.database, error) from error
            except Error as error:
                if unit.is_nested or not self._may_retry(unit, error, deadline, attempt):
                    raise self._translate(error) from error
                attempt += 1

    def atomically(self, work: Callable[[], T]) -> T:
        """Do work through the ORM in a transaction, anew after a fault that may pass. It must begin with a write."""

        def run(unit: Unit) -> T:
            with self.limited():
                return work()

        return self._retried(run, time.monotonic() + self.timeout)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """A transaction, or a savepoint in the caller's, that waits no longer than the timeout for a locked row.

        Not one within another: what it restores at the end would be the limit of the outer one.
        """
        unit = self._unit()
        before, after = unit.dialect.lock_limits(self.timeout)
        try:
            with transaction.atomic(using=self.database):
                for sql in before:
                    unit.execute(sql)
                yield
        finally:
            with suppress(Error):
                for sql in after:
                    unit.execute(sql)

    def write_patiently(self, writes: Sequence[Write], scope: Scope) -> Sequence[WriteReply]:
        """As `write`, but wait for locked rows too. Raises `StorageUnavailable` if they stay locked."""
        deadline = time.monotonic() + self.timeout
        return self._until_done(lambda some: self.write(some, scope, deadline), writes, deadline)

    def sweep(self, scope: Scope, limit: int, spared: Spared, as_of: AsOf | None = None) -> Sweep:
        """Clear and delete up to `limit` of each kind."""
        deadline = time.monotonic() + self.timeout
        self._retried(lambda unit: unit.run_committed(unit.dialect.sweep_leases(scope, limit)), deadline)
        return self._retried(
            lambda unit: unit.run_in_transaction(unit.dialect.sweep(scope, limit, spared, as_of)), deadline
        )

    def retried(self, question: Callable[[], T]) -> T:
        """Call `question`, which asks through Django's ORM, again while the database fails for a moment."""
        return self._retried(lambda unit: question(), time.monotonic() + self.timeout)

    def after_commit(self, function: Callable[[], None]) -> None:
        """Call `function` once the caller's transaction is committed: now, if there is none."""
        connection = connections[self.database]
        if connection.in_atomic_block or connection.get_autocommit():
            transaction.on_commit(function, using=self.database, robust=True)
        else:  # the caller commits by hand, and Django does not learn when
            function()

    def release(self) -> None:
        """Close this thread's connection."""
        self._thread.connection = None
        with self.guard(), suppress(Error):
            connections[self.database].close()

    def guard(self) -> AbstractContextManager[Any]:
        """Return what the calling thread holds while it is in the database's library, where a fork minds it."""
        return at_work.guard() if self._is_embedded else _NO_GUARD

    def _unit(self) -> Unit:
        wrapper = connections[self.database]
        if at_work.is_ours:
            at_work.keep(wrapper)
        return Unit(wrapper, self.dialect)

    def _each(
        self, ops: Sequence[Any], run: Callable[[Unit, Sequence[Any]], list[Any]], deadline: float
    ) -> list[Any]:
        def prepared(unit: Unit) -> list[Any]:
            self._prepare(unit)
            return run(unit, ops)

        try:
            return self._retried(prepared, deadline)
        except FSMStorageError as error:
            return [self._copy(error) for _ in ops]
        except Error as error:
            if len(ops) == 1:
                return [_refused(ops[0].key, self.database, error)]
            return [reply for op in ops for reply in self._each([op], run, deadline)]

    def _retried(self, run: Callable[[Unit], T], deadline: float) -> T:
        attempt = 0
        while True:
            unit = self._unit()
            try:
                with self.guard():
                    return run(unit)
            except Error as error:
                if not self._may_retry(unit, error, deadline, attempt):
                    raise self._translate(error) from error
                attempt += 1

    def _prepare(self, unit: Unit) -> None:
        """Look after the worker thread's connection as Django does at the start of a request.

        But one without CONN_MAX_AGE is kept while there is work: a batch is no request.
        """
        connection = unit.connection
        if connection.in_atomic_block:
            return
        if connection.settings_dict["CONN_MAX_AGE"] and connection.settings_dict["AUTOCOMMIT"]:
            connection.close_if_unusable_or_obsolete()
        connection.ensure_connection()
        if not connection.autocommit:  # a project's setting; nobody would commit here
            connection.set_autocommit(True)
        if getattr(self._thread, "connection", None) is not connection.connection:
            for sql in unit.dialect.session(self.timeout):
                unit.execute(sql)
            self._thread.connection = connection.connection
            self._thread.direct = self._direct(unit)
            self._thread.dialect = unit.dialect.at(getattr(connection, "pg_version", 0))
        unit.direct, unit.dialect = self._thread.direct, self._thread.dialect

    def _direct(self, unit: Unit) -> Prepared | None:
        """Return the way past psycopg's cursors, where there is one."""
        if not unit.dialect.binds_on_server:
            return None
        from fsm_storage.backends.libpq import Prepared

        return Prepared(unit.connection.connection, prepares=self.may_prepare(unit.connection))

    def may_prepare(self, connection: BaseDatabaseWrapper) -> bool:
        """Prepared statements belong to a server connection, which a pooler may swap: these settings say so."""
        settings = connection.settings_dict
        options = settings["OPTIONS"]
        has_own_rule = "prepare_threshold" in options or settings.get("DISABLE_SERVER_SIDE_CURSORS")
        return not (has_own_rule or options.get("pool") or self._is_pooled)

    def _write(
        self, unit: Unit, writes: Sequence[Write], scope: Scope, *, may_wait: bool = True
    ) -> list[WriteReply]:
        """Carry out a batch. If a locked row stops it, leave locked rows out, and at last go write by write."""
        free = may_wait and self.are_free(writes)
        try:
            return unit.run_committed(unit.dialect.write(writes, scope, free=free))
        except OperationalError as error:
            if not unit.dialect.is_lock_timeout(*_facts(error)):
                raise
        if len(writes) == 1:
            return [LOCKED]
        if free:
            return self._write(unit, writes, scope, may_wait=False)
        return [reply for write in writes for reply in self._write(unit, [write], scope)]

    def _copy(self, error: FSMStorageError) -> Exception:
        """Return an error of its own for each caller; one that several raise would mix their tracebacks."""
        cause = error.__cause__
        if not isinstance(cause, Error):
            return error
        copy = self._translate(cause)
        copy.__cause__ = cause
        return copy

    def _write_waiting(self, unit: Unit, scope: Scope, writes: Sequence[Write]) -> Sequence[WriteReply]:
        return unit.run(unit.dialect.write(writes, scope, wait=True))

    def _until_done(
        self,
        write: Callable[[Sequence[Write]], Sequence[WriteReply]],
        writes: Sequence[Write],
        deadline: float,
    ) -> list[WriteReply]:
        replies: dict[str, WriteReply] = {}
        while missing := [one for one in writes if replies.get(one.key, LOCKED) == LOCKED]:
            if time.monotonic() > deadline:
                raise StorageUnavailable(self.database, TimeoutError("the records stayed locked"))
            if replies:
                time.sleep(0.01)
            replies.update(zip((one.key for one in missing), write(missing), strict=True))
        return [replies[one.key] for one in writes]

    def _remember_contended(self, writes: Sequence[Write], replies: Sequence[WriteReply]) -> None:
        for write, reply in zip(writes, replies, strict=True):
            if reply != LOCKED:
                self._contended.discard(write.key)
            elif len(self._contended) < MAX_CONTENDED:
                self._contended.add(write.key)

    def _may_retry(self, unit: Unit, error: Error, deadline: float, attempt: int) -> bool:
        """Say whether to try again, after waiting a little."""
        code, message = _facts(error)
        is_pooled = unit.dialect.is_pooled(code)
        self._is_pooled = self._is_pooled or is_pooled
        is_useless = is_pooled or unit.dialect.has_stale_plan(code) or unit.is_broken(error)
        if is_useless and not unit.is_nested:
            self.release()
        # Without a code, only the class tells a fault of the moment from one of the operation.
        may_pass = isinstance(error, OperationalError) or code is not None
        is_transient = may_pass and unit.dialect.is_transient(code, message)
        if not isinstance(error, InterfaceError) and not is_transient:
            return False
        delay = min(0.01 * 2**attempt, 0.25) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
        if time.monotonic() + delay > deadline - GIVE_UP_SHARE * self.timeout:
            return False
        logger.info("database %r: %s; trying again", self.database, error)
        time.sleep(delay)
        return True

    def _translate(self, error: Error) -> Exception:
        """Return what the caller gets for `error`; an error of one operation's own comes back as it is."""
        if isinstance(error, DatabaseError) and self.dialect.is_missing_table(*_facts(error)):
            return NotMigrated(self.database)
        if isinstance(error, OperationalError | InterfaceError):
            return StorageUnavailable(self.database, error)
        return error


def _facts(error: Error) -> tuple[str | None, str]:
    """Return the SQLSTATE or the error's number, whichever the driver gives, and the message."""
    if error.args and type(error.args[0]) is int:
        return str(error.args[0]), str(error.args[-1])
    return getattr(error.__cause__, "sqlstate", None), str(error)


def _refused(key: str | None, database: str, error: Error) -> Exception:
    """Return the error of an operation that the database refuses when it comes alone."""
    refused: Exception = StorageUnavailable(database, error)
    if isinstance(error, DataError | IntegrityError):
        refused = InvalidData("", f"is refused by the database: {str(error).strip()}", key)
    refused.__cause__ = error
    return refused
