"""Leases in the table: who gets one, for how long, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from django.db.models import F

from fsm_storage import DjangoStorage
from fsm_storage.dialects import Claim
from fsm_storage.exceptions import StorageClosed, StorageTimeout
from fsm_storage.leases import LeaseKeeper
from fsm_storage.models import FSMLease, UtcNow
from tests.database.conftest import Statements, wait_for
from tests.rows import in_thread

Keepers = Callable[..., LeaseKeeper]


def rows(database: str) -> dict[str, tuple[str, int]]:
    return {row.key: (row.owner, row.token) for row in FSMLease.objects.using(database)}


def let_time_pass(database: str, seconds: float) -> None:
    FSMLease.objects.using(database).update(expires_at=F("expires_at") - timedelta(seconds=seconds))


async def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def keepers(storage: DjangoStorage) -> AsyncIterator[Keepers]:
    """Make keepers, each an owner of its own, as in processes of their own."""
    made: list[LeaseKeeper] = []

    def make(seconds: float = 30.0) -> LeaseKeeper:
        made.append(LeaseKeeper(storage, seconds))
        return made[-1]

    yield make
    for keeper in made:
        await keeper.close()


# The table


async def test_one_owner_at_a_time(storage: DjangoStorage, database: str) -> None:
    token = await storage.submit(Claim("k", "a", 30))
    assert await storage.submit(Claim("k", "b", 30)) is None
    assert await in_thread(rows, database) == {"k": ("a", token)}
    assert await storage.submit(Claim("other", "b", 30))
    assert await storage.submit(Claim("k", "a", 0, token)) == token
    assert await storage.submit(Claim("k", "b", 30)) > token


async def test_a_claim_that_is_sent_again_is_granted_again(storage: DjangoStorage) -> None:
    """The session retries after a lost connection, and cannot know whether it was carried out."""
    token = await storage.submit(Claim("k", "a", 30))
    again = await storage.submit(Claim("k", "a", 30))
    assert again > token
    assert await storage.submit(Claim("k", "a", 30, token)) is None
    assert await storage.submit(Claim("k", "a", 30, again)) == again


async def test_a_lease_is_taken_over_when_it_ran_out_and_not_before(
    storage: DjangoStorage, database: str
) -> None:
    token = await storage.submit(Claim("k", "a", 30))
    await in_thread(let_time_pass, database, 15)
    assert await storage.submit(Claim("k", "b", 30)) is None
    await in_thread(let_time_pass, database, 16)
    newer = await storage.submit(Claim("k", "b", 30))
    assert newer > token
    # The old holder can neither renew it nor give it back.
    assert await storage.submit(Claim("k", "a", 30, token)) is None
    assert await storage.submit(Claim("k", "a", 0, token)) is None
    assert await storage.submit(Claim("k", "a", 0)) is None
    assert await in_thread(rows, database) == {"k": ("b", newer)}


async def test_a_renewed_lease_runs_from_then_on(storage: DjangoStorage, database: str) -> None:
    token = await storage.submit(Claim("k", "a", 30))
    await in_thread(let_time_pass, database, 18)
    assert await storage.submit(Claim("k", "a", 30, token)) == token
    await in_thread(let_time_pass, database, 18)
    assert await storage.submit(Claim("k", "b", 30)) is None


async def test_a_lease_runs_for_its_seconds_by_the_databases_clock(
    storage: DjangoStorage, database: str
) -> None:
    await storage.submit(Claim("k", "a", 12.5))
    left = FSMLease.objects.using(database).annotate(now=UtcNow()).values_list("expires_at", "now")
    expires_at, now = (await in_thread(list, left))[0]
    assert timedelta(seconds=7) < expires_at - now <= timedelta(seconds=12.6)


async def test_tokens_grow_over_leases_that_were_given_back(storage: DjangoStorage, database: str) -> None:
    tokens = []
    for _ in range(50):
        token = await storage.submit(Claim("k", "a", 30))
        assert await storage.submit(Claim("k", "a", 0, token)) == token
        assert await in_thread(rows, database) == {}
        tokens.append(token)
    assert tokens == sorted(set(tokens))


async def test_a_clock_that_was_set_back_does_not_make_a_token_smaller(
    storage: DjangoStorage, database: str
) -> None:
    future = 9_000_000_000_000_000
    await storage.submit(Claim("k", "a", 30))
    await in_thread(FSMLease.objects.using(database).update, token=future, id=future)
    await in_thread(let_time_pass, database, 31)
    assert await storage.submit(Claim("k", "b", 30)) > (future if database == "postgres" else 0)


async def test_storages_with_different_aliases_lock_each_other_out_of_nothing(
    storage: DjangoStorage, make_storage: Callable[..., DjangoStorage]
) -> None:
    other = make_storage(alias="other")
    assert await storage.submit(Claim("k", "a", 30))
    assert await other.submit(Claim("k", "b", 30))
    await other.close()


@pytest.mark.parametrize("count", [2, 40])
async def test_a_batch_is_a_constant_number_of_statements(
    storage: DjangoStorage, database: str, statements: Statements, count: int
) -> None:
    """Leases that are taken, renewed and given back together."""
    held = await asyncio.gather(*(storage.submit(Claim(f"held{n}", "a", 30)) for n in range(2 * count)))
    with statements.held():
        first = asyncio.ensure_future(storage.submit(Claim("first", "a", 30)))
        while not statements.someone_is_held():
            await asyncio.sleep(0.005)
        claims = [Claim(f"new{n}", "a", 30) for n in range(count)]
        claims += [Claim(f"held{n}", "a", 30, held[n]) for n in range(count)]
        claims += [Claim(f"held{n}", "a", 0, held[n]) for n in range(count, 2 * count)]
        waiting = [asyncio.ensure_future(storage.submit(claim)) for claim in claims]
        await asyncio.sleep(0)
        statements.seen.clear()
    replies = await asyncio.gather(*waiting)
    await first
    assert all(replies)
    assert replies[count:] == held
    batch = [sql for sql in statements.seen if "fsm_storage_lease" in sql]
    # The first one's own statement is among them: it was held before it was noted.
    assert len(batch) == (2 if database == "postgres" else 4)
    assert set(await in_thread(rows, database)) == {
        "first",
        *(f"new{n}" for n in range(count)),
        *(f"held{n}" for n in range(count)),
    }


async def test_claims_share_a_batch_with_writes_and_reads(
    storage: DjangoStorage, statements: Statements, key: Any
) -> None:
    await storage.get_state(key)
    await storage.set_state(key, "before")
    with statements.held():
        tasks = [
            asyncio.ensure_future(storage.set_state(key, "after")),
            asyncio.ensure_future(storage.submit(Claim("k", "a", 30))),
            asyncio.ensure_future(storage.submit(Claim("k", "b", 30))),
            asyncio.ensure_future(storage.get_state(key)),
        ]
        await asyncio.sleep(0.05)
    _, one, other, state = await asyncio.gather(*tasks)
    assert one
    assert other is None
    assert state in ("before", "after")
    assert await storage.get_state(key) == "after"


async def test_the_sweep_removes_the_leases_of_the_dead(storage: DjangoStorage, database: str) -> None:
    await storage.submit(Claim("dead", "a", 30))
    await in_thread(let_time_pass, database, 31)
    await storage.submit(Claim("alive", "a", 30))
    await in_thread(storage.sweep)
    assert list(await in_thread(rows, database)) == ["alive"]


# The keeper


async def test_a_keeper_takes_each_lease_once(keepers: Keepers, database: str) -> None:
    one, other = keepers(), keepers()
    leases = await one.try_acquire(["a", "b", "a"])
    assert set(leases) == {"a", "b"}
    assert await one.try_acquire(["a"]) == {}
    assert set(await other.try_acquire(["a", "b", "c"])) == {"c"}
    assert {key: token for key, (_, token) in (await in_thread(rows, database)).items() if key != "c"} == {
        key: lease.token for key, lease in leases.items()
    }
    one.release(leases["a"])
    await eventually_free(database, "a")
    assert set(await other.try_acquire(["a", "b"])) == {"a"}


async def eventually_free(database: str, key: str) -> None:
    for _ in range(1000):
        if key not in await in_thread(rows, database):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"{key!r} was not given back")


async def test_many_ask_at_once_and_one_gets_it(keepers: Keepers) -> None:
    some = [keepers() for _ in range(8)]
    found = await asyncio.gather(*(keeper.acquire("k") for keeper in some))
    assert sum(lease is not None for lease in found) == 1


@pytest.mark.slow
async def test_a_lease_is_renewed_while_it_is_held(keepers: Keepers, database: str) -> None:
    one, other = keepers(4.5), keepers(4.5)
    lease = await one.acquire("k")
    assert lease
    for _ in range(18):
        await asyncio.sleep(0.3)
        assert await other.acquire("k") is None
    assert not lease.is_over()
    assert (await in_thread(rows, database))["k"] == (one.owner, lease.token)


@pytest.mark.slow
@pytest.mark.loop_gap(10)
async def test_a_holder_that_blocks_its_event_loop_keeps_its_lease(keepers: Keepers, database: str) -> None:
    one = keepers(4.5)
    lease = await one.acquire("k")
    assert lease
    time.sleep(5.0)
    assert not lease.is_over()
    assert (await in_thread(rows, database))["k"] == (one.owner, lease.token)


@pytest.mark.slow
async def test_a_holder_learns_that_its_lease_is_lost(keepers: Keepers, database: str) -> None:
    one, told = keepers(0.6), []
    lease = await one.acquire("k", lambda: told.append("k"))
    assert lease
    await in_thread(FSMLease.objects.using(database).all().delete)
    await eventually(lambda: told)
    assert lease.is_over()
    assert one.count == 0


@pytest.mark.slow
async def test_a_lease_is_lost_in_time_while_the_database_is_away(
    keepers: Keepers, statements: Statements
) -> None:
    one, told = keepers(0.6), []
    lease = await one.acquire("k", lambda: told.append(time.monotonic()))
    assert lease
    with statements.held():
        await eventually(lambda: told)
        late = told[0] - lease.deadline  # before a renewal that was on its way is answered
    assert 0 <= late < 4  # the storage waits for an answer for 5


async def test_a_cancelled_caller_leaves_no_lease_behind(
    keepers: Keepers, statements: Statements, database: str
) -> None:
    one = keepers()
    with statements.held():
        task = asyncio.create_task(one.acquire("k"))
        while not statements.someone_is_held():
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert one.count == 0
    await eventually_free(database, "k")


async def test_an_unanswered_caller_leaves_no_lease_behind(
    make_storage: Callable[..., DjangoStorage], statements: Statements, database: str
) -> None:
    storage = make_storage(timeout=0.4)
    one = LeaseKeeper(storage, 30)
    with statements.held():
        asking = asyncio.create_task(one.acquire("k"))
        await asyncio.sleep(0)
        storage._carrier._writes[0]._timeout = 20.0  # for what gives it back, on a busy machine
        with pytest.raises(StorageTimeout):
            await asking
    await eventually_free(database, "k")
    await one.close()


def test_loops_that_were_closed_before_the_answer_leave_nothing_behind(
    storage: DjangoStorage, statements: Statements, database: str
) -> None:
    """As those of `async_to_sync` are."""
    keeper = LeaseKeeper(storage, 30)
    loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    async def leave(key: str, held: ExitStack) -> None:
        loops.add(asyncio.get_running_loop())
        lease = await keeper.acquire(key)
        assert lease
        held.enter_context(statements.held())
        keeper.release(lease)

    def only_the_last_is_known() -> bool:
        gc.collect()
        return len(loops) <= 1  # what it left goes with the next one

    for n in range(5):
        with ExitStack() as held:
            asyncio.run(leave(f"k{n}", held))
    wait_for(only_the_last_is_known)
    asyncio.run(keeper.close())
    wait_for(lambda: rows(database) == {})  # long before the lease runs out


@pytest.mark.parametrize("storage_first", [True, False])
async def test_close_gives_all_leases_back(
    storage: DjangoStorage, keepers: Keepers, database: str, storage_first: bool
) -> None:
    """aiogram's Dispatcher closes the storage before the isolation."""
    one, told = keepers(), []
    lease = await one.acquire("k", lambda: told.append("k"))
    assert lease
    await one.try_acquire(["l", "m"])
    if storage_first:
        await storage.close()
    await one.close()
    assert await in_thread(rows, database) == {}
    assert told == ["k"]
    assert lease.is_over()
    with pytest.raises(StorageClosed):
        await one.acquire("k")
    await one.close()
