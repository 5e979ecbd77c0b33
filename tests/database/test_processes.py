"""Several processes on one database, and processes that are killed."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from django.conf import settings

from fsm_storage import DjangoStorage
from tests.database.conftest import Launcher, wait_for
from tests.database.writers import key_of
from tests.rows import record, records, transitions
from tests.servers import run_python


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def test_two_processes_hammering_the_same_keys_lose_no_field(
    database: str, launcher: Launcher, notes: Path
) -> None:
    chats, tasks, fields = 3, 8, 40
    writers = [
        launcher.start("add_fields", database, str(notes), who, chats, tasks, fields) for who in ("a", "b")
    ]
    assert [launcher.wait(pid) for pid in writers] == [0, 0]
    acknowledged: dict[int, dict[str, int]] = defaultdict(dict)
    for chat, name, n in lines(notes):
        acknowledged[int(chat)][name] = int(n)
    assert sum(map(len, acknowledged.values())) == 2 * tasks * fields
    assert {row.chat_id: row.data for row in records(database)} == acknowledged


def test_two_processes_create_the_same_records(database: str, launcher: Launcher, notes: Path) -> None:
    for _ in range(5):
        # The same clock in all processes of a machine.
        start_at = time.monotonic() + 0.3
        writers = [
            launcher.start("create_together", database, str(notes), who, start_at, 40) for who in ("a", "b")
        ]
        assert [launcher.wait(pid) for pid in writers] == [0, 0]
        rows = records(database)
        assert {row.chat_id: row.data for row in rows} == {n: {"a": n, "b": n} for n in range(40)}
        for row in rows:
            row.delete()


def test_what_a_killed_process_was_told_is_written_is_there(
    database: str, launcher: Launcher, notes: Path
) -> None:
    """Twenty rounds: the writer dies at any moment; a write that was in flight is old or new, never mixed."""
    rounds, chats = 20, 4
    for number in range(rounds):
        first = number * 100
        pid = launcher.start("write_for_ever", database, str(notes), first, chats)
        wait_for(lambda first=first: notes.exists() and f"data {first} " in notes.read_text())
        time.sleep(0.002 * number)
        launcher.kill(pid)
    acknowledged: dict[tuple[str, int], int] = {}
    for what, chat, n in lines(notes):
        acknowledged[what, int(chat)] = int(n)
    assert len({chat for _, chat in acknowledged if chat < 1_000_000}) >= rounds
    for (what, chat), n in acknowledged.items():
        row = record(database, chat_id=chat)
        if what == "data":
            assert row.data["a"] in (n, n + 1)
            assert row.data["b"] == row.data["a"]
        elif what == "state":
            assert row.state in (f"s{n}", f"s{n + 1}")
        else:
            assert [f"f{i}" for i in range(1, n + 1) if row.data.get(f"f{i}") != i] == []
    for row in records(database):
        if row.state is not None:
            # Never a state without its transition, never a transition without its state.
            steps = int(row.state[1:])
            chain = [None, *(f"s{n}" for n in range(1, steps + 1))]
            assert transitions(database, key=row.key) == [
                (before, after, "bot", "") for before, after in pairwise(chain)
            ]


def test_a_storage_works_on_both_sides_of_a_fork(database: str, launcher: Launcher, notes: Path) -> None:
    pid = launcher.start("fork_after_use", database, str(notes))
    assert launcher.wait(pid) == 0
    assert lines(notes) == [["before"], ["before", "child"], ["before", "child", "parent"]]


def test_a_fork_leaves_no_lock_of_another_thread_behind(
    database: str, launcher: Launcher, notes: Path
) -> None:
    assert launcher.wait(launcher.start("fork_while_a_thread_starts", database, str(notes))) == 0
    assert lines(notes) == [["child"]]


def test_a_fork_in_the_midst_of_a_write_is_harmless(database: str, launcher: Launcher, notes: Path) -> None:
    """The child inherits no lock of the database's library, and closes no connection of its parent's."""
    forks = 25
    assert launcher.wait(launcher.start("fork_while_a_thread_writes", database, str(notes), forks)) == 0
    assert notes.read_text().splitlines() == [f"child {number}" for number in range(forks)]


def test_a_child_keeps_its_writes_on_sqlite_when_its_parent_closes(tmp_path: Path) -> None:
    """SQLite would not lock the file again, and who closes it last would delete the log with the child's commits."""
    code = """
import asyncio, os, sqlite3, sys, warnings
import django
from django.core.management import call_command
django.setup()
from django.conf import settings
from django.db import connections
from fsm_storage import DjangoStorage, StorageKey

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork() in a process with threads

async def write(first, last):
    for n in range(first, last):
        await storage.set_state(StorageKey(1, n, n), "kept")

call_command("migrate", database="default", verbosity=0)
connections.close_all()
storage = DjangoStorage()
asyncio.run(write(0, 20))
closed, say_closed = os.pipe()
begun, say_begun = os.pipe()
if not (pid := os.fork()):
    asyncio.run(write(20, 30))
    os.write(say_begun, b"x")
    os.read(closed, 1)
    asyncio.run(write(30, 40))
    os._exit(0)  # as one that is killed
os.read(begun, 1)
asyncio.run(storage.close())
os.write(say_closed, b"x")
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
file = sqlite3.connect(settings.DATABASES["default"]["NAME"])
assert file.execute("SELECT count(*) FROM fsm_storage_record WHERE state = 'kept'").fetchone() == (40,)
"""
    run_python(code, env={"FSM_TEST_DIR": str(tmp_path)})


@pytest.mark.django_db(transaction=True, databases=list(settings.DATABASES), available_apps=["fsm_storage"])
def test_a_process_ends_by_itself_with_storages_left_open() -> None:
    """The worker threads do not keep the interpreter from ending."""
    code = """
import asyncio, django
django.setup()
from fsm_storage import storages, StorageKey
async def main():
    for alias in storages:
        await storages[alias].set_state(StorageKey(1, 2, 3), "left")
asyncio.run(main())
"""
    run_python(code, timeout=90)
    for database in settings.DATABASES:
        assert record(database, chat_id=2).state == "left"


def test_a_process_sees_at_once_what_another_one_wrote(
    storage: DjangoStorage, database: str, launcher: Launcher, notes: Path
) -> None:
    """A read sees the newest write that finished before it began."""

    async def look() -> None:
        for _ in range(50):
            newest = max(int(n) for what, _, n in lines(notes) if what == "data")
            data = await storage.get_data(key_of(1))
            assert data["a"] >= newest
            await asyncio.sleep(0.002)

    pid = launcher.start("write_for_ever", database, str(notes), 1, 1)
    wait_for(lambda: notes.exists() and "data" in notes.read_text())
    asyncio.run(look())
    launcher.kill(pid)
