from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fsm_storage.discovery import declared_states
from fsm_storage.exceptions import FSMStorageError, VersionConflict
from fsm_storage.management import selection
from fsm_storage.management.output import actor
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP
from fsm_storage.transfer.lines import conversation_line

CONFLICT = 5
"""The exit code for a conversation that is not at the version of --if-version."""


def _ttl(text: str) -> timedelta | None:
    return None if text == "never" else selection.duration(text)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"data is a JSON object, like '{{\"n\": 1}}', not a {type(value).__name__}")
    return value


class Command(BaseCommand):
    help = "Changes one conversation, as the bot sees it with its next update."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", nargs="?", help="the key of the record, as fsm_list shows it")
        selection.add_place(parser)
        selection.add_key_parts(parser)
        states = parser.add_mutually_exclusive_group()
        states.add_argument("--state", help="move it to this state")
        states.add_argument("--no-state", action="store_true", help="take its state away")
        parser.add_argument(
            "--data", type=selection.checked(_object), metavar="JSON", help="replace its data by this object"
        )
        for part in ("state", "data"):
            parser.add_argument(
                f"--{part}-ttl",
                type=_ttl,
                default=KEEP,
                metavar="2h",
                help=f"let the {part} expire then, or never",
            )
        parser.add_argument(
            "--if-version",
            type=int,
            metavar="N",
            help=f"only if it is at this version; exit code {CONFLICT} if not",
        )
        parser.add_argument(
            "--create", action="store_true", help="make it if there is none, from --bot, --chat and --user"
        )
        parser.add_argument(
            "--by", metavar="NAME", help="who does it, for the history (default: your user name)"
        )
        parser.add_argument("--json", action="store_true", help="print the record as a JSON line")

    def handle(self, *args: Any, **options: Any) -> None:
        changes = _changes(options)
        if not changes:
            raise CommandError(
                "say what to change: --state, --no-state, --data, --state-ttl or --data-ttl", returncode=2
            )
        try:
            record, version = self._record(options), options["if_version"]
            if record.pk is None:
                version = 0 if version is None else version
            record.edit(**changes, if_version=version, by=actor(options["by"]))
        except VersionConflict as error:
            raise CommandError(str(error), returncode=CONFLICT) from error
        except (FSMStorageError, ValueError, TypeError) as error:
            raise CommandError(str(error)) from error
        state = options["state"]
        if state is not None and state not in declared_states():
            self.stderr.write(self.style.WARNING(f"no app declares the state {state!r}: is it spelt right?"))
        if options["json"]:
            self.stdout.write("null\n" if record.pk is None else conversation_line(record), ending="")
        elif record.pk is not None:
            self.stdout.write(f"{record.key} is at version {record.version} now")
        else:
            self.stdout.write(f"{record.key} was not there and is not there: nothing was set")

    def _record(self, options: dict[str, Any]) -> FSMRecord:
        try:
            record = selection.one(options)
            selection.check_writable(FSMRecord.objects.using(record._state.db).filter(pk=record.pk))
            return record
        except CommandError as error:
            if not options["create"] or error.returncode != selection.NOT_FOUND:
                raise
        missing = [f"--{name}" for name in ("bot", "chat", "user") if options[name] is None]
        if missing or options["key"] is not None:
            needed = ", ".join(missing) or "only the parts of the key, not KEY"
            raise CommandError(f"--create needs {needed}", returncode=2)
        storage = selection.storage_of(options["alias"] or "default")
        record = FSMRecord(alias=storage.alias, version=0, **selection.parts(options))
        record.destiny = options["destiny"] or "default"
        record.key = storage.key_text(record.storage_key)
        return record


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    changes = {name: options[name] for name in ("state_ttl", "data_ttl") if options[name] is not KEEP}
    if options["state"] is not None or options["no_state"]:
        changes["state"] = options["state"]
    if options["data"] is not None:
        changes["data"] = options["data"]
    return changes
