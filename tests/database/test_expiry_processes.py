"""Handlers in several processes, one of which is killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fsm_storage import DjangoStorage
from fsm_storage.models import FSMLease, FSMRecord
from tests.database.conftest import Launcher, wait_for
from tests.database.writers import key_of
from tests.rows import in_thread, let_time_pass

Make = Callable[..., DjangoStorage]

EXPIRIES, LEASE = 400, 3.0


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def handled(path: Path) -> Counter[int]:
    return Counter(int(words[1]) for words in lines(path) if words[0] == "handled")


def has_worked(path: Path, pid: int) -> bool:
    return any(words[-1] == str(pid) for words in lines(path))


def overdue(database: str) -> int:
    return FSMRecord.objects.using(database).state_expired().count()


async def fill(storage: DjangoStorage, expiries: int) -> None:
    """Chats whose state has expired, and as many again beside them that live on."""
    for start in range(0, expiries, 200):
        chats = range(start, min(start + 200, expiries))
        await asyncio.gather(*(storage.set_state(key_of(chat), "waiting") for chat in chats))
    await in_thread(let_time_pass, storage.database, 1001)
    await asyncio.gather(
        *(storage.set_state(key_of(chat), "waiting") for chat in range(expiries, expiries + 50))
    )


def run_and_kill(database: str, launcher: Launcher, notes: Path, expiries: int) -> None:
    """Three processes handle, one of them is killed on the way; a fourth renews every tenth chat."""
    renewed = list(range(5, expiries, 10))
    handlers = [launcher.start("handle_expiries", database, str(notes), 1, LEASE, 0.01, 3) for _ in range(3)]
    renewer = launcher.start("renew_expired", database, str(notes), renewed[::-1])
    try:
        victim = handlers[1]
        wait_for(lambda: sum(handled(notes).values()) > expiries // 4 and has_worked(notes, victim), 60)
        launcher.kill(victim)
        wait_for(lambda: overdue(database) == 0, 100)
        assert launcher.wait(renewer) == 0
    finally:
        for pid in (handlers[0], handlers[2]):
            launcher.kill(pid)


def check(database: str, notes: Path, expiries: int) -> None:
    counts, renewals = handled(notes), [words for words in lines(notes) if words[0] == "renewed"]
    renewed = {int(words[1]) for words in renewals}
    assert set(counts) | renewed == set(range(expiries))  # each was handled at least once, or renewed in time
    assert len({words[-1] for words in lines(notes) if words[0] == "handled"}) == 3
    for place, words in enumerate(lines(notes)):
        if words[0] == "renewed":
            later = [
                other for other in lines(notes)[place:] if other[0] == "handled" and other[1] == words[1]
            ]
            assert later == []  # none for a record that was renewed
    # Only what the killed process had begun was handled again: as many as it may have had at work.
    assert sum(counts.values()) - len(counts) <= 20
    states = FSMRecord.objects.using(database).values_list("chat_id", "state")
    assert {chat for chat, state in states if state == "renewed"} == renewed


async def test_three_processes_handle_each_expiry_though_one_is_killed(
    make_storage: Make, database: str, launcher: Launcher, notes: Path
) -> None:
    storage = make_storage(state_ttl=1000)
    await fill(storage, EXPIRIES)
    await in_thread(run_and_kill, database, launcher, notes, EXPIRIES)
    await in_thread(check, database, notes, EXPIRIES)


async def test_what_expired_while_no_process_ran_is_handled_later(
    make_storage: Make, database: str, launcher: Launcher, notes: Path
) -> None:
    storage = make_storage(state_ttl=1000)
    await fill(storage, 30)

    def run() -> None:
        pid = launcher.start("handle_expiries", database, str(notes), 1, LEASE, 0.0, 1)
        wait_for(lambda: overdue(database) == 0, 60)
        launcher.kill(pid)

    await in_thread(run)
    assert handled(notes) == Counter(range(30))
    assert await in_thread(FSMLease.objects.using(database).count) <= 20
