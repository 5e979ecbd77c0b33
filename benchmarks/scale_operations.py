"""A handler's four operations on few and on many records in turns, so that what else goes on hits both alike.

Each round asks both databases, one after the other, for the same number of operations on random conversations: out of
as many in both, spread over all the records, as few of a bot's users are active at a time; then out of all there are,
nearly each of which is met for the first time. The ratio is that of the medians of the rounds. The processor time is
that of this process and of all of the server's.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROUNDS = 15
CHATS = {64: 40, 1: 400}
"""How many chats at a time, and how often each does its four operations in a round."""


class Cost(NamedTuple):
    """Seconds of a round: that passed, and of processors."""

    passed: float
    busy: float


def make_small(rows: int) -> None:
    """Make the database of few records anew, with its tables."""
    from django.core.management import call_command
    from django.db import connection, connections

    from benchmarks import filling

    connections["small"].close()
    with connection.cursor() as cursor:
        cursor.execute("DROP DATABASE IF EXISTS small")
        cursor.execute("CREATE DATABASE small")
    call_command("migrate", database="small", verbosity=0)
    filling.fill_records(rows, using="small")


def measure(sizes: dict[str, int]) -> list[list[str]]:
    """Return a line for each kind of round: operations/s on both databases, and the ratios."""
    return [
        _line(sizes, chats, history, active)
        for active in (min(sizes.values()), None)
        for chats in CHATS
        for history in ("off", "states")
    ]


def _line(sizes: dict[str, int], chats: int, history: str, active: int | None) -> list[str]:
    costs = asyncio.run(_rounds(sizes, chats, history, active))
    (few, many), done = costs.values(), 4 * chats * CHATS[chats]
    ratios = [median(many, part) / median(few, part) for part in Cost._fields]
    rates = [f"{done / median(cost, 'passed'):,.0f}/s" for cost in (few, many)]
    whom = f"{active:,} active" if active else "any of all"
    line = [f"{whom}, C={chats}, history {history}", *rates, *(f"{ratio:.2f}×" for ratio in ratios)]
    sys.stderr.write(f"  {' '.join(line)}\n")
    return line


def median(costs: list[Cost], part: str) -> float:
    return statistics.median(getattr(cost, part) for cost in costs)


async def _rounds(
    sizes: dict[str, int], chats: int, history: str, active: int | None
) -> dict[str, list[Cost]]:
    from fsm_storage import DjangoStorage

    storages = {using: DjangoStorage(database=using, history=history) for using in sizes}
    costs: dict[str, list[Cost]] = {using: [] for using in sizes}
    numbers = {using: range(1, rows, rows // active if active else 1) for using, rows in sizes.items()}
    if active:
        for using in sizes:
            await asyncio.gather(*(_handle(storages[using], number, 0) for number in numbers[using]))
    for number in range(ROUNDS + 1):
        for using in sorted(sizes, reverse=bool(number % 2)):
            # What is met for the first time shall be so in each line.
            chance = random.Random(f"{number} {chats} {history}")
            cost = await _round(storages[using], numbers[using], chats, chance)
            if number:  # the first one connects and warms up
                costs[using].append(cost)
    for storage in storages.values():
        await storage.close()
    return costs


async def _round(storage: Any, numbers: Sequence[int], chats: int, chance: random.Random) -> Cost:
    chosen = [[chance.choice(numbers) for _ in range(CHATS[chats])] for _ in range(chats)]
    began, at_work = time.perf_counter(), _processor_time()
    await asyncio.gather(*(_chat(storage, some) for some in chosen))
    return Cost(time.perf_counter() - began, _processor_time() - at_work)


async def _chat(storage: Any, numbers: Sequence[int]) -> None:
    for count, number in enumerate(numbers):
        await _handle(storage, number, count)


async def _handle(storage: Any, number: int, count: int) -> None:
    from aiogram.fsm.storage.base import StorageKey

    key = StorageKey(bot_id=42, chat_id=number, user_id=number)
    await storage.get_state(key)
    await storage.set_state(key, f"Order:{('item', 'size', 'amount')[(number + count) % 3]}")
    await storage.update_data(key, {"amount": count})
    await storage.get_data(key)


def _processor_time() -> float:
    """Return the seconds that this process and those of its PostgreSQL have been at work."""
    from django.db import connection

    folder = connection.settings_dict["HOST"]
    server = psutil.Process(int(Path(folder, "postmaster.pid").read_text().split()[0]))
    busy = time.process_time()
    for child in server.children():
        with suppress(psutil.NoSuchProcess):  # an autovacuum that has ended meanwhile
            times = child.cpu_times()
            busy += times.user + times.system
    return busy
