from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error, reset_queries

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.management import selection
from fsm_storage.management.output import Progress, actor, as_json, errors, plain
from fsm_storage.models import FSMRecord
from fsm_storage.sources import SCHEMES, read_source
from fsm_storage.sources.layout import KeyLayout
from fsm_storage.transfer import Found
from fsm_storage.transfer.importer import Counts, Importer
from fsm_storage.transfer.lines import read_lines

REFUSED = 3
"""The exit code when something was refused; the rest is imported."""
_FLAGS = ("with_bot_id", "with_business_connection_id", "with_destiny")


class Command(BaseCommand):
    help = "Reads conversations: from JSON lines, or from what another storage left behind."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "file", nargs="?", help="of fsm_export or the admin's export; - is standard input"
        )
        parser.add_argument(
            "--from",
            dest="source",
            metavar="URL",
            help="another storage: redis://…, rediss://…, unix://…, sqlite:path, mongodb://…",
        )
        parser.add_argument(
            "--alias", help="into this storage (default: the one that a line names, or 'default')"
        )
        parser.add_argument("--overwrite", action="store_true", help="also what is newer in the database")
        parser.add_argument("--dry-run", action="store_true", help="count, and change nothing")
        parser.add_argument(
            "--resume-from", type=int, default=1, metavar="LINE", help="begin at this line of the file"
        )
        parser.add_argument(
            "--by", metavar="NAME", help="who does it, for the history (default: your user name)"
        )
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")
        keys = parser.add_argument_group("the bot's key builder, for Redis and MongoDB")
        keys.add_argument("--prefix", default="fsm", help="its prefix (default: fsm)")
        keys.add_argument("--separator", default=":", help="its separator (default: a colon)")
        for flag in _FLAGS:
            keys.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=f"it has {flag}=True")
        keys.add_argument("--bot-id", type=int, metavar="ID", help="the bot, where the keys do not name it")

    def handle(self, *args: Any, **options: Any) -> None:
        storages = _Storages(options["alias"])
        with ExitStack() as files:
            importer = Importer(
                storages.get,
                self._tell_refused,
                overwrite=options["overwrite"],
                dry_run=options["dry_run"],
                by=actor(options["by"]),
            )
            counts = self._run(importer, self._source(options, storages, files))
        if options["json"]:
            self.stdout.write(as_json(counts._asdict()))
        else:
            verb = "would write" if options["dry_run"] else "wrote"
            self.stdout.write(f"{verb} {_told(counts)}")
        if counts.refused:
            raise CommandError(f"{counts.refused} could not be imported", returncode=REFUSED)

    def _source(self, options: dict[str, Any], storages: _Storages, files: ExitStack) -> Iterator[Found]:
        url, path, first = options["source"], options["file"], options["resume_from"]
        if (url is None) == (path is None):
            raise CommandError("name a file, or a storage with --from URL", returncode=2)
        if url is not None:
            if first != 1:
                raise CommandError("--resume-from is for files; run --from again, it goes on", returncode=2)
            layout = _layout(options, url)
            database = selection.storage_of(options["alias"] or "default").database
            with errors():
                return read_source(url, layout, FSMRecord.objects.using(database).clock)
        try:
            file = sys.stdin.buffer if path == "-" else files.enter_context(Path(path).open("rb"))  # noqa: SIM115
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from error
        return read_lines(file, first)

    def _run(self, importer: Importer, source: Iterator[Found]) -> Counts:
        progress, counts, place = Progress(self.stderr), Counts(), ""
        try:
            for place, counts in importer.run(source):  # noqa: B007 - told if it stops here
                progress.show(_told(counts))
                reset_queries()  # with DEBUG, Django keeps the text of each, rows and all
        except (FSMStorageError, Error, OSError) as error:
            behind = f"behind {place}" if place else "at the beginning"
            raise CommandError(f"stopped {behind}: {error}. Run it again, and it goes on") from error
        finally:
            progress.end()
        return counts

    def _tell_refused(self, place: str, reason: str) -> None:
        self.stderr.write(f"{plain(place)}: {plain(reason)}")


class _Storages:
    """The storages that conversations go to."""

    def __init__(self, alias: str | None) -> None:
        self._found: dict[str, DjangoStorage] = {}
        self._alias = alias
        if alias is not None:
            self._found[alias] = selection.storage_of(alias)

    def get(self, alias: str | None) -> DjangoStorage:
        """Return the storage for a conversation that names `alias`. Raises `ValueError`."""
        name = self._alias or alias or "default"
        if name not in self._found:
            try:
                self._found[name] = selection.storage_of(name)
            except CommandError as error:
                raise ValueError(f"{error}; --alias names another storage") from error
        return self._found[name]


def _layout(options: dict[str, Any], url: str) -> KeyLayout:
    """Return the key layout that the arguments describe. Raises `CommandError`."""
    flags = {flag: options[flag] for flag in _FLAGS}
    layout = KeyLayout(options["prefix"], options["separator"], **flags, bot_id=options["bot_id"])
    if SCHEMES.get(url.partition(":")[0], "").endswith(".sqlite"):
        return layout
    if not layout.separator:
        raise CommandError("--separator must not be empty", returncode=2)
    if layout.with_bot_id and layout.bot_id is not None:
        raise CommandError("with --with-bot-id the keys name the bot; leave --bot-id out", returncode=2)
    if not layout.with_bot_id and layout.bot_id is None:
        raise CommandError(
            "without --with-bot-id the keys do not say whose they are: give --bot-id, the number before the "
            "colon of the bot's token",
            returncode=2,
        )
    return layout


def _told(counts: Counts) -> str:
    steps = f", {counts.transitions} transitions" if counts.transitions else ""
    return (
        f"{counts.written} conversations{steps}; {counts.same} were the same, "
        f"{counts.skipped} skipped (the database has newer ones), {counts.refused} refused"
    )
