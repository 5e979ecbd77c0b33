"""What the options of a storage may be: errors for the constructor, system checks for the settings."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aiogram.fsm.storage.base import KeyBuilder
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error
from django.db import connections
from django.utils.module_loading import import_string

from fsm_storage.conf import parameters
from fsm_storage.dialects import dialect_for
from fsm_storage.exceptions import InvalidStorageError
from fsm_storage.keys import MAX_ALIAS_LENGTH, text_flaw
from fsm_storage.patches import ttl_seconds


def checked_options(alias: str, options: Mapping[str, Any]) -> None:
    """Raise `InvalidStorageError` for the first option that is wrong."""
    for name, problem, _ in _problems(alias, options):
        raise InvalidStorageError(f"storage {alias!r}: {name} {problem}")


def check_options(backend: type, alias: str, options: Mapping[str, Any]) -> list[CheckMessage]:
    """Return the system-check messages for the `OPTIONS` of one alias."""
    where = f"FSM_STORAGES[{alias!r}]"
    return [
        *check_names_and_values(backend, alias, options),
        *check_database(where, options.get("database", "default")),
    ]


def check_names_and_values(backend: type, alias: str, options: Mapping[str, Any]) -> list[CheckMessage]:
    """Return the messages for options that the storage does not take, or not so."""
    where = f"FSM_STORAGES[{alias!r}]"
    known = [name for name in parameters(backend) if name != "alias"]
    messages: list[CheckMessage] = [
        Error(
            f"{where}['OPTIONS'] has {name!r}, which {backend.__name__} does not take.",
            hint=f"Its options are {', '.join(known)}.",
            id="fsm_storage.E003",
        )
        for name in options
        if name not in known
    ]
    messages += [
        Error(f"{where}: {name} {problem}.", hint=hint, id=f"fsm_storage.{_CODES.get(name, 'E007')}")
        for name, problem, hint in _problems(alias, options)
    ]
    messages += _check_expiry(where, options.get("expiry"))
    return messages


def loaded(option: Any, *, called: bool = False) -> Any:
    """Return an option that may be given by its dotted path."""
    if not isinstance(option, str):
        return option
    found = import_string(option)
    return found() if called and isinstance(found, type) else found


OLDEST_SQLITE = (3, 35, 0)  # UPDATE … FROM is of 3.33, RETURNING of 3.35
_CODES = {"state_ttl": "E004", "data_ttl": "E004", "database": "E005"}


def _problems(alias: object, options: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, problem and hint of each option that is wrong."""
    if not isinstance(alias, str) or not 0 < len(alias) <= MAX_ALIAS_LENGTH:
        yield "alias", f"must be a text of 1 to {MAX_ALIAS_LENGTH} characters, not {alias!r}", "Shorten it."
    elif flaw := text_flaw(alias):
        yield "alias", flaw, "Use plain letters."
    for name, is_wrong in _RULES.items():
        if name in options:
            problem = is_wrong(options[name])
            if problem:
                yield name, problem, _HINTS.get(name, "See the settings page of the documentation.")


def _ttl(value: Any) -> str | None:
    try:
        ttl_seconds(value)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _history(value: Any) -> str | None:
    known = ("off", "states", "full")
    return None if value in known else f"must be one of {', '.join(map(repr, known))}, not {value!r}"


def _timeout(value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= 3600:
        return None
    return f"must be seconds, above 0 and at most 3600, not {value!r}"


def _count(value: Any) -> str | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return None if is_whole and value > 0 else f"must be a whole number above 0, not {value!r}"


def _callable(value: Any) -> str | None:
    found, problem = _imported(value)
    return problem or (None if found is None or callable(found) else f"must be a function, not {value!r}")


def _key_builder(value: Any) -> str | None:
    found, problem = _imported(value)
    if problem or found is None or isinstance(found, KeyBuilder):
        return problem
    if isinstance(value, str) and isinstance(found, type) and issubclass(found, KeyBuilder):
        return None
    return f"must be an aiogram KeyBuilder, or its dotted path, not {value!r}"


def _imported(value: Any) -> tuple[Any, str | None]:
    if not isinstance(value, str):
        return value, None
    try:
        return import_string(value), None
    except ImportError as error:
        return None, f"{value!r} cannot be imported ({error})"


def _mirror(value: Any) -> str | None:
    if isinstance(value, bool) or value == "apart":
        return None
    return f"must be True, False or 'apart', not {value!r}"


def _database(value: Any) -> str | None:
    return None if isinstance(value, str) else f"must be an alias of DATABASES, not {value!r}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be True or False, not {value!r}"


def _expiry(value: Any) -> str | None:
    """Not imported here: the module of the handlers may be the one that is making the storage."""
    if value is None or isinstance(value, str) or callable(getattr(value, "spared", None)):
        return None
    return f"must be an Expiry, or its dotted path, not {value!r}"


_RULES: dict[str, Callable[[Any], str | None]] = {
    "database": _database,
    "key_builder": _key_builder,
    "state_ttl": _ttl,
    "data_ttl": _ttl,
    "json_loads": _callable,
    "json_dumps": _callable,
    "history": _history,
    "timeout": _timeout,
    "max_pending": _count,
    "batch_size": _count,
    "in_transaction": _flag,
    "mirror": _mirror,
    "outbox_bytes": _count,
    "expiry": _expiry,
}
_HINTS = {
    "database": "The default is 'default'.",
    "state_ttl": "For example timedelta(days=2), or None to keep the state for ever.",
    "data_ttl": "For example timedelta(days=2), or None to keep the data for ever.",
    "history": "'states' writes a row for each change of state.",
    "expiry": "For example 'shop.expiry.expiry', where expiry = fsm_storage.Expiry().",
    "timeout": "The default is 5 seconds.",
}


def _check_expiry(where: str, path: Any) -> Iterator[CheckMessage]:
    if isinstance(path, str):
        found, problem = _imported(path)
        problem = problem or (found is not None and _expiry(found)) or None
        if problem or isinstance(found, str):
            yield Error(
                f"{where}: expiry {problem or f'{path!r} is a text'}.",
                hint="Name an fsm_storage.Expiry, in a module that can be imported without starting the bot.",
                id="fsm_storage.E007",
            )


def check_database(where: str, database: Any) -> list[CheckMessage]:
    if not isinstance(database, str):  # which another check says
        return []
    if database not in connections:
        return [
            Error(
                f"{where}: database {database!r} is not in DATABASES.",
                hint=f"It has {', '.join(sorted(connections))}.",
                id="fsm_storage.E005",
            )
        ]
    vendor = connections[database].vendor
    if dialect_for(vendor) is None:
        return [
            Error(
                f"{where}: database {database!r} is {vendor}, which DjangoStorage cannot use.",
                hint="Name a SQLite, PostgreSQL, MariaDB or MySQL database in OPTIONS['database'].",
                id="fsm_storage.E006",
            )
        ]
    return [
        *_check_time_zone(where, database, vendor),
        *_check_driver(where, vendor),
        *_check_sqlite(database, vendor),
    ]


def _check_time_zone(where: str, database: str, vendor: str) -> Iterator[CheckMessage]:
    time_zone = connections[database].settings_dict["TIME_ZONE"]
    # These have no type for an instant, only for the numbers on a clock.
    name = {"sqlite": "SQLite", "mysql": "MariaDB and MySQL"}.get(vendor)
    if name is not None and (not settings.USE_TZ or time_zone not in (None, "UTC")):
        yield Error(
            f"{where}: on {name}, instants must be kept in UTC.",
            hint=f"Set USE_TZ = True, and no TIME_ZONE in DATABASES[{database!r}].",
            id="fsm_storage.E008",
        )


def _check_driver(where: str, vendor: str) -> Iterator[CheckMessage]:
    if vendor != "postgresql":
        return
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    if not is_psycopg3:
        yield Error(
            f"{where}: DjangoStorage speaks to PostgreSQL through psycopg 3, but Django found only psycopg2.",
            hint="pip install 'psycopg[binary]'",
            id="fsm_storage.E009",
        )


def _check_sqlite(database: str, vendor: str) -> Iterator[CheckMessage]:
    """Warn where the web process would fail with "database is locked" beside the bot."""
    if vendor != "sqlite":
        return
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        yield Error(
            f"SQLite is {sqlite3.sqlite_version}, which DjangoStorage cannot use.",
            hint="It needs SQLite 3.35 or newer, or PostgreSQL.",
            id="fsm_storage.E006",
        )
    options = connections[database].settings_dict["OPTIONS"]
    missing = []
    if (options.get("transaction_mode") or "").upper() not in ("IMMEDIATE", "EXCLUSIVE"):
        missing.append('"transaction_mode": "IMMEDIATE"')
    if "journal_mode=wal" not in options.get("init_command", "").lower().replace(" ", ""):
        missing.append('"init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"')
    if missing:
        yield checks.Warning(
            f"SQLite database {database!r} is not set up for a bot and a web process side by side.",
            hint=f"Add to DATABASES[{database!r}]['OPTIONS']: {', '.join(missing)}.",
            id="fsm_storage.W001",
        )
