from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fsm_storage.management import selection
from fsm_storage.management.output import as_json, errors, table, when
from fsm_storage.models import FSMRecord
from fsm_storage.transfer.lines import conversation_line

MOST_SHOWN = 100
"""Characters of data that are kept of each row, until the table is printed."""
HEADER = ("KEY", "STATE", "CHAT", "USER", "CHANGED", "EXPIRES", "DATA")


class Command(BaseCommand):
    help = "Lists conversations, those that changed last first."

    def add_arguments(self, parser: CommandParser) -> None:
        selection.add_place(parser)
        selection.add_filters(parser)
        parser.add_argument("--limit", type=int, default=50, help="so many at the most; 0: all (default: 50)")
        parser.add_argument("--json", action="store_true", help="print JSON lines, as fsm_export does")

    def handle(self, *args: Any, **options: Any) -> None:
        limit = options["limit"]
        if limit < 0:
            raise CommandError("--limit must be 0 or more", returncode=2)
        with errors():
            found = selection.filtered(options).with_clock().order_by("-updated_at", "-pk")
        rows = (found[:limit] if limit else found).iterator(chunk_size=200)
        if options["json"]:
            for record in rows:
                self.stdout.write(conversation_line(record), ending="")
            return
        lines = [_row(record) for record in rows]
        for line in table(HEADER, lines) if lines else ["no conversation fits"]:
            self.stdout.write(line)
        if limit and len(lines) == limit:
            self.stderr.write(f"only the first {limit}; --limit 0 shows all")


def _row(record: FSMRecord) -> tuple[str, ...]:
    now = record.read_at  # type: ignore[attr-defined] # of with_clock()
    ends = [at for at in (record.state_expires_at, record.data_expires_at) if at is not None]
    state = record.current_state
    return (
        record.key,
        "-" if state is None else state or '""',
        str(record.chat_id),
        str(record.user_id),
        when(record.updated_at, now),
        when(min(ends, default=None), now),
        as_json(record.current_data)[:MOST_SHOWN] if record.current_data else "-",
    )
