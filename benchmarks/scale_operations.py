"""A handler's four operations on few and on many records in turns, so that what else goes on hits both alike.

Each round asks both databases, one after the other, for the same number of operations on random conversations; the
ratio is that of the medians of the rounds. The processor time is that of this process and of all of the server's.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROUNDS = 9
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
    """Return a line for each number of chats and each history: operations/s on both databases, and the ratios."""
    return [
        line for chats in CHATS for history in ("off", "states") for line in [_line(sizes, chats, history)]
    ]


def _line(sizes: dict[str, int], chats: int, history: str) -> list[str]:
    costs = asyncio.run(_rounds(sizes, chats, history))
    (few, many), done = costs.values(), 4 * chats * CHATS[chats]
    ratios = [median(many, part) / median(few, part) for part in Cost._fields]
    rates = [f"{done / median(cost, 'passed'):,.0f}/s" for cost in (few, many)]
    line = [f"C={chats}, history {history}", *rates, *(f"{ratio:.2f}×" for ratio in ratios)]
    sys.stderr.write(f"  {' '.join(line)}\n")
    return line


def median(costs: list[Cost], part: str) -> float:
    return statistics.median(getattr(cost, part) for cost in costs)


async def _rounds(sizes: dict[str, int], chats: int, history: str) -> dict[str, list[Cost]]:
    from fsm_storage import DjangoStorage

    storages = {using: DjangoStorage(database=using, history=history) for using in sizes}
    costs: dict[str, list[Cost]] = {using: [] for using in sizes}
    for number in range(ROUNDS + 1):
        for using in sorted(sizes, reverse=bool(number % 2)):
            cost = await _round(storages[using], sizes[using], chats, number)
            if number:  # the first one connects and warms up
                costs[using].append(cost)
    for storage in storages.values():
        await storage.close()
    return costs


async def _round(storage: Any, rows: int, chats: int, seed: int) -> Cost:
    began, at_work = time.perf_counter(), _processor_time()
    await asyncio.gather(
        *(_chat(storage, random.Random(f"{seed}:{chat}"), rows, CHATS[chats]) for chat in range(chats))
    )
    return Cost(time.perf_counter() - began, _processor_time() - at_work)


async def _chat(storage: Any, chance: random.Random, rows: int, times: int) -> None:
    from aiogram.fsm.storage.base import StorageKey

    for count in range(times):
        number = chance.randrange(1, rows)
        key = StorageKey(bot_id=42, chat_id=number, user_id=number)
        await storage.get_state(key)
        await storage.set_state(key, f"Order:{chance.choice(['item', 'size', 'amount'])}")
        await storage.update_data(key, {"amount": count})
        await storage.get_data(key)


def _processor_time() -> float:
    """Return the seconds that this process and those of its PostgreSQL have been at work."""
    from django.db import connection

    folder = connection.settings_dict["HOST"]
    server = psutil.Process(int(Path(folder, "postmaster.pid").read_text().split()[0]))
    children = [child.cpu_times() for child in server.children()]
    return time.process_time() + sum(times.user + times.system for times in children)
