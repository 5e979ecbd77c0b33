"""The promises of `DjangoEventIsolation`, wherever the leases are kept: one handler at a time, in order."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoEventIsolation, DjangoStorage, LeaseLost, LeaseTimeout, RedisStorage
from fsm_storage.exceptions import StorageClosed
from fsm_storage.leases import Lease
from tests.contract.places import Isolate, Place, all_given_back, none_left, noted, overlaps
from tests.database.test_loops import in_threads
from tests.database.writers import key_of
from tests.rows import in_thread

Storage = DjangoStorage | RedisStorage
ONE = key_of(1)


class IsolationContract:
    """Derive from it where there are the fixtures `storage`, empty, and `place`. `isolate` makes owners."""

    @pytest.fixture
    def notes(self, tmp_path: Path) -> Path:
        return tmp_path / "notes"

    # Processes

    @pytest.mark.slow
    def test_turns_of_two_processes_with_eight_tasks_each_never_overlap(
        self, place: Place, notes: Path
    ) -> None:
        assert overlaps(place, notes, place.turns) == 0
        assert place.leases() == []

    @pytest.mark.slow
    def test_without_the_check_of_the_lease_they_do(self, place: Place, notes: Path) -> None:
        """Shows that the test before this one would see it."""
        assert overlaps(place, notes, place.turns / 2, "the same") > 0

    @pytest.mark.slow
    async def test_after_a_killed_holder_the_next_one_enters_when_the_lease_ran_out(
        self, isolate: Isolate, place: Place, notes: Path
    ) -> None:
        lease = 2.0
        holder = await asyncio.to_thread(place.start, "hold_for_ever", notes, lease)
        await noted(notes, "wrote 1\n")
        await asyncio.to_thread(holder.kill)
        entered = int(notes.read_text().split()[1]) / 1e9
        async with isolate().lock(ONE):
            waited = time.monotonic() - entered
        # Its claim was counted by the server before it entered; a busy machine takes its time in between.
        assert waited > lease / 3
        # It may have been renewed until it was killed.
        assert waited < 6 * lease

    @pytest.mark.slow
    async def test_a_holder_that_was_stopped_for_two_lease_times_is_refused(
        self, isolate: Isolate, storage: Storage, place: Place, notes: Path
    ) -> None:
        holder = await asyncio.to_thread(place.start, "hold_for_ever", notes, place.lease)
        await noted(notes, "wrote 2\n")
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            async with isolate(lease=30).lock(ONE):
                await storage.set_data(ONE, {"n": "mine"})
                before = notes.read_text()
                await asyncio.sleep(place.lease)
                os.kill(holder.pid, signal.SIGCONT)
                assert await asyncio.to_thread(holder.wait) == 0
                assert await storage.get_data(ONE) == {"n": "mine"}
        finally:
            with suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGKILL)
        after = notes.read_text()[len(before) :].split("\n")
        # What it was about to note when it was stopped had been written in time.
        assert [line for line in after if line.startswith("wrote")][1:] == []
        assert f"lost {storage.lease_key(ONE)}" in after

    @pytest.mark.slow
    def test_the_child_of_a_fork_has_none_of_its_parents_leases(self, place: Place, notes: Path) -> None:
        assert place.start("lock_after_fork", notes).wait() == 0
        assert notes.read_text().splitlines() == ["child timeout", "parent"]
        assert place.leases() == []

    # The lock

    async def test_a_key_is_held_in_the_lock_and_free_after_it(
        self, isolate: Isolate, storage: Storage, place: Place, key: StorageKey
    ) -> None:
        isolation = isolate()
        for _ in range(2):
            async with isolation.lock(key=key):
                assert await in_thread(place.leases) == [storage.lease_key(key)]
            await none_left(isolation, place)

    @pytest.mark.slow
    async def test_a_handler_that_takes_longer_than_its_lease_keeps_it(
        self, isolate: Isolate, key: StorageKey
    ) -> None:
        """It has to be renewed twice, and a busy machine may stand still for two seconds."""
        lease, ends = 4.5, []

        async def wait() -> None:
            async with isolate(lease=lease).lock(key):
                ends.append("other")

        async with isolate(lease=lease).lock(key):
            other = asyncio.create_task(wait())
            await asyncio.sleep(1.6 * lease)
            ends.append("long")
        await other
        assert ends == ["long", "other"]

    async def test_first_come_first_served(self, isolate: Isolate, place: Place, key: StorageKey) -> None:
        isolation, order = isolate(), []

        async def work(n: int) -> None:
            async with isolation.lock(key):
                order.append(n)
                await asyncio.sleep(0)

        await asyncio.gather(*map(work, range(50)))
        assert order == list(range(50))
        await none_left(isolation, place)

    async def test_nothing_is_left_for_keys_that_nobody_works_on(
        self, isolate: Isolate, place: Place
    ) -> None:
        isolation, turns = isolate(), 0

        async def work(n: int) -> None:
            nonlocal turns
            async with isolation.lock(key_of(n % 100)):
                turns += 1
                await asyncio.sleep(0)

        await asyncio.gather(*map(work, range(500)))
        assert turns == 500
        await none_left(isolation, place)

    async def test_handed_over_between_processes_within_a_fifth_of_a_second(
        self, isolate: Isolate, key: StorageKey
    ) -> None:
        one, other, waited = isolate(), isolate(), []

        async def enter() -> float:
            async with other.lock(key):
                return time.monotonic()

        for _ in range(7):
            async with one.lock(key):
                waiting = asyncio.create_task(enter())
                await asyncio.sleep(0.3)
                left = time.monotonic()
            waited.append(await waiting - left)
        # A busy machine holds some of them up.
        assert sorted(waited)[1] < 0.2
        assert max(waited) < 5

    async def test_locks_within_locks(self, isolate: Isolate, storage: Storage, place: Place) -> None:
        isolation = isolate()
        async with isolation.lock(ONE):
            async with isolation.lock(key_of(2)):
                await storage.set_state(key_of(2), "inner")
            await storage.set_state(ONE, "outer")
        assert [await storage.get_state(key) for key in (ONE, key_of(2))] == ["outer", "inner"]
        await none_left(isolation, place)

    # Waiting in vain

    async def test_a_waiter_in_the_line_has_a_timeout(
        self, isolate: Isolate, storage: Storage, place: Place
    ) -> None:
        isolation = isolate(timeout=timedelta(seconds=0.2))
        lines = isolation._open()[1]
        timeout, lines.timeout = lines.timeout, 30.0  # for who does not stand in line
        async with isolation.lock(ONE):
            lines.timeout = timeout
            began = time.monotonic()
            with pytest.raises(LeaseTimeout, match=r"' not granted within 0\.2 s") as caught:
                async with isolation.lock(ONE):
                    pytest.fail("it entered")
            assert time.monotonic() - began < 10
            assert caught.value.key == storage.lease_key(ONE)
            assert isinstance(caught.value, TimeoutError)
        await none_left(isolation, place)

    async def test_a_waiter_for_another_process_has_a_timeout(self, isolate: Isolate, place: Place) -> None:
        one, other = isolate(), isolate(timeout=1.0)
        other._open()[1].patience = 0.5  # a busy machine may give the first answer only after the timeout
        async with one.lock(ONE):
            began = time.monotonic()
            with pytest.raises(LeaseTimeout, match=r"' not granted within 1\.0 s"):
                async with other.lock(ONE):
                    pytest.fail("it entered")
            assert time.monotonic() - began < 10
            assert other._open()[1]._lines == {}
        await none_left(one, place)

    async def test_waiters_that_are_cancelled_leave_nothing_behind(
        self, isolate: Isolate, place: Place
    ) -> None:
        isolation, entered = isolate(), []

        async def work(n: int) -> None:
            async with isolation.lock(ONE):
                entered.append(n)
                await asyncio.sleep(0.001)

        for delay in (0, 0.0005, 0.002, 0.005, 0.01):
            entered.clear()
            tasks = [asyncio.create_task(work(n)) for n in range(40)]
            await asyncio.sleep(delay)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert set(entered) >= set(range(1, 40, 2))
            assert entered == sorted(entered)
            await none_left(isolation, place)

    async def test_a_handler_that_raises_gives_the_lock_back(self, isolate: Isolate, place: Place) -> None:
        isolation = isolate()
        with pytest.raises(ZeroDivisionError):
            async with isolation.lock(ONE):
                raise ZeroDivisionError
        await none_left(isolation, place)

    # Losing the lease

    async def test_a_write_under_a_lease_that_is_anothers_is_refused_by_the_server(
        self, isolate: Isolate, storage: Storage, place: Place
    ) -> None:
        """The process does not know it yet; whatever the way in which the storage writes."""
        isolation, name = isolate(lease=300), storage.lease_key(ONE)  # no renewal finds out
        await storage.set_data(ONE, {"a": 1})
        async with isolation.lock(ONE):
            await storage.set_state(ONE, "in time")
            assert await storage.update_data(ONE, {"b": 2}) == {"a": 1, "b": 2}
            for lose in (place.give_away, place.take_away):
                await in_thread(lose)
                for write in (
                    lambda: storage.set_state(ONE, "late"),
                    lambda: storage.set_state(ONE, None),
                    lambda: storage.set_data(ONE, {"late": 1}),
                    lambda: storage.set_data(ONE, {}),
                    lambda: storage.update_data(ONE, {"late": 1}),
                    lambda: storage.set_state(key_of(2), "late"),
                ):
                    with pytest.raises(LeaseLost, match=f"'{name}'"):
                        await write()
                together = await asyncio.gather(
                    *(storage.set_state(key_of(n), "late") for n in range(10)), return_exceptions=True
                )
                assert {type(outcome) for outcome in together} == {LeaseLost}
        assert (await storage.get_state(ONE), await storage.get_data(ONE)) == ("in time", {"a": 1, "b": 2})
        assert await storage.get_state(key_of(2)) is None

    @pytest.mark.slow
    async def test_a_handler_that_lost_its_lease_is_cancelled(
        self, isolate: Isolate, storage: Storage, place: Place
    ) -> None:
        met: list[str] = []
        name = storage.lease_key(ONE)

        async def handle() -> None:
            async with isolate(lease=1.5).lock(ONE):
                try:
                    await in_thread(place.take_away)
                    await asyncio.sleep(60)
                except asyncio.CancelledError as error:
                    met.append(str(error))
                    raise

        with pytest.raises(LeaseLost, match=f"'{name}' lost"):
            await asyncio.wait_for(handle(), 30)
        assert met == [f"the lease on '{name}' is lost"]
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0

    async def test_a_lease_that_is_lost_on_the_way_in_cancels_too(
        self, isolate: Isolate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        isolation = isolate()
        lines = isolation._open()[1]
        enter = lines.enter

        async def lose(key: str) -> Lease:
            lease = await enter(key)
            lines.keeper.lose(lease)
            return lease

        monkeypatch.setattr(lines, "enter", lose)
        with pytest.raises(LeaseLost):
            async with isolation.lock(ONE):
                await asyncio.sleep(60)

    async def test_a_handler_that_ends_before_it_learns_of_it_is_told_too(
        self, isolate: Isolate, storage: Storage
    ) -> None:
        isolation = isolate()
        with pytest.raises(LeaseLost):
            async with isolation.lock(ONE):
                isolation._open()[1].keeper._held[storage.lease_key(ONE)].deadline = 0.0

    async def test_what_a_handler_started_may_outlive_its_lock(
        self, isolate: Isolate, storage: Storage, place: Place
    ) -> None:
        isolation, left = isolate(), asyncio.Event()

        async def afterwards() -> None:
            await left.wait()
            await storage.set_state(ONE, "afterwards")

        async with isolation.lock(ONE):
            task = asyncio.create_task(afterwards())
            await asyncio.sleep(0)
        await none_left(isolation, place)
        left.set()
        await task
        assert await storage.get_state(ONE) == "afterwards"

    # Loops, threads, closing

    def test_loops_in_threads_of_their_own_take_turns(self, thread_storage: Storage, place: Place) -> None:
        isolation = DjangoEventIsolation(storage=thread_storage)
        inside, most, count = 0, 0, 0

        async def once() -> None:
            nonlocal inside, most, count
            async with isolation.lock(ONE):
                inside += 1
                most = max(most, inside)
                count += 1
                await asyncio.sleep(0.001)
                inside -= 1

        async def main() -> None:
            await asyncio.gather(*(once() for _ in range(25)))

        in_threads(*[lambda: asyncio.run(main())] * 4)
        assert (most, count) == (1, 100)
        assert isolation._open()[1]._lines == {}
        asyncio.run(isolation.close())
        asyncio.run(thread_storage.close())  # finishes what the loops had sent before they ended
        assert place.leases() == []

    def test_a_lock_left_at_the_end_of_a_loop_is_given_back(
        self, thread_storage: Storage, place: Place
    ) -> None:
        """As by `async_to_sync`: the loop ends before the answer, or before it was even sent."""
        isolation = DjangoEventIsolation(storage=thread_storage, timeout=30)

        async def once() -> None:
            async with isolation.lock(ONE):
                await thread_storage.set_state(ONE, "a")

        for _ in range(5):
            asyncio.run(asyncio.wait_for(once(), 60))
        asyncio.run(all_given_back(place))
        asyncio.run(isolation.close())
        asyncio.run(thread_storage.close())

    @pytest.mark.parametrize("storage_first", [True, False])
    async def test_close_gives_back_what_is_held(
        self, isolate: Isolate, storage: Storage, place: Place, storage_first: bool
    ) -> None:
        """aiogram's Dispatcher closes the storage first."""
        isolation, outcomes, is_in = isolate(), [], asyncio.Event()

        async def work() -> None:
            try:
                async with isolation.lock(ONE):
                    is_in.set()
                    await asyncio.sleep(60)
            except Exception as error:
                outcomes.append(type(error))

        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.wait_for(is_in.wait(), 30)
        if storage_first:
            await storage.close()
        await isolation.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert outcomes.count(LeaseLost) == 1
        assert outcomes.count(StorageClosed) == 2
        assert await in_thread(place.leases) == []
        with pytest.raises(StorageClosed, match="isolation is closed"):
            isolation.lock(ONE)
        await isolation.close()
