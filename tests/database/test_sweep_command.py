"""`manage.py fsm_sweep` beyond the expired parts: the history, handlers, and going on for ever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db.models import F

from fsm_storage import DjangoStorage
from fsm_storage.lifecycle.sweeper import Sweeper
from fsm_storage.models import FSMRecord, FSMTransition
from tests.database.conftest import wait_for
from tests.database.expiring import PATH
from tests.database.writers import key_of
from tests.rows import in_thread, let_time_pass
from tests.servers import start_child

Make = Callable[..., DjangoStorage]


def sweep(*arguments: str) -> Any:
    out = StringIO()
    call_command("fsm_sweep", "--json", *arguments, stdout=out)
    return json.loads(out.getvalue())


async def write_history(storage: DjangoStorage, chats: int, old: int) -> None:
    """A transition for each chat; those of the first `old` are a hundred days old."""
    for chat in range(chats):
        await storage.set_state(key_of(chat), "a")

    def age() -> None:
        rows = FSMTransition.objects.using(storage.database).filter(chat_id__lt=old)
        rows.filter(alias=storage.alias).update(at=F("at") - timedelta(days=100))

    await in_thread(age)


def chats_noted(database: str, alias: str) -> list[int]:
    rows = FSMTransition.objects.using(database).filter(alias=alias)
    return sorted(rows.values_list("chat_id", flat=True))


async def test_history_is_pruned_past_its_time(make_storage: Make, database: str) -> None:
    other = make_storage(alias="other")
    await write_history(other, 3, 3)
    storage = make_storage()
    await write_history(storage, 40, 25)
    planned = await in_thread(sweep, "--alias", database, "--keep-history", "90d", "--dry-run")
    assert planned[database]["transitions"] == 25
    assert await in_thread(chats_noted, database, database) == list(range(40))
    swept = await in_thread(sweep, "--alias", database, "--keep-history", "90d", "--batch-size", "7")
    assert swept[database]["transitions"] == 25
    assert await in_thread(chats_noted, database, database) == list(range(25, 40))
    assert await in_thread(chats_noted, database, "other") == [0, 1, 2]
    assert (await in_thread(sweep, "--alias", database))[database]["transitions"] == 0
    assert await in_thread(FSMRecord.objects.using(database).count) == 43


async def test_history_is_pruned_in_batches(make_storage: Make, database: str) -> None:
    storage = make_storage()
    await write_history(storage, 20, 20)
    steps = await in_thread(
        lambda: [swept.transitions for swept in Sweeper(storage, 6).prune(timedelta(days=90))]
    )
    assert steps == [6, 12, 18, 20]


async def test_pruning_stops_where_the_history_is_young(make_storage: Make, database: str) -> None:
    """It does not read through a history that may stay."""
    storage = make_storage()
    await write_history(storage, 20, 4)
    steps = await in_thread(
        lambda: [swept.transitions for swept in Sweeper(storage, 5).prune(timedelta(days=90))]
    )
    assert steps == [4]


async def test_what_waits_for_handlers_is_counted(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, data_ttl=100, expiry=f"{PATH}.expiry")
    for chat, state in enumerate(("waiting", "waiting", "other")):
        await storage.set_data(key_of(chat), {"n": chat})
        await storage.set_state(key_of(chat), state)
    await in_thread(let_time_pass, database, 150)
    expected = {"states": 1, "data": 1, "records": 1, "transitions": 0, "waiting": 2}
    for arguments in (("--dry-run",), ()):
        assert await in_thread(sweep, "--alias", database, *arguments) == {database: expected}
    out = StringIO()
    await in_thread(call_command, "fsm_sweep", "--alias", database, stdout=out)
    assert "2 wait for expiry handlers" in out.getvalue()


async def test_handlers_that_cannot_be_imported_leave_everything(make_storage: Make, database: str) -> None:
    storage = make_storage(state_ttl=100, expiry="tests.no_such_module.expiry")
    await storage.set_state(key_of(1), "waiting")
    await in_thread(let_time_pass, database, 150)
    with pytest.raises(CommandError, match=r"no_such_module.*nothing was swept"):
        await in_thread(sweep, "--alias", database)
    assert await in_thread(FSMRecord.objects.using(database).state_expired().count) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--watch", "0"], "seconds above 0"),
        (["--watch", "--dry-run"], "exclude"),
        (["--bot", "a.b"], "goes with --watch"),
        (["--keep-history", "90 years ago"], "duration"),
        (["--watch", "--bot", "a.b"], "has the option 'expiry'"),
    ],
)
def test_wrong_arguments_are_named(
    make_storage: Make, database: str, arguments: list[str], match: str
) -> None:
    make_storage()
    with pytest.raises(CommandError, match=match):
        call_command("fsm_sweep", "--alias", database, *arguments)


@contextmanager
def watching(database: str, *arguments: str, notes: Path) -> Iterator[subprocess.Popen[str]]:
    child = start_child(
        "django", "fsm_sweep", "--alias", database, "--watch", "0.2", "--json", *arguments,
        env={"FSM_TEST_EXPIRY": f"{PATH}.expiry", "FSM_TEST_NOTES": str(notes)},
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def stop(child: subprocess.Popen[str]) -> None:
    os.kill(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, ""), out


async def fill(make_storage: Make) -> DjangoStorage:
    storage = make_storage(state_ttl=100)
    await asyncio.gather(*(storage.set_state(key_of(n), "waiting" if n < 5 else "other") for n in range(20)))
    await in_thread(let_time_pass, storage.database, 150)
    return storage


async def test_it_goes_on_until_it_is_told_to_stop(make_storage: Make, database: str, notes: Path) -> None:
    """Without a bot, what handlers are for waits."""
    storage = await fill(make_storage)

    def watch() -> None:
        with watching(database, notes=notes) as child:
            first = json.loads(child.stdout.readline())  # type: ignore[union-attr]
            assert first[database]["states"] == 15
            assert first[database]["waiting"] == 5
            asyncio.run(storage.set_state(key_of(100), "other"))
            let_time_pass(database, 150)
            second = json.loads(child.stdout.readline())  # type: ignore[union-attr]
            assert second[database]["states"] == 1
            stop(child)

    await in_thread(watch)
    assert not notes.exists()
    assert await in_thread(FSMRecord.objects.using(database).count) == 5


async def test_with_a_bot_it_calls_the_handlers(make_storage: Make, database: str, notes: Path) -> None:
    await fill(make_storage)

    def watch() -> None:
        with watching(database, "--bot", f"{PATH}.make_bot", notes=notes) as child:
            wait_for(lambda: not FSMRecord.objects.using(database).exists(), 60)
            stop(child)

    await in_thread(watch)
    assert sorted(notes.read_text().split("\n")) == ["", *(f"{n} 1" for n in range(5))]
