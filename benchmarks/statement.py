"""One chat on PostgreSQL: an operation of ours beside the bare statement, turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from benchmarks.contenders import Places

WARM_UP_ROUNDS = 30

_SELECT = "SELECT state FROM fsm_storage_record WHERE alias = %s AND key = %s"
_UPSERT = """
INSERT INTO fsm_storage_record AS r (alias, key, bot_id, chat_id, user_id, destiny, state, data, version)
VALUES (%s, %s, 42, 8, 8, 'default', %s, '{}', 1)
ON CONFLICT (alias, key) DO UPDATE
SET state = EXCLUDED.state, version = r.version + 1, updated_at = now()
"""


class Bare:
    """The statements on a psycopg connection with psycopg's defaults, autocommit."""

    def __init__(self, places: Places) -> None:
        self.connection = psycopg.connect(places.postgres_dsn, autocommit=True)

    def get(self) -> Any:
        return self.connection.execute(_SELECT, ("default", "bare")).fetchone()

    def set(self, state: str) -> None:
        self.connection.execute(_UPSERT, ("default", "bare", state))


async def compare(storage: BaseStorage, places: Places, seconds: float) -> dict[str, Any]:
    """Return the median latencies in microseconds, and ours to the bare one's."""
    bare = Bare(places)
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    times: dict[str, list[float]] = {"get": [], "bare_get": [], "set": [], "bare_set": []}
    turn, end = 0, time.perf_counter() + seconds
    while turn < WARM_UP_ROUNDS or time.perf_counter() < end:
        if turn == WARM_UP_ROUNDS:
            for latencies in times.values():
                latencies.clear()
        state = f"Order:{turn % 4}"
        _time(times["bare_set"], lambda state=state: bare.set(state))
        await _time_async(times["set"], lambda state=state: storage.set_state(key, state))
        _time(times["bare_get"], bare.get)
        await _time_async(times["get"], lambda: storage.get_state(key))
        turn += 1
    bare.connection.close()
    medians = {name: statistics.median(latencies) * 1e6 for name, latencies in times.items()}
    return {
        **{f"{name}_us": median for name, median in medians.items()},
        "get_ratio": medians["get"] / medians["bare_get"],
        "set_ratio": medians["set"] / medians["bare_set"],
    }


def _time(latencies: list[float], function: Callable[[], Any]) -> None:
    start = time.perf_counter()
    function()
    latencies.append(time.perf_counter() - start)


async def _time_async(latencies: list[float], function: Callable[[], Awaitable[Any]]) -> None:
    start = time.perf_counter()
    await function()
    latencies.append(time.perf_counter() - start)
