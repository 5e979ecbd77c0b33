"""A whole Dispatcher at work, C chats at a time: updates a second."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from aiogram import Bot, Dispatcher
from aiogram.dispatcher.event.bases import UNHANDLED
from aiogram.fsm.storage.base import BaseStorage
from aiogram.types import Update

from benchmarks.bot import CONVERSATION, answering, make_bot, make_dispatcher
from benchmarks.plan import WARM_UP_SECONDS
from benchmarks.workload import Reading


class Traffic:
    """The chats that talk to the bot, and the count of their updates."""

    def __init__(self, bot: Bot, dispatcher: Dispatcher) -> None:
        self.bot, self.dispatcher = bot, dispatcher
        self.done = 0
        self.stopping = False

    def read(self) -> Reading:
        return Reading(time.perf_counter(), time.process_time(), self.done, 0)

    async def chat(self, number: int) -> None:
        """Hold the conversation over and over, one update after the other."""
        texts = [_update(number, step, said) for step, said in enumerate(CONVERSATION)]
        while not self.stopping:
            for text in texts:
                update = Update.model_validate(json.loads(text), context={"bot": self.bot})
                if await self.dispatcher.feed_update(self.bot, update) is UNHANDLED:
                    raise RuntimeError(f"no handler took {update.message.text!r}: a state was lost")
                self.done += 1
                if self.stopping:
                    return
                # Updates come from the network; without this a storage that never suspends serves one chat.
                await asyncio.sleep(0)


def _update(number: int, step: int, said: str) -> str:
    person = {
        "id": 1000 + number,
        "is_bot": False,
        "first_name": "Ann",
        "last_name": "Example",
        "username": f"ann_{number}",
        "language_code": "en",
    }
    message = {
        "message_id": 100 + step,
        "from": person,
        "chat": {"id": 1000 + number, "type": "private", "first_name": "Ann", "username": f"ann_{number}"},
        "date": 1_760_000_000 + step,
        "text": said,
    }
    if said.startswith("/"):
        message["entities"] = [{"type": "bot_command", "offset": 0, "length": len(said)}]
    return json.dumps({"update_id": number * 100 + step, "message": message})


async def measure(
    storage: BaseStorage, chats: int, seconds: float, bot_api: str | None = None
) -> dict[str, Any]:
    """Return updates a second, and what one costs in processor time. With `bot_api`, each update is answered."""
    dispatcher = make_dispatcher(storage)
    if bot_api is not None:
        dispatcher.message.middleware(answering)
    async with make_bot(bot_api) as bot:
        return await _measure(Traffic(bot, dispatcher), chats, seconds)


async def _measure(traffic: Traffic, chats: int, seconds: float) -> dict[str, Any]:
    tasks = [asyncio.create_task(traffic.chat(number)) for number in range(chats)]
    await asyncio.sleep(WARM_UP_SECONDS)
    before = traffic.read()
    await asyncio.sleep(seconds)
    after = traffic.read()
    traffic.stopping = True
    await asyncio.gather(*tasks)
    done = after.done - before.done
    return {
        "rate": done / (after.at - before.at),
        "cpu_us": (after.cpu - before.cpu) / max(done, 1) * 1e6,
        "error_share": 0.0,
        "errors": {},
        "wrong": 0,
    }
