from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.conf import storages
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.lifecycle.sweeper import Sweeper, Swept


class Command(BaseCommand):
    help = "Clears expired states and data and deletes idle records, in batches, while the bot runs."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--alias", action="append", help="a storage of FSM_STORAGES (default: all in Django)"
        )
        parser.add_argument(
            "--batch-size", type=int, default=1000, help="records in a transaction (default: 1000)"
        )
        parser.add_argument("--dry-run", action="store_true", help="count, and change nothing")
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["batch_size"] < 1:
            raise CommandError("--batch-size must be at least 1")
        counts = {}
        for storage in self._storages(options["alias"]):
            sweeper = Sweeper(storage, options["batch_size"])
            try:
                counts[storage.alias] = (
                    sweeper.due() if options["dry_run"] else self._sweep(sweeper, **options)
                )
            except FSMStorageError as error:
                raise CommandError(f"{storage.alias}: {error}") from error
        if options["json"]:
            self.stdout.write(json.dumps({alias: swept._asdict() for alias, swept in counts.items()}))
            return
        verb = "would clear" if options["dry_run"] else "cleared"
        for alias, swept in counts.items():
            self.stdout.write(
                f"{alias}: {verb} {swept.states} states and {swept.data} data, "
                f"{'would delete' if options['dry_run'] else 'deleted'} {swept.records} idle records"
            )

    def _storages(self, aliases: list[str] | None) -> list[DjangoStorage]:
        try:
            found = [storages[alias] for alias in aliases or storages]
        except FSMStorageError as error:
            raise CommandError(str(error)) from error
        kept = [storage for storage in found if isinstance(storage, DjangoStorage)]
        if aliases and len(kept) < len(found):
            raise CommandError("only a DjangoStorage can be swept")
        return kept

    def _sweep(self, sweeper: Sweeper, **options: Any) -> Swept:
        swept = Swept()
        shows_progress = self.stdout.isatty() and not options["json"]
        for swept in sweeper.sweep():
            if shows_progress:
                progress = f"{sweeper.storage.alias}: {swept.states} states, {swept.data} data, {swept.records} records"
                self.stdout.write(progress, ending="\r")
        if shows_progress:
            self.stdout.write("")
        return swept
