from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fsm_storage.management import selection
from fsm_storage.management.output import Progress, as_json, errors
from fsm_storage.models import FSMTransition
from fsm_storage.transfer.lines import BEGINNING, MAX_LINE, conversation_lines, last_id, transition_lines

KINDS = ("transition", "conversation")
HISTORY_FILTERS = ("bot", "chat", "user")


class _Start(NamedTuple):
    """Where to go on: behind the row with this id, among the transitions or the conversations."""

    kind: str = KINDS[0]
    after: int | None = None


class Command(BaseCommand):
    help = "Writes conversations as JSON lines, which fsm_import reads."

    def add_arguments(self, parser: CommandParser) -> None:
        selection.add_place(parser)
        selection.add_filters(parser)
        parser.add_argument("--history", action="store_true", help="the transitions too, in front")
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="a new file (default: standard output)"
        )
        parser.add_argument(
            "--resume", action="store_true", help="go on with an --output that was broken off"
        )
        parser.add_argument("--dry-run", action="store_true", help="count, and write nothing")
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["resume"] and options["output"] is None:
            raise CommandError("--resume needs --output", returncode=2)
        self._check_history(options)
        with errors(), ExitStack() as files:
            start, file = _Start(), None
            if options["output"] is not None and not options["dry_run"]:
                file, start = _opened(options["output"], resume=options["resume"])
                files.enter_context(file)
            counts = self._counted(options) if options["dry_run"] else self._written(options, file, start)
        verb = "would write" if options["dry_run"] else "wrote"
        told = " and ".join(f"{count} {kind}s" for kind, count in counts.items())
        # Standard output may be the file.
        say = self.stderr if file is None and not options["dry_run"] else self.stdout
        say.write(as_json(counts) if options["json"] else f"{verb} {told}")

    def _check_history(self, options: dict[str, Any]) -> None:
        rest = {**options, **dict.fromkeys(HISTORY_FILTERS)}
        if options["history"] and selection.has_filter(rest):
            raise CommandError(
                "--history goes with --bot, --chat and --user, and no other filter", returncode=2
            )

    def _rows(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what is to be written, in its order."""
        rows: dict[str, Any] = {}
        if options["history"]:
            place = {} if options["alias"] is None else {"alias": options["alias"]}
            transitions = FSMTransition.objects.using(selection.using(options))
            rows["transition"] = transitions.filter(**place, **selection.parts(options))
        return {**rows, "conversation": selection.filtered(options)}

    def _counted(self, options: dict[str, Any]) -> dict[str, int]:
        return {kind: rows.count() for kind, rows in self._rows(options).items()}

    def _written(self, options: dict[str, Any], file: BinaryIO | None, start: _Start) -> dict[str, int]:
        counts, progress = {}, Progress(self.stderr)
        for kind, rows in self._rows(options).items():
            counts[kind] = 0
            if KINDS.index(kind) < KINDS.index(start.kind):
                continue
            for text in _lines(kind, rows, start.after if kind == start.kind else None):
                if file is None:
                    self.stdout.write(text, ending="")
                else:
                    file.write(text.encode())
                counts[kind] += text.count("\n")
                progress.show(f"{counts[kind]} {kind}s")
        progress.end()
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
        return counts


def _lines(kind: str, rows: Any, after: int | None) -> Iterator[str]:
    return (
        transition_lines(rows, after=after) if kind == "transition" else conversation_lines(rows, after=after)
    )


def _opened(path: Path, *, resume: bool) -> tuple[BinaryIO, _Start]:
    """Open a new file, or one that was broken off, at the end of its last whole line."""
    try:
        if not resume or not path.exists():
            return path.open("xb"), _Start()
        file = path.open("r+b")
    except FileExistsError:
        raise CommandError(f"{path} is there already; --resume goes on with it") from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    try:
        end, start = _place_to_go_on(file)
    except ValueError as error:
        file.close()
        raise CommandError(f"{path} cannot be resumed: it ends in {error}") from error
    file.seek(end)
    file.truncate()
    return file, start


def _place_to_go_on(file: BinaryIO) -> tuple[int, _Start]:
    """Return where the last whole line ends, and the row of it. Raises `ValueError` for a file of another kind."""
    first = max(0, file.seek(0, os.SEEK_END) - 2 * MAX_LINE)
    file.seek(first)
    tail = file.read()
    end = tail.rfind(b"\n") + 1
    if end:
        return first + end, _Start(*last_id(tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]))
    if first or not tail.startswith(BEGINNING[: len(tail)]):
        raise ValueError("no line of an export")
    return 0, _Start()
