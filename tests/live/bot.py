"""A process that writes: one change at once, and another for each line on its input. Ends when that ends.

Its arguments are the first state, and the address of a Redis if the bot lives there and mirrors by itself.
"""

from __future__ import annotations

import asyncio
import sys

import django


async def main(state: str, url: str = "") -> None:
    from aiogram.fsm.storage.base import StorageKey

    from fsm_storage import RedisStorage, storages
    from fsm_storage.live.broadcasting import Broadcaster
    from fsm_storage.mirror import worker

    # At its end it waits for what was not told or mirrored yet, also on a machine that stands still for a while.
    Broadcaster.finish.__defaults__ = (30.0,)
    worker.LAST_SECONDS = 30.0
    storage = RedisStorage.from_url(url, timeout=30) if url else storages["default"]
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    await storage.set_state(key, state)
    print("written", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await storage.set_state(key, line.strip())
        print("written", flush=True)
    await storage.close()


if __name__ == "__main__":
    django.setup()
    asyncio.run(main(*sys.argv[1:]))
