"""Which conversations a command is about: the arguments for it, and the records that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from django.core.management.base import CommandError, CommandParser
from django.db import connections

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.conf import storages
from fsm_storage.discovery import declared_states, is_within
from fsm_storage.durations import parse_duration
from fsm_storage.management.output import errors
from fsm_storage.models import FSMRecord, FSMRecordQuerySet
from fsm_storage.search import SearchError, parse_pair

STATES_LIMIT = 10_000
SHOWN = 10
NOT_FOUND = 4
"""The exit code for a conversation that is not there."""

T = TypeVar("T")

KEY_PARTS = ("bot", "chat", "user", "thread", "business", "destiny")
_COLUMNS = {
    "bot": "bot_id",
    "chat": "chat_id",
    "user": "user_id",
    "thread": "thread_id",
    "business": "business_connection_id",
    "destiny": "destiny",
}


def checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return `read` as the type of an argument: its ValueError becomes the parser's error."""

    def argument(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return argument


duration = checked(parse_duration)


def _id(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{text} does not fit 64 bits")
    return number


def add_place(parser: CommandParser) -> None:
    """Add the arguments that say in which storage and database to look."""
    parser.add_argument("--alias", help="only this storage of FSM_STORAGES (default: all)")
    parser.add_argument("--database", help="an alias of DATABASES (default: the storage's, or 'default')")


def add_key_parts(parser: CommandParser) -> None:
    """Add the arguments that name a conversation by the parts of its key."""
    for name in ("bot", "chat", "user", "thread"):
        parser.add_argument(f"--{name}", type=checked(_id), metavar="ID", help=f"of this {name}")
    parser.add_argument("--business", metavar="ID", help="of this business connection")
    parser.add_argument("--destiny", help="of this destiny")


def add_filters(parser: CommandParser) -> None:
    """Add the filters of the admin's list."""
    add_key_parts(parser)
    parser.add_argument("--state", action="append", help="in this state now; may be repeated")
    parser.add_argument("--no-state", action="store_true", help="in no state now")
    parser.add_argument("--group", help="in a state of this group, or of a group nested in it")
    parser.add_argument("--expiring", type=duration, metavar="1h", help="expires within this time")
    parser.add_argument("--expired", action="store_true", help="has expired and was not swept yet")
    parser.add_argument("--idle", type=duration, metavar="7d", help="unchanged for this time")
    parser.add_argument(
        "--data", action="append", metavar="KEY=VALUE", help="has this in its data, like cart.item=pizza"
    )


def using(options: dict[str, Any]) -> str:
    """Return the database that is asked for. Raises `CommandError`."""
    database, alias = options["database"], options["alias"]
    if database is not None and database not in connections:
        raise CommandError(f"--database: {database!r} is not in DATABASES; it has {', '.join(connections)}")
    if database is None and alias is not None and alias in storages.settings:
        with errors():
            database = getattr(storages[alias], "database", None)
    return database or "default"


def records(options: dict[str, Any]) -> FSMRecordQuerySet:
    """Return the records in the place that is asked for."""
    found: FSMRecordQuerySet = FSMRecord.objects.using(using(options))
    alias = options["alias"]
    if alias is None:
        return found
    found = found.filter(alias=alias)
    if alias not in storages.settings and not found.exists():
        known = ", ".join(map(repr, storages.settings))
        raise CommandError(f"FSM_STORAGES has no {alias!r}, and no record either; it has {known}")
    return found


def parts(options: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of the key that are given, as columns."""
    return {_COLUMNS[name]: options[name] for name in KEY_PARTS if options[name] is not None}


def filtered(options: dict[str, Any]) -> FSMRecordQuerySet:
    """Return the records that fit all the filters. Raises `CommandError`."""
    found = records(options).filter(**parts(options))
    states: list[str | None] = [*(options["state"] or []), *([None] if options["no_state"] else [])]
    if states:
        found = found.in_state(*states)
    if options["group"] is not None:
        found = found.in_state(*_states_of(options["group"], found))
    if options["expiring"] is not None:
        found = found.expiring(options["expiring"])
    if options["expired"]:
        found = found.expired()
    if options["idle"] is not None:
        found = found.unchanged_for(options["idle"])
    for term in options["data"] or []:
        try:
            found = found.holding(*parse_pair(term))
        except SearchError as error:
            raise CommandError(f"--data: {error}", returncode=2) from error
    return found


def has_filter(options: dict[str, Any]) -> bool:
    """Say whether anything narrows the records, the place aside."""
    names = (*KEY_PARTS, "state", "no_state", "group", "expiring", "expired", "idle", "data")
    return any(options[name] not in (None, False) for name in names)


def one(options: dict[str, Any]) -> FSMRecord:
    """Return the one conversation that is meant, by KEY or by parts. Raises `CommandError`."""
    given = parts(options)
    if options["key"] is not None:
        given["key"] = options["key"]
    if not given:
        raise CommandError("say which conversation: KEY, or some of --bot, --chat and --user", returncode=2)
    found = list(records(options).with_clock().filter(**given).order_by("alias", "key")[: SHOWN + 1])
    if not found:
        words = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise CommandError(f"there is no conversation with {words}", returncode=NOT_FOUND)
    if len(found) > 1:
        keys = "".join(f"\n  {row.key} --alias {row.alias}" for row in found[:SHOWN])
        more = "\n  …" if len(found) > SHOWN else ""
        raise CommandError(f"more than one conversation fits; name one of them:{keys}{more}", returncode=2)
    return found[0]


def check_writable(found: FSMRecordQuerySet) -> None:
    """Raise `CommandError` if a storage of these records would write into another database than theirs."""
    for alias in found.order_by().values_list("alias", flat=True).distinct():
        with errors():
            database = getattr(storages.editor(alias), "database", found.db)
        if database != found.db:
            raise CommandError(
                f"storage {alias!r} is in database {database!r}, and these records are in {found.db!r}: "
                "they can be shown, not changed"
            )


def storage_of(alias: str) -> DjangoStorage:
    """Return a storage that keeps its conversations in Django itself. Raises `CommandError`."""
    with errors():
        storage = storages[alias]
    if not isinstance(storage, DjangoStorage):
        raise CommandError(
            f"storage {alias!r} is a {type(storage).__name__}, which keeps its conversations elsewhere: "
            "this takes a DjangoStorage"
        )
    return storage


def _states_of(group: str, found: FSMRecordQuerySet) -> list[str]:
    """Return the states of a group: the declared ones, and what else the table has under its name."""
    states = [*declared_states().states, *found.states_in_use(STATES_LIMIT)]
    return [state for state in dict.fromkeys(states) if is_within(group, state)]
