from __future__ import annotations

import asyncio
import signal
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from redis.exceptions import RedisError

from fsm_storage.backends.redis import RedisStorage
from fsm_storage.conf import storages
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.keys import record_key
from fsm_storage.management.output import Progress, as_json
from fsm_storage.mirror import repairing
from fsm_storage.mirror.worker import Mirror

TROUBLE = 3
"""The exit code of a mirror that is behind, or of differences that were found."""


class Command(BaseCommand):
    help = "Brings what a RedisStorage writes into the database, until it is stopped; looks after the mirror."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--alias", default="default", help="a RedisStorage of FSM_STORAGES (default)")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--until-empty", action="store_true", help="end when the outbox is empty")
        what.add_argument("--status", action="store_true", help="say how far the mirror is")
        what.add_argument("--verify", action="store_true", help="compare Redis with the database, both ways")
        what.add_argument(
            "--resync", action="store_true", help="mend the database where it differs from Redis"
        )
        what.add_argument("--restore", action="store_true", help="fill Redis with what only the database has")
        parser.add_argument(
            "--prune", action="store_true", help="with --resync: also clear what only the database has"
        )
        parser.add_argument("--bot-id", type=int, help="the bot of keys that name none, if there are several")
        parser.add_argument(
            "--max-lag", type=float, default=60.0, metavar="SECONDS",
            help=f"with --status: the exit code is {TROUBLE} if the mirror is further behind (60)",
        )  # fmt: skip
        parser.add_argument("--json", action="store_true", help="print the outcome as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["prune"] and not options["resync"]:
            raise CommandError("--prune goes with --resync", returncode=2)
        storage = self._storage(options["alias"])
        self._progress = Progress(self.stderr)
        try:
            asyncio.run(self._work(storage, options))
        except (FSMStorageError, RedisError, OSError) as error:
            raise CommandError(f"{storage.alias}: {error}") from error
        finally:
            self._progress.end()

    def _storage(self, alias: str) -> RedisStorage:
        try:
            found = storages[alias]
        except FSMStorageError as error:
            raise CommandError(str(error)) from error
        if not isinstance(found, RedisStorage) or not found.mirror:
            raise CommandError(f"FSM_STORAGES[{alias!r}] is no RedisStorage with a mirror", returncode=2)
        return found

    async def _work(self, storage: RedisStorage, options: dict[str, Any]) -> None:
        if options["status"]:
            await self._status(storage, options)
        elif options["verify"]:
            self._tell(await self._compared(storage, options), options)
        elif options["resync"]:
            await self._resync(storage, options)
        elif options["restore"]:
            count = await repairing.restore(storage, self._report)
            self._say(options, f"{storage.alias}: {count} values were written to Redis", restored=count)
        else:
            await self._mirror(storage, options)

    async def _mirror(self, storage: RedisStorage, options: dict[str, Any]) -> None:
        mirror = Mirror(storage)
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, mirror.stop)
        watch = asyncio.create_task(self._watch(mirror))
        done = await mirror.run(until_empty=options["until_empty"])
        watch.cancel()
        self._say(
            options,
            f"{storage.alias}: {done.writes} writes of {done.entries} entries were mirrored, {done.poison} put aside",
            entries=done.entries, writes=done.writes, aside=done.poison,
        )  # fmt: skip
        if done.poison:
            raise CommandError("see the log for what was put aside", returncode=TROUBLE)

    async def _watch(self, mirror: Mirror) -> None:
        while True:
            role = "mirrors" if mirror.is_active else "stands by"
            self._progress.show(f"{mirror.storage.alias}: {role}, {mirror.progress.writes} writes so far")
            await asyncio.sleep(1)

    async def _status(self, storage: RedisStorage, options: dict[str, Any]) -> None:
        now = await repairing.status(storage)
        self._say(
            options,
            f"{storage.alias}: {now.entries} entries wait ({now.pending} of them handed out), the oldest for "
            f"{now.lag_seconds:.1f} s; {now.missed} conversations to announce; {now.aside} entries put aside; "
            f"last handed out: {now.last_delivered or 'none'}",
            **now._asdict(),
        )
        if now.lag_seconds > options["max_lag"]:
            raise CommandError(
                f"the mirror is {now.lag_seconds:.0f} s behind: does one run?", returncode=TROUBLE
            )
        if now.aside:
            raise CommandError(f"{now.aside} entries could not be applied", returncode=TROUBLE)

    async def _compared(self, storage: RedisStorage, options: dict[str, Any]) -> repairing.Differences:
        return await repairing.compare(storage, self._report, bot_id=options["bot_id"])

    def _tell(self, found: repairing.Differences, options: dict[str, Any]) -> None:
        kinds = {
            "differ": found.differ, "only_redis": found.only_redis, "only_database": found.only_database,
        }  # fmt: skip
        samples = {
            kind: [record_key(key, None) for key in keys[: repairing.SAMPLES]] for kind, keys in kinds.items()
        }
        lines = [
            f"{found.same} conversations are the same; {len(found.differ)} differ, {len(found.only_redis)} are only "
            f"in Redis, {len(found.only_database)} only in the database"
        ]
        lines += [f"  {kind}: {', '.join(keys)}" for kind, keys in samples.items() if keys]
        lines += [f"  unreadable: {text}" for text in found.unread[: repairing.SAMPLES]]
        if not found.looked_both_ways:
            lines.append("  what is only in Redis was not looked for: its keys do not say whose they are")
        self._say(
            options, "\n".join(lines), same=found.same, **{kind: len(keys) for kind, keys in kinds.items()},
            samples=samples, unreadable=len(found.unread), both_ways=found.looked_both_ways,
        )  # fmt: skip
        if found.total:
            raise CommandError(f"{found.total} differences", returncode=TROUBLE)

    async def _resync(self, storage: RedisStorage, options: dict[str, Any]) -> None:
        found = await self._compared(storage, options)
        count = await repairing.resync(storage, found, prune=options["prune"])
        left = 0 if options["prune"] else len(found.only_database)
        text = f"{storage.alias}: {count} conversations were announced to the mirror"
        if left:
            text += f"; {left} that only the database has were left (--restore or --prune)"
        self._say(options, text, announced=count, only_database=left)

    def _report(self, count: int) -> None:
        self._progress.show(f"{count} conversations so far")

    def _say(self, options: dict[str, Any], text: str, **facts: Any) -> None:
        self._progress.end()
        self.stdout.write(as_json(facts) if options["json"] else text)
