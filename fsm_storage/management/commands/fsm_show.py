from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from fsm_storage.management import selection
from fsm_storage.management.output import as_json, errors, local, plain, table, when
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.transfer.lines import conversation_line, transition_line

HEADER = ("AT", "FROM", "TO", "SOURCE", "ACTOR")


class Command(BaseCommand):
    help = "Shows one conversation and how it got there."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", nargs="?", help="the key of the record, as fsm_list shows it")
        selection.add_place(parser)
        selection.add_key_parts(parser)
        parser.add_argument(
            "--limit", type=int, default=20, help="transitions shown, newest first (default: 20)"
        )
        parser.add_argument(
            "--json", action="store_true", help="print the record and its transitions as JSON lines"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        with errors():
            record = selection.one(options)
        history = FSMTransition.objects.using(record._state.db).of(record)[: max(options["limit"], 0)]
        if options["json"]:
            self.stdout.write(conversation_line(record), ending="")
            for transition in history:
                self.stdout.write(transition_line(transition), ending="")
            return
        for name, value in _facts(record):
            self.stdout.write(f"{name + ':':<14}{plain(value)}")
        self.stdout.write("data:")
        # Escaped as JSON does it, so that nothing in it acts on the terminal.
        self.stdout.write(json.dumps(record.current_data, indent=2))
        rows = [_row(transition) for transition in history]
        for line in table(HEADER, rows) if rows else ["no transitions are kept"]:
            self.stdout.write(line)


def _facts(record: FSMRecord) -> list[tuple[str, str]]:
    now = record.read_at  # type: ignore[attr-defined] # of with_clock()
    parts = [
        ("thread", record.thread_id),
        ("business", record.business_connection_id),
        ("destiny", None if record.destiny == "default" else record.destiny),
    ]
    return [
        ("key", record.key),
        ("storage", record.alias),
        ("bot", str(record.bot_id)),
        ("chat", str(record.chat_id)),
        ("user", str(record.user_id)),
        *((name, str(value)) for name, value in parts if value is not None),
        ("state", "-" if record.current_state is None else as_json(record.current_state)[1:-1] or '""'),
        ("version", str(record.version)),
        ("created", local(record.created_at)),
        ("changed", f"{local(record.updated_at)} ({when(record.updated_at, now)})"),
        ("state expires", when(record.state_expires_at, now)),
        ("data expires", when(record.data_expires_at, now)),
    ]


def _row(transition: FSMTransition) -> tuple[str, ...]:
    ends = (transition.from_state, transition.to_state)
    states = ("-" if state is None else state or '""' for state in ends)
    return (local(transition.at), *states, transition.source, transition.actor or "-")
