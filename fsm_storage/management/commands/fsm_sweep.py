from __future__ import annotations

import asyncio
import inspect
import json
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from aiogram import Bot
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections
from django.utils.module_loading import import_string

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.conf import storages
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.lifecycle.expiry import Expiry
from fsm_storage.lifecycle.sweeper import Sweeper, Swept
from fsm_storage.management.output import Progress, errors
from fsm_storage.management.selection import duration

WATCH_SECONDS = 60.0


class Command(BaseCommand):
    help = (
        "Clears expired states and data and deletes idle records, in batches, while the bot runs. What there "
        "are expiry handlers for is left to them. SIGTERM and Ctrl-C end --watch, with exit code 0."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--alias", action="append", help="a storage of FSM_STORAGES (default: all in Django)"
        )
        parser.add_argument(
            "--batch-size", type=int, default=1000, help="records in a transaction (default: 1000)"
        )
        parser.add_argument(
            "--keep-history", type=duration, metavar="SPAN", help="also delete older transitions, as in 90d"
        )
        parser.add_argument(
            "--watch", type=float, nargs="?", const=WATCH_SECONDS, metavar="SECONDS",
            help=f"sweep again and again, after so many seconds (default: {WATCH_SECONDS:.0f})",
        )  # fmt: skip
        parser.add_argument(
            "--bot", metavar="PATH",
            help="with --watch, call the expiry handlers too: the dotted path of a Bot, or of a function that makes it",
        )  # fmt: skip
        parser.add_argument("--dry-run", action="store_true", help="count, and change nothing")
        parser.add_argument(
            "--json", action="store_true", help="print the counts as JSON, a line for a sweep"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        watch, path = options["watch"], options["bot"]
        if options["batch_size"] < 1:
            raise CommandError("--batch-size must be at least 1", returncode=2)
        if watch is not None and not 0 < watch < 1e6:
            raise CommandError("--watch needs seconds above 0", returncode=2)
        if watch is not None and options["dry_run"]:
            raise CommandError("--watch and --dry-run exclude one another", returncode=2)
        if path and watch is None:
            raise CommandError("--bot goes with --watch", returncode=2)
        found = self._storages(options["alias"])
        if watch is None:
            self._show({storage.alias: self._round(storage, **options) for storage in found}, **options)
        elif path:
            asyncio.run(self._watch_and_handle(found, path, options))
        else:
            with _stopped_by_signals() as stop:
                self._watch(found, stop, options)

    def _round(self, storage: DjangoStorage, **options: Any) -> Swept:
        sweeper, keep = Sweeper(storage, options["batch_size"]), options["keep_history"]
        with errors(f"{storage.alias}: "):
            try:
                return sweeper.due(keep) if options["dry_run"] else self._sweep(sweeper, keep, **options)
            except ImportError as error:
                raise CommandError(f"{storage.alias}: expiry: {error}; nothing was swept") from error

    def _sweep(self, sweeper: Sweeper, keep: timedelta | None, **options: Any) -> Swept:
        progress, swept, pruned = Progress(self.stdout), Swept(), Swept()
        for swept in sweeper.sweep():
            progress.show(_counts(sweeper.storage.alias, swept))
        for pruned in sweeper.prune(keep) if keep else ():
            progress.show(_counts(sweeper.storage.alias, swept + pruned))
        progress.end()
        return swept + pruned + Swept(waiting=sweeper.waiting())

    def _watch(self, found: Sequence[DjangoStorage], stop: Stop, options: dict[str, Any]) -> None:
        """Sweep until told to stop. A database that is away is waited for."""
        while not stop.is_set():
            counts = {}
            for storage in found:
                try:
                    counts[storage.alias] = self._round(storage, **options)
                except CommandError as error:
                    self.stderr.write(str(error))
            if any(any(swept[:4]) for swept in counts.values()):
                self._show(counts, **options)
            connections.close_all()
            stop.wait(options["watch"])

    async def _watch_and_handle(
        self, found: Sequence[DjangoStorage], path: str, options: dict[str, Any]
    ) -> None:
        handled = [(storage, storage.expiry) for storage in found if isinstance(storage.expiry, Expiry)]
        if not handled:
            raise CommandError("--bot: none of the storages has the option 'expiry'", returncode=2)
        async with await _bot(path) as bot:
            with _stopped_by_signals() as stop:
                handling = [asyncio.create_task(expiry.run(storage, [bot])) for storage, expiry in handled]
                watching = asyncio.create_task(asyncio.to_thread(self._watch, found, stop, options))
                await asyncio.wait([watching, *handling], return_when=asyncio.FIRST_COMPLETED)
                stop.set()
                for task in handling:
                    task.cancel()
                await asyncio.wait([watching, *handling])
            for storage in found:
                await storage.close()
            for task in (watching, *handling):
                if not task.cancelled():
                    task.result()

    def _show(self, counts: dict[str, Swept], **options: Any) -> None:
        if options["json"]:
            self.stdout.write(json.dumps({alias: swept._asdict() for alias, swept in counts.items()}))
            self.stdout.flush()
            return
        for alias, swept in counts.items():
            self.stdout.write(_counts(alias, swept, would=options["dry_run"]))
        self.stdout.flush()

    def _storages(self, aliases: list[str] | None) -> list[DjangoStorage]:
        try:
            found = [storages[alias] for alias in aliases or storages]
        except FSMStorageError as error:
            raise CommandError(str(error)) from error
        kept = [storage for storage in found if isinstance(storage, DjangoStorage)]
        if aliases and len(kept) < len(found):
            raise CommandError("only a DjangoStorage can be swept")
        return kept


def _counts(alias: str, swept: Swept, *, would: bool = False) -> str:
    cleared, deleted = ("would clear", "would delete") if would else ("cleared", "deleted")
    text = f"{alias}: {cleared} {swept.states} states and {swept.data} data, {deleted} {swept.records} idle records"
    if swept.transitions:
        text += f" and {swept.transitions} transitions"
    return text + (f"; {swept.waiting} wait for expiry handlers" if swept.waiting else "")


async def _bot(path: str) -> Bot:
    try:
        bot = import_string(path)
    except ImportError as error:
        raise CommandError(f"--bot: {error}", returncode=2) from error
    if callable(bot) and not isinstance(bot, Bot):
        bot = bot()
    if inspect.isawaitable(bot):
        bot = await bot
    if not isinstance(bot, Bot):
        raise CommandError(f"--bot: {path!r} gives no aiogram Bot, but {bot!r}", returncode=2)
    return bot


class Stop:
    """An event that a signal's handler may set. That of `threading` takes a lock, which the code that the
    handler interrupts may hold: then both wait for ever. A `SimpleQueue` is made for this."""

    def __init__(self) -> None:
        self._told = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._told = True
        self._wake.put(None)

    def is_set(self) -> bool:
        return self._told

    def wait(self, seconds: float) -> None:
        """Wait until it is set, for so many seconds at the most."""
        if not self._told:
            with suppress(queue.Empty):
                self._wake.get(timeout=seconds)


@contextmanager
def _stopped_by_signals() -> Iterator[Stop]:
    """An event that SIGTERM and SIGINT set, so that a batch is finished before the end."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
