"""A handler's work on a storage, C chats at a time on one event loop: operations a second."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from benchmarks.plan import WARM_UP_SECONDS

START_SECONDS = 5.0
"""What all chats together get to write their first data, before the warm-up begins."""
GRACE_SECONDS = 3.0
"""What chats that are still waiting get after the measurement, before they are cancelled."""


class Order(StatesGroup):
    name = State()
    phone = State()
    address = State()
    confirm = State()


_STATES = [Order.name, Order.phone, Order.address, Order.confirm]
_UNKNOWN = object()
_FIRST_DATA = {
    "name": "Ann Example",
    "phone": "+1 555 0100",
    "address": {"city": "Springfield", "street": "Evergreen Terrace", "house": 742},
    "basket": [{"id": 17, "count": 2}, {"id": 4, "count": 1}],
    "language": "en",
}


class Reading(NamedTuple):
    at: float
    cpu: float
    done: int
    errors: int


class Load:
    """The chats, and the count of what they got done."""

    def __init__(self, storage: BaseStorage, chats: int) -> None:
        self.storage = storage
        self._to_start = chats
        self.started = asyncio.Event()
        self.done = self.errors = self.wrong = 0
        self.kinds: Counter[str] = Counter()
        self.stopping = False

    def read(self) -> Reading:
        return Reading(time.perf_counter(), time.process_time(), self.done, self.errors)

    async def chat(self, number: int) -> None:
        """Handle one update after the other of a chat, until told to stop."""
        key = StorageKey(bot_id=42, chat_id=1000 + number, user_id=1000 + number)
        await self._start(key)
        expected: Any = _UNKNOWN
        step = 0
        while not self.stopping:
            step += 1
            state = _STATES[step % len(_STATES)]
            try:
                await self._handle(key, expected, state, step)
                expected = state.state
            except Exception as error:
                self._fail(error)
                expected = _UNKNOWN
            # Storages that never suspend would keep the loop to one chat; a bot waits for Telegram here.
            await asyncio.sleep(0)

    async def _start(self, key: StorageKey) -> None:
        try:
            await self.storage.set_data(key, _FIRST_DATA)
        except Exception as error:
            self._fail(error)
        self._to_start -= 1
        if not self._to_start:
            self.started.set()

    def _fail(self, error: Exception) -> None:
        self.errors += 1
        self.kinds[type(error).__name__] += 1

    async def _handle(self, key: StorageKey, expected: Any, state: State, step: int) -> None:
        storage = self.storage
        found = await storage.get_state(key)
        self.done += 1
        if expected is not _UNKNOWN and found != expected:
            self.wrong += 1
        await storage.set_state(key, state)
        self.done += 1
        await storage.update_data(key, {"step": step, "choice": f"item {step}"})
        self.done += 1
        data = await storage.get_data(key)
        self.done += 1
        if data.get("step") != step:
            self.wrong += 1


async def measure(storage: BaseStorage, chats: int, seconds: float) -> dict[str, Any]:
    """Return operations a second, their cost in processor time, the share of errors and of wrong answers."""
    load = Load(storage, chats)
    tasks = [asyncio.create_task(load.chat(number)) for number in range(chats)]
    with suppress(TimeoutError):
        await asyncio.wait_for(load.started.wait(), START_SECONDS)
    await asyncio.sleep(WARM_UP_SECONDS)
    before = load.read()
    await asyncio.sleep(seconds)
    after = load.read()
    load.stopping = True
    _, late = await asyncio.wait(tasks, timeout=GRACE_SECONDS)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    done, errors = after.done - before.done, after.errors - before.errors
    return {
        "rate": done / (after.at - before.at),
        "cpu_us": (after.cpu - before.cpu) / max(done, 1) * 1e6,
        "error_share": errors / max(done + errors, 1),
        "errors": dict(load.kinds),
        "wrong": load.wrong,
    }
