"""System checks: of `FSM_STORAGES` (backends bring those of their options), of `FSM_ADMIN`, of states in the tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from aiogram.fsm.storage.base import BaseStorage
from django.apps import AppConfig
from django.core import checks
from django.core.checks import CheckMessage, Error
from django.db import connections, router

from fsm_storage.conf import storages, takes_alias
from fsm_storage.discovery import Catalog, declared_states
from fsm_storage.exceptions import InvalidStorageError
from fsm_storage.models import FSMRecord
from fsm_storage.rights import InvalidAdminError, check_options


def check_storages(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check every configured alias."""
    try:
        aliases = list(storages.settings)
    except InvalidStorageError as error:
        return [Error(str(error), hint=f"For example FSM_STORAGES = {_EXAMPLE}", id="fsm_storage.E001")]
    messages: list[CheckMessage] = []
    for alias in aliases:
        # Two aliases on one database need not be told the same twice.
        messages += [message for message in _check_alias(alias) if message not in messages]
    return messages


_EXAMPLE = '{"default": {"BACKEND": "fsm_storage.DjangoStorage", "OPTIONS": {}}}'

_REDIS_PACKAGES = {"redis": "redis-py", "hiredis": "hiredis"}


def _check_alias(alias: str) -> list[CheckMessage]:
    try:
        backend, options = storages.configured(alias)
    except InvalidStorageError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        package = _REDIS_PACKAGES.get(str(missing).partition(".")[0])
        if package:
            hint = "pip install 'fsm_storage[redis]'"
            return [Error(f"FSM_STORAGES[{alias!r}] needs {package}.", hint=hint, id="fsm_storage.E030")]
        code = "E002" if isinstance(error.__cause__, ImportError) else "E001"
        return [Error(str(error), hint=f"For example FSM_STORAGES = {_EXAMPLE}", id=f"fsm_storage.{code}")]
    if not isinstance(backend, type) or not issubclass(backend, BaseStorage):
        return [
            Error(
                f"FSM_STORAGES[{alias!r}]['BACKEND'] is no aiogram storage.",
                hint="Name a class that derives from aiogram.fsm.storage.base.BaseStorage.",
                id="fsm_storage.E002",
            )
        ]
    own = getattr(backend, "check", None)
    if callable(own) and takes_alias(backend):
        messages: list[CheckMessage] = own(alias, options)
        return messages
    try:
        inspect.signature(backend).bind(**options)
    except TypeError as error:
        text = f"FSM_STORAGES[{alias!r}]['OPTIONS'] do not fit {backend.__name__}: {error}."
        return [Error(text, hint="They are its keyword arguments.", id="fsm_storage.E003")]
    return []


def check_admin(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check `FSM_ADMIN`."""
    try:
        check_options()
    except InvalidAdminError as error:
        hint = 'For example FSM_ADMIN = {"MASK": ["phone", "*email*"], "READ_ONLY": False}'
        return [Error(str(error), hint=hint, id="fsm_storage.E020")]
    return []


MAX_UNDECLARED = 10
"""States that the warning names; there may be more."""


OLDEST_MARIADB, OLDEST_MYSQL = (10, 6), (8, 0, 17)  # SKIP LOCKED; a binary collation without padding


def check_servers(
    app_configs: Sequence[AppConfig] | None = None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the MariaDB and MySQL servers that hold conversations."""
    ours = [using for using in databases or () if router.allow_migrate_model(using, FSMRecord)]
    return [
        message
        for using in ours
        if connections[using].vendor == "mysql"
        for message in _server_flaws(using, connections[using])
    ]


def _server_flaws(using: str, connection: Any) -> Iterator[CheckMessage]:
    oldest = OLDEST_MARIADB if connection.mysql_is_mariadb else OLDEST_MYSQL
    if connection.mysql_version < oldest:
        yield Error(
            f"Database {using!r} is {connection.display_name} {'.'.join(map(str, connection.mysql_version))}, "
            "which DjangoStorage cannot use.",
            hint="It needs MariaDB 10.6 or newer, or MySQL 8.0.17 or newer.",
            id="fsm_storage.E010",
        )
    if not connection.sql_mode & {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"}:
        yield checks.Warning(
            f"{connection.display_name} database {using!r} cuts values that are too long instead of refusing them.",
            hint=f"Add STRICT_TRANS_TABLES to sql_mode: of the server, or in DATABASES[{using!r}]['OPTIONS'].",
            id="fsm_storage.W003",
        )


def check_states(
    app_configs: Sequence[AppConfig] | None = None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn of live conversations in states that no app declares: nothing handles them any more."""
    declared = declared_states()
    if not declared.states:  # nowhere that we know of
        return []
    found = {using: _undeclared(using, declared) for using in databases or ()}
    return [_stranded(using, states) for using, states in found.items() if states]


def _stranded(using: str, states: list[str]) -> CheckMessage:
    return checks.Warning(
        f"Conversations in database {using!r} are in states that no app declares: "
        f"{', '.join(map(repr, states))}.",
        hint=f'If they were renamed, add RenameState({states[0]!r}, "…") to a migration. '
        "If they are declared outside of an app's states.py, import them there.",
        id="fsm_storage.W002",
    )


def _undeclared(using: str, declared: Catalog) -> list[str]:
    connection, records = connections[using], FSMRecord.objects.using(using)
    is_here = router.allow_migrate_model(using, FSMRecord)
    if not is_here or FSMRecord._meta.db_table not in connection.introspection.table_names():
        return []
    found = records.states_in_use(len(declared.states) + 10 * MAX_UNDECLARED)
    live = (state for state in found if state not in declared and records.in_state(state).exists())
    return list(islice(live, MAX_UNDECLARED))
