"""What the processes do that tests start. Each notes an acknowledged write in a file, which outlives it.

python -m tests.redis.writers NAME URL FILE [ARGUMENT ...]
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import warnings

from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.fsm.storage.redis import RedisStorage as AiogramStorage

from fsm_storage import DjangoEventIsolation, LeaseLost, RedisStorage
from tests import turns
from tests.notes import meet, notes


def key_of(chat: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=chat, user_id=chat)


def add_fields(url: str, path: str, who: str, kind: str) -> None:
    """At the same time as another process, add fields to the data of three chats, from eight tasks."""
    note = notes(path)

    async def add(storage: BaseStorage, task: int) -> None:
        for n in range(40):
            chat, name = (task + n) % 3, f"{who}-{task}-{n}"
            merged = await storage.update_data(key_of(chat), {name: n})
            assert merged[name] == n
            note(f"{chat} {name} {n}")

    async def main() -> None:
        storage: BaseStorage = (
            RedisStorage.from_url(url, timeout=30, mirror="apart")
            if kind == "ours"
            else AiogramStorage.from_url(url)
        )
        await storage.get_state(key_of(0))
        meet(path, who, "ab")
        await asyncio.gather(*(add(storage, task) for task in range(8)))
        await storage.close()

    asyncio.run(main())


def write_and_be_killed(url: str, path: str, rounds: str) -> None:
    """Fork a writer and kill it at any moment, again and again."""
    for number in range(int(rounds)):
        size = os.path.getsize(path) if number else 0
        pid = os.fork()
        if not pid:
            asyncio.run(_write_for_ever(url, path, number * 100))
        _wait_for_growth(path, size)
        time.sleep(random.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_for_growth(path: str, size: int) -> None:
    """Wait until something was acknowledged: on a busy machine that may take a while."""
    deadline = time.monotonic() + 60
    while not os.path.exists(path) or os.path.getsize(path) == size:
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def _write_for_ever(url: str, path: str, first_chat: int) -> None:
    note, storage = notes(path), RedisStorage.from_url(url, mirror="apart")

    async def talk(chat: int) -> None:
        n = 0
        while True:
            n += 1
            await storage.set_state(key_of(chat), f"s{n}")
            note(f"state {chat} {n}")
            await storage.set_data(key_of(chat), {"a": n, "text": "x" * 2000, "b": n})
            note(f"data {chat} {n}")
            await storage.update_data(key_of(chat + 1_000_000), {f"f{n}": n})
            note(f"field {chat + 1_000_000} {n}")

    await asyncio.gather(*(talk(first_chat + chat) for chat in range(8)))


def fork_after_use(url: str, path: str) -> None:
    """Use a storage, fork, and use it on both sides: first in the child, then in the parent."""
    note, storage = notes(path), RedisStorage.from_url(url, mirror="apart")

    async def add(name: str) -> None:
        merged = await asyncio.wait_for(storage.update_data(key_of(1), {name: 1}), 10)
        note(" ".join(sorted(merged)))

    asyncio.run(add("before"))
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    asyncio.run(add("parent" if pid else "child"))


def take_turns(url: str, path: str, who: str, seconds: str, tasks: str, owner: str = "") -> None:
    """See `turns`."""

    async def main() -> None:
        storage = RedisStorage.from_url(url, mirror=False)
        await turns.take_turns(storage, path, who, float(seconds), int(tasks), owner or None)

    asyncio.run(main())


def hold_for_ever(url: str, path: str, lease: str) -> None:
    """Write under a lock until its lease is lost."""
    note = notes(path)

    async def main() -> None:
        storage = RedisStorage.from_url(url, mirror=False)
        isolation = DjangoEventIsolation(storage=storage, lease=float(lease))
        try:
            async with isolation.lock(key_of(1)):
                note(f"entered {time.monotonic_ns()}")
                n = 0
                while True:
                    n += 1
                    await storage.set_data(key_of(1), {"n": n})
                    note(f"wrote {n}")
                    await asyncio.sleep(0.01)
        except LeaseLost as error:
            note(f"lost {error.key}")
        await storage.close()
        await isolation.close()

    asyncio.run(main())


def lock_after_fork(url: str, path: str) -> None:
    """See `turns`."""
    asyncio.run(turns.lock_after_fork(RedisStorage.from_url(url, mirror=False), path, 3.0))


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork()
    globals()[sys.argv[1]](*sys.argv[2:])
