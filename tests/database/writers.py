"""What the forked processes do. Each notes an acknowledged write in a file, which outlives its killing."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiogram import Bot
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoStorage, Expired, Expiry, LeaseLost, storages
from fsm_storage.backends import forks
from fsm_storage.exceptions import StorageTimeout
from fsm_storage.leases import LeaseKeeper
from fsm_storage.lifecycle import runner
from tests import turns
from tests.notes import notes


def key_of(chat: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=chat, user_id=chat)


def write_for_ever(database: str, path: str, first_chat: int, chats: int) -> None:
    """Write the n-th state and the n-th data of several chats, and note each n when it is acknowledged."""
    note = notes(path)

    async def talk(storage: DjangoStorage, chat: int) -> None:
        n = 0
        while True:
            n += 1
            await storage.set_state(key_of(chat), f"s{n}")
            note(f"state {chat} {n}")
            await storage.set_data(key_of(chat), {"a": n, "text": "x" * 2000, "b": n})
            note(f"data {chat} {n}")
            await storage.update_data(key_of(chat + 1_000_000), {f"f{n}": n})
            note(f"field {chat + 1_000_000} {n}")

    async def main() -> None:
        storage = DjangoStorage(database, database=database)
        async with asyncio.TaskGroup() as group:
            for chat in range(first_chat, first_chat + chats):
                group.create_task(talk(storage, chat))

    asyncio.run(main())


def add_fields(database: str, path: str, who: str, chats: int, tasks: int, fields: int) -> None:
    """Add fields of its own to data that another process writes too, from several tasks."""
    note = notes(path)

    async def add(storage: DjangoStorage, task: int) -> None:
        for n in range(fields):
            chat, name = (task + n) % chats, f"{who}-{task}-{n}"
            merged = await storage.update_data(key_of(chat), {name: n})
            assert merged[name] == n
            note(f"{chat} {name} {n}")

    async def main() -> None:
        storage = DjangoStorage(database, database=database, timeout=30)
        async with asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(add(storage, task))
        await storage.close()

    asyncio.run(main())


def create_together(database: str, path: str, who: str, start_at: float, chats: int) -> None:
    """At the same moment as another process, add a field to records that do not exist."""
    note = notes(path)

    async def main() -> None:
        storage = DjangoStorage(database, database=database, timeout=30)
        await storage.get_state(key_of(0))  # the connections are open before the race
        await asyncio.sleep(start_at - asyncio.get_running_loop().time())
        await asyncio.gather(*(storage.update_data(key_of(chat), {who: chat}) for chat in range(chats)))
        note(f"{who} done")
        await storage.close()

    asyncio.run(main())


def fork_after_use(database: str, path: str) -> None:
    """Use a storage, fork, and use it on both sides: first in the child, then in the parent."""
    note = notes(path)
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork() in a process with threads
    storage = DjangoStorage(database, database=database)

    async def add(name: str) -> None:
        merged = await asyncio.wait_for(storage.update_data(key_of(1), {name: 1}), 10)
        await storage.set_state(key_of(1), name)
        assert await storage.get_state(key_of(1)) == name
        note(" ".join(sorted(merged)))

    asyncio.run(add("before"))
    pid = os.fork()
    asyncio.run(add("parent" if _is_parent(pid) else "child"))


def fork_while_a_thread_starts(database: str, path: str) -> None:
    """Fork while other threads hold the locks under which a storage is made, and makes its batchers; and while one
    is in the database's library for longer than a fork waits."""
    note = notes(path)
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork() in a process with threads
    storage = storages[database] = DjangoStorage(database, database=database)
    may_end = threading.Event()

    def hold(lock_of: Callable[[], Any]) -> threading.Thread:
        held = threading.Event()

        def run() -> None:
            with lock_of():
                held.set()
                may_end.wait()

        thread = threading.Thread(target=run)
        thread.start()
        held.wait()
        return thread

    locks = (lambda: storage._carrier._starting, lambda: storages._lock, forks.at_work.guard)
    threads = [hold(lock_of) for lock_of in locks]
    forks.PATIENCE = 0.2
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        asyncio.run(storage.set_state(key_of(1), "child"))
        del storages[database]
        assert storages["default"] is not None
        note("child")
        os._exit(0)
    may_end.set()
    for thread in threads:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def fork_while_a_thread_writes(database: str, path: str, count: int) -> None:
    """Fork again and again while another thread is in the database's library, and use it in each child.

    Notes each child, and what the storage says of a connection that did not stand it.
    """
    note = notes(path)
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork() in a process with threads
    storage = DjangoStorage(database, database=database, timeout=20)
    forks.PATIENCE = 10.0  # a busy machine stands still for longer than a fork waits
    watch = logging.Handler()
    watch.addFilter(lambda entry: "locked" not in entry.getMessage())  # as SQLite is while one stands still
    watch.emit = lambda entry: note(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fsm_storage").addHandler(watch)
    logging.getLogger("fsm_storage").setLevel(logging.INFO)
    has_begun, may_end = threading.Event(), threading.Event()

    async def write() -> None:
        n = 0
        while not may_end.is_set():
            await asyncio.gather(*(storage.update_data(key_of(chat), {"n": n}) for chat in range(8)))
            has_begun.set()
            n += 1
        await storage.close()

    writer = threading.Thread(target=asyncio.run, args=(write(),))
    writer.start()
    has_begun.wait()
    for number in range(count):
        time.sleep(random.uniform(0, 0.01))
        pid = os.fork()
        if not pid:
            signal.alarm(20)  # a lock that nobody will release
            gc.collect()
            asyncio.run(storage.set_state(key_of(100 + number), "child"))
            note(f"child {number}")
            os._exit(0)
        os.waitpid(pid, 0)
    may_end.set()
    writer.join()


def _is_parent(pid: int) -> bool:
    """Say on which side of a fork this is; the parent first waits for the child's good end."""
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return bool(pid)


def talk_in_old_states(database: str, path: str, chats: int) -> None:
    """Go through states that a migration renames meanwhile, until there is a file `path`.stop.

    Notes each round of a chat when it is acknowledged.
    """
    note = notes(path)

    async def talk(storage: DjangoStorage, chat: int) -> None:
        n = 0
        while not os.path.exists(f"{path}.stop"):
            state = ("Form:name", "Form:age", "Other:state")[n % 3]
            await storage.set_state(key_of(chat), state)
            await storage.update_data(key_of(chat), {f"f{n}": n, "phone": chat})
            note(f"{chat} {n} {state}")
            n += 1
            await asyncio.sleep(random.uniform(0.2, 1.5))

    async def main() -> None:
        storage = DjangoStorage(database, database=database, timeout=30)
        async with asyncio.TaskGroup() as group:
            for chat in range(chats):
                group.create_task(talk(storage, chat))
        await storage.close()

    asyncio.run(main())


def take_turns(
    database: str, path: str, who: str, seconds: float, tasks: int, owner: str | None = None
) -> None:
    """See `turns`."""
    storage = DjangoStorage(database, database=database, timeout=30)
    asyncio.run(turns.take_turns(storage, path, who, seconds, tasks, owner))


def handle_expiries(database: str, path: str, bot_id: int, lease: float, work: float, processes: int) -> None:
    """Handle what expires, for `work` seconds each, until killed. Notes the chat when a handler begins.

    Nothing is finished before so many `processes` have begun something: one may stand still for a while.
    """
    note = notes(path)
    all_have_begun = False
    runner.LEASE = lease
    expiry = Expiry(interval=0.5)

    @expiry.handler()
    async def handle(expired: Expired) -> None:
        nonlocal all_have_begun
        note(f"handled {expired.key.chat_id} {os.getpid()}")
        while not all_have_begun:
            handled = [line for line in Path(path).read_text().splitlines() if line.startswith("handled")]
            all_have_begun = len({line.split()[-1] for line in handled}) >= processes
            await asyncio.sleep(0.01)
        await asyncio.sleep(work)

    async def main() -> None:
        storage = DjangoStorage(database, database=database, expiry=expiry, timeout=30)
        async with Bot(f"{bot_id}:{'A' * 35}") as bot:
            await expiry.run(storage, [bot])

    asyncio.run(main())


def renew_expired(database: str, path: str, chats: list[int]) -> None:
    """Write these chats' states anew, each under its lease as a bot's handler does, and note that."""
    note = notes(path)

    async def main() -> None:
        storage = DjangoStorage(database, database=database, timeout=30)
        keeper = LeaseKeeper(storage, 30)
        for chat in chats:
            while (lease := await keeper.acquire(storage.key_text(key_of(chat)))) is None:
                await asyncio.sleep(0.02)
            await storage.set_state(key_of(chat), "renewed")
            note(f"renewed {chat}")
            keeper.release(lease)
        await keeper.close()
        await storage.close()

    asyncio.run(main())


def hold_for_ever(database: str, path: str, lease: float) -> None:
    """Write under a lock without end, and note each write, and how it ends when the lease is lost."""
    note = notes(path)

    async def main() -> None:
        storage = DjangoStorage(database, database=database)
        isolation = storage.create_isolation(lease=lease)
        n = 0
        try:
            async with isolation.lock(key_of(1)):
                note(f"entered {time.monotonic_ns()}")
                while True:
                    n += 1
                    try:
                        await storage.set_data(key_of(1), {"n": n})
                        note(f"wrote {n}")
                        await asyncio.sleep(
                            0.2
                        )  # whoever stops it after a note stops it outside a transaction
                    except StorageTimeout:
                        note("unanswered")  # it was on its way when the process was stopped
                    except asyncio.CancelledError:
                        note("cancelled")
                        await storage.set_data(key_of(1), {"n": "cleaning up"})
        except LeaseLost as error:
            note(f"lost {error.key}")
        await storage.close()
        await isolation.close()

    asyncio.run(main())


def lock_after_fork(database: str, path: str) -> None:
    """See `turns`."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork()
    asyncio.run(turns.lock_after_fork(DjangoStorage(database, database=database), path, 3.0))
