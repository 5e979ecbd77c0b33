"""What processes do with a lock, whatever keeps its leases."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from typing import Any

from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoEventIsolation, LeaseTimeout
from tests.notes import meet, notes

KEY = StorageKey(bot_id=1, chat_id=1, user_id=1)


async def take_turns(
    storage: Any, path: str, who: str, seconds: float, tasks: int, owner: str | None = None
) -> None:
    """Work under one lock from several tasks, and note when each turn began and ended. Closes the storage.

    With `owner`, in the name of that one, which takes away what keeps two processes apart. Then they begin
    several times together: one that stands still for a while misses only some of it.
    """
    note, rounds = notes(path), 1 if owner is None else 4

    async def work(isolation: DjangoEventIsolation, task: int, until: float) -> None:
        turns = 0
        while turns < 2 or time.monotonic() < until:  # also if the process stood still for all that time
            async with isolation.lock(KEY):
                began = time.monotonic_ns()
                await asyncio.sleep(random.uniform(0, 0.004))
                note(f"{began} {time.monotonic_ns()} {who} {task}")
            turns += 1
            await asyncio.sleep(0)

    isolation = DjangoEventIsolation(storage=storage)
    if owner is not None:
        isolation._open()[1].keeper.owner = owner
    for number in range(rounds):
        meet(path, f"{who}{number}", [f"{one}{number}" for one in "ab"])
        async with asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(work(isolation, task, time.monotonic() + seconds / rounds))
    await storage.close()
    await isolation.close()


async def lock_after_fork(storage: Any, path: str, timeout: float) -> None:
    """Fork while a lock is held: the child has none of its parent's leases. Closes the storage."""
    note, isolation = notes(path), DjangoEventIsolation(storage=storage, timeout=timeout)

    async def enter(name: str) -> None:
        try:
            async with isolation.lock(KEY):
                note(name)
        except LeaseTimeout:
            note(f"{name} timeout")
        except Exception as error:
            note(f"{name} {error!r} {error.__cause__!r}")
        await storage.close()
        await isolation.close()

    async with isolation.lock(KEY):
        pid = os.fork()
        if not pid:
            # The loop is the parent's, down to its epoll: it must not be touched here.
            child = threading.Thread(target=asyncio.run, args=(enter("child"),))
            child.start()
            child.join()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    await enter("parent")
