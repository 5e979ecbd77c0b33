"""One measurement, in a process of its own that was forked from a clean one with the imports done."""

from __future__ import annotations

import asyncio
import gc
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any, cast

from benchmarks import dispatching, locking, mirrors, statement, workload
from benchmarks.contenders import CONTENDERS, Places
from benchmarks.peers import open_isolation, open_storage
from benchmarks.plan import Cell


def work(cell: Cell, places: Places, answer: Connection) -> None:
    """Send the result of `cell`, or the text of the error that it met. Runs in the child."""
    try:
        answer.send(run(cell, places))
    except BaseException:
        answer.send(traceback.format_exc())


def run(cell: Cell, places: Places) -> dict[str, Any]:
    """Measure, or make the tables, in this process."""
    if cell.kind == "migrate":
        return _migrate(places)
    contender = CONTENDERS[cell.contender]
    if contender.is_ours or cell.contender.startswith("orm"):
        prepare_django(places, contender.synchronous)
    gc.collect()
    gc.freeze()  # as project/bot.py does, for every contender
    return asyncio.run(_measure(cell, places))


def prepare_django(places: Places, synchronous: str = "NORMAL") -> None:
    import django

    os.environ.update(
        DJANGO_SETTINGS_MODULE="benchmarks.settings",
        BENCH_SQLITE=str(places.sqlite),
        BENCH_POSTGRES=places.postgres,
        BENCH_SYNCHRONOUS=synchronous,
    )
    django.setup()


async def _measure(cell: Cell, places: Places) -> dict[str, Any]:
    async with open_storage(cell.contender, places) as storage:
        if cell.kind == "statement":
            return await statement.compare(storage, places, cell.seconds)
        if cell.kind in ("lock", "shared-lock"):
            async with open_isolation(storage) as isolation:
                return await locking.measure(
                    isolation, cell.chats, cell.seconds, shared=cell.kind == "shared-lock"
                )
        if cell.kind in ("dispatcher", "answering"):
            bot_api = places.bot_api if cell.kind == "answering" else None
            return await dispatching.measure(storage, cell.chats, cell.seconds, bot_api)
        mirror = CONTENDERS[cell.contender].mirror
        ours = cast(Any, storage)
        if mirror == "apart":
            await mirrors.wait_for_mirror(ours)
        result = await workload.measure(storage, cell.chats, cell.seconds)
        if mirror:
            result["behind"] = await mirrors.seconds_behind(ours)
        return result


def serve_mirror(places: Places) -> None:
    """Be a mirror until SIGTERM. Runs in a child."""
    prepare_django(places)
    asyncio.run(mirrors.serve(places))


def _migrate(places: Places) -> dict[str, Any]:
    prepare_django(places)
    from django.core.management import call_command
    from django.db import connections

    for database in ("default", "postgres"):
        call_command("migrate", database=database, run_syncdb=True, verbosity=0)
    connections.close_all()
    return {}
