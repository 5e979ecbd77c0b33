from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fsm_storage.exceptions import FSMStorageError
from fsm_storage.management import selection
from fsm_storage.management.output import Progress, actor, as_json, confirmed, errors
from fsm_storage.models import FSMRecordQuerySet

BATCH = 500


class Command(BaseCommand):
    help = "Lets the bot forget conversations: their state and their data."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", nargs="?", help="the key of one record, as fsm_list shows it")
        selection.add_place(parser)
        selection.add_filters(parser)
        parser.add_argument("--all", action="store_true", help="all that --alias and --database leave")
        parser.add_argument("--keep-data", action="store_true", help="clear only the state")
        parser.add_argument("--dry-run", action="store_true", help="count, and change nothing")
        parser.add_argument("--no-input", action="store_true", help="do not ask")
        parser.add_argument(
            "--by", metavar="NAME", help="who does it, for the history (default: your user name)"
        )
        parser.add_argument("--json", action="store_true", help="print the count as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        with errors():
            found = self._found(options)
            selection.check_writable(found)
            ids = list(found.order_by("pk").values_list("pk", flat=True))
        if options["dry_run"]:
            self._say(options, f"would clear {_told(len(ids))}", would_clear=len(ids))
            return
        if ids and not options["no_input"] and not confirmed(f"Clear {_told(len(ids))}?"):
            raise CommandError("nothing was changed")
        cleared = self._clear(found, ids, options)
        self._say(options, f"cleared {_told(cleared)}", cleared=cleared)

    def _found(self, options: dict[str, Any]) -> FSMRecordQuerySet:
        """Return the records that have something to clear."""
        if options["key"] is None and not selection.has_filter(options) and not options["all"]:
            raise CommandError("say which: KEY, filters, or --all", returncode=2)
        found = selection.filtered(options)
        if options["key"] is not None:
            found = found.filter(key=options["key"])
            if not found.exists():
                raise CommandError(
                    f"there is no conversation {options['key']!r}", returncode=selection.NOT_FOUND
                )
        return (
            found.filter(state__isnull=False) if options["keep_data"] else found.exclude(state=None, data={})
        )

    def _clear(self, found: FSMRecordQuerySet, ids: list[int], options: dict[str, Any]) -> int:
        """Clear the records with these ids that still fit: who moved on meanwhile is left alone."""
        changes: dict[str, Any] = {"state": None} if options["keep_data"] else {"state": None, "data": {}}
        progress, cleared = Progress(self.stderr), 0
        try:
            for start in range(0, len(ids), BATCH):
                batch = found.filter(pk__in=ids[start : start + BATCH])
                cleared += batch.edit(**changes, by=actor(options["by"]))
                progress.show(f"{cleared} of {len(ids)}")
        except FSMStorageError as error:
            raise CommandError(f"stopped after {_told(cleared)}: {error}") from error
        finally:
            progress.end()
        return cleared

    def _say(self, options: dict[str, Any], text: str, **counts: int) -> None:
        self.stdout.write(as_json(counts) if options["json"] else text)


def _told(count: int) -> str:
    return f"{count} conversation{'' if count == 1 else 's'}"
