"""The batcher with a fake commit: who is grouped with whom, and who learns what."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from itertools import chain

import pytest

from fsm_storage.batching import AGAIN, Batcher
from fsm_storage.exceptions import StorageClosed, StorageTimeout


class Commit:
    """Answers (key, value) with the value; can be held up, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def __call__(self, ops, deadline):
        self.batches.append(list(ops))
        self.entered.set()
        assert self.go.wait(10)
        return [value for _, value in ops]


@pytest.fixture
def commit():
    return Commit()


@pytest.fixture
def make(commit):
    made = []

    def factory(commit=commit, **options):
        released = options.pop("release", lambda: None)
        options = {"timeout": 5, "max_pending": 1000, "batch_size": 100, **options}
        batcher = Batcher(commit, key=lambda op: op[0], release=released, name="test", **options)
        made.append(batcher)
        return batcher

    yield factory
    commit.go.set()
    for batcher in made:
        if thread := batcher.shut():
            thread.join(5)
            assert not thread.is_alive()


async def held(batcher, commit):
    """Keep the thread busy with one operation."""
    commit.go.clear()
    task = asyncio.ensure_future(batcher.submit(("busy", "busy")))
    await asyncio.to_thread(commit.entered.wait, 5)
    return task


async def in_time(batcher, op):
    """Submit it again until the answer comes within a short timeout: a machine may stand still."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await batcher.submit(op)
            except StorageTimeout:
                await asyncio.sleep(0.01)


async def test_a_lone_operation_goes_at_once(make, commit):
    assert await make().submit(("a", 1)) == 1
    assert commit.batches == [[("a", 1)]]


async def test_what_gathers_while_the_thread_is_busy_goes_together(make, commit):
    batcher = make()
    busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit((n, n))) for n in range(50)]
    await asyncio.sleep(0)
    commit.go.set()
    assert await asyncio.gather(*tasks) == list(range(50))
    assert await busy == "busy"
    assert [len(batch) for batch in commit.batches] == [1, 50]


async def test_a_second_operation_on_a_key_waits_for_the_next_batch(make, commit):
    batcher = make()
    await_busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit(("same", n))) for n in range(3)]
    tasks.append(asyncio.ensure_future(batcher.submit(("other", 9))))
    await asyncio.sleep(0)
    commit.go.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 9]
    await await_busy
    assert commit.batches[1:] == [[("same", 0), ("other", 9)], [("same", 1)], [("same", 2)]]


async def test_none_as_key_never_collides(commit):
    batcher = Batcher(
        commit, key=lambda op: None, release=lambda: None, name="t", timeout=5, max_pending=9, batch_size=9
    )
    busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit(("same", n))) for n in range(3)]
    await asyncio.sleep(0)
    commit.go.set()
    await asyncio.gather(busy, *tasks)
    assert len(commit.batches) == 2
    await batcher.close()


async def test_a_batch_has_its_limit(make, commit):
    batcher = make(batch_size=20)
    busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit((n, n))) for n in range(50)]
    await asyncio.sleep(0)
    commit.go.set()
    await asyncio.gather(busy, *tasks)
    assert [len(batch) for batch in commit.batches] == [1, 20, 20, 10]


async def test_an_error_reaches_its_own_caller_only(make):
    batcher = make(lambda ops, deadline: [ValueError("bad") if value < 0 else value for _, value in ops])
    replies = await asyncio.gather(*(batcher.submit((n, n)) for n in (-1, 2)), return_exceptions=True)
    assert isinstance(replies[0], ValueError)
    assert replies[1] == 2


@pytest.mark.filterwarnings("default")
async def test_a_commit_that_raises_fails_its_batch_and_the_next_one_works(make):
    calls = []

    def commit(ops, deadline):
        calls.append(ops)
        if len(calls) == 1:
            raise RuntimeError("a fault of ours")
        return [value for _, value in ops]

    batcher = make(commit)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        await batcher.submit(("a", 1))
    assert await batcher.submit(("a", 2)) == 2


async def test_again_is_asked_again_while_others_go_on(make):
    locked = {"a"}

    def commit(ops, deadline):
        return [AGAIN if key in locked else value for key, value in ops]

    batcher = make(commit)
    waiting = asyncio.ensure_future(batcher.submit(("a", 1)))
    for n in range(10):
        assert await batcher.submit(("b", n)) == n
    assert not waiting.done()
    locked.clear()
    assert await waiting == 1


async def test_a_cancelled_caller_that_still_waits_is_left_out(make, commit):
    batcher = make()
    busy = await held(batcher, commit)
    task = asyncio.ensure_future(batcher.submit(("a", 1)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    commit.go.set()
    await busy
    assert await batcher.submit(("b", 2)) == 2
    assert not any(("a", 1) in batch for batch in commit.batches)


async def test_a_caller_whose_operation_is_under_way_can_be_cancelled(make, commit):
    batcher = make()
    busy = await held(batcher, commit)
    busy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await busy
    commit.go.set()
    assert await batcher.submit(("b", 2)) == 2


async def test_no_answer_within_the_timeout_is_an_error(make, commit):
    batcher = make(timeout=0.1)
    commit.go.clear()
    began = time.monotonic()
    replies = await asyncio.gather(*(batcher.submit((n, n)) for n in range(5)), return_exceptions=True)
    assert time.monotonic() - began < 8
    assert all(
        isinstance(reply, StorageTimeout) and "may still be carried out" in str(reply) for reply in replies
    )
    commit.go.set()
    assert await in_time(batcher, ("b", 2)) == 2


async def test_past_the_bound_callers_wait_for_room(make, commit):
    batcher = make(max_pending=10)
    busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit((n, n))) for n in range(100)]
    await asyncio.sleep(0.02)
    assert batcher._backlog.size() == 10
    commit.go.set()
    assert await asyncio.gather(*tasks) == list(range(100))
    await busy


async def test_past_the_bound_and_the_timeout_it_is_an_error_that_says_so(make, commit):
    batcher = make(max_pending=1, timeout=0.1)
    commit.go.clear()
    replies = await asyncio.gather(*(batcher.submit((n, n)) for n in range(6)), return_exceptions=True)
    assert any("1 operations are waiting already" in str(reply) for reply in replies)


async def test_close_finishes_what_was_accepted_then_refuses(make, commit):
    released = []
    batcher = make(release=lambda: released.append(threading.current_thread().name))
    busy = await held(batcher, commit)
    tasks = [asyncio.ensure_future(batcher.submit((n % 5, n))) for n in range(50)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(batcher.close())
    await asyncio.sleep(0.01)
    with pytest.raises(StorageClosed):
        await batcher.submit(("late", 1))
    commit.go.set()
    await closing
    assert await asyncio.gather(*tasks) == list(range(50))
    assert await busy == "busy"
    assert released == ["test"]
    await batcher.close()


async def test_close_lets_go_of_those_who_wait_for_room(make, commit):
    batcher = make(max_pending=1)
    busy = await held(batcher, commit)
    first = asyncio.ensure_future(batcher.submit((1, 1)))
    waiting = [asyncio.ensure_future(batcher.submit((n, n))) for n in range(2, 5)]
    await asyncio.sleep(0.01)
    closing = asyncio.ensure_future(batcher.close())
    replies = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(reply, StorageClosed) for reply in replies)
    commit.go.set()
    await asyncio.gather(closing, busy, first)


def test_one_batcher_serves_loops_in_several_threads(make, commit):
    batcher = make()
    results: list[list[int]] = []

    async def many(start):
        results.append(await asyncio.gather(*(batcher.submit((n, n)) for n in range(start, start + 100))))

    threads = [threading.Thread(target=lambda s=s: asyncio.run(many(s))) for s in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(chain.from_iterable(results)) == list(range(300))


def test_a_loop_that_was_closed_does_no_harm(make, commit):
    batcher = make()

    async def abandon():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batcher.submit(("a", 1)), 0.02)

    commit.go.clear()
    asyncio.run(abandon())
    commit.go.set()

    async def ask(n):
        return await batcher.submit(("a", n))

    for n in range(20):
        assert asyncio.run(ask(n)) == n
    assert len(batcher._lanes) <= 2


async def test_the_thread_ends_when_idle_and_comes_back(make, commit, monkeypatch):
    monkeypatch.setattr("fsm_storage.batching.IDLE_SECONDS", 0.02)
    released = []
    batcher = make(release=lambda: released.append(1))
    for n in (1, 2):
        assert await batcher.submit(("a", n)) == n
        async with asyncio.timeout(20):
            while len(released) < n:
                await asyncio.sleep(0.01)
        assert len(released) == n


async def test_nothing_is_kept_for_what_is_done(make, commit):
    batcher = make()
    await asyncio.gather(*(batcher.submit((n, n)) for n in range(500)))
    lane = batcher._lanes[asyncio.get_running_loop()]
    assert not lane.waiting
    assert batcher._backlog.is_empty


class Driver:
    """Answers on the loop's own thread: at once, later (at `go()`), or not at all; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list] = []
        self.begins, self.is_late, self.fails = True, False, False
        self._begun: list = []

    def __call__(self, ops, done):
        assert threading.current_thread() is threading.main_thread()
        self.asked.append(list(ops))
        if not self.begins:
            return False
        answer = functools.partial(done, None if self.fails else [value for _, value in ops])
        if self.is_late:
            self._begun.append(answer)
        else:
            answer()
        return True

    def go(self) -> None:
        begun, self._begun = self._begun, []
        for answer in begun:
            answer()


@pytest.fixture
def driver():
    return Driver()


async def test_what_the_loop_can_answer_needs_no_thread(make, commit, driver):
    batcher = make(drive=driver)
    assert await asyncio.gather(*(batcher.ask((n, n)) for n in range(50))) == list(range(50))
    assert driver.asked == [[(n, n) for n in range(50)]]
    assert commit.batches == []
    assert batcher.shut() is None


@pytest.mark.parametrize("how", ["begins not", "fails", "fails late"])
async def test_what_the_loop_cannot_answer_goes_to_the_thread(make, commit, driver, how):
    driver.begins, driver.fails, driver.is_late = how != "begins not", True, how == "fails late"
    batcher = make(drive=driver)
    tasks = [asyncio.ensure_future(batcher.ask((n, n))) for n in range(5)]
    await asyncio.sleep(0.01)
    driver.go()
    assert await asyncio.gather(*tasks) == list(range(5))
    assert list(chain(*commit.batches)) == [(n, n) for n in range(5)]


@pytest.mark.parametrize("has_answered", [False, True])
async def test_a_fault_of_the_driver_stops_nobody(make, commit, caplog, has_answered):
    def drive(ops, done):
        if has_answered:
            done([value for _, value in ops])
        raise RuntimeError("a fault")

    batcher = make(drive=drive)
    for n in range(3):
        async with asyncio.timeout(5):
            assert await asyncio.gather(batcher.ask(("a", n)), batcher.ask(("b", n))) == [n, n]
    assert len(commit.batches) == (0 if has_answered else 3)
    assert "could not be begun" in caplog.text
    await batcher.close()


async def test_what_gathers_while_the_connection_is_at_work_goes_together(make, driver):
    driver.is_late = True
    batcher = make(drive=driver)
    tasks = [asyncio.ensure_future(batcher.ask(("a", 0)))]
    await asyncio.sleep(0.01)
    tasks += [asyncio.ensure_future(batcher.ask((key, key))) for key in ("a", "b", "c")]
    await asyncio.sleep(0.01)
    assert driver.asked == [[("a", 0)]]
    driver.go()
    driver.go()
    assert await asyncio.gather(*tasks) == [0, "a", "b", "c"]
    assert driver.asked[1:] == [[("a", "a"), ("b", "b"), ("c", "c")]]


async def test_an_answer_that_does_not_come_in_time_is_an_error(make, driver):
    driver.is_late = True
    batcher = make(drive=driver, timeout=0.1)
    with pytest.raises(StorageTimeout):
        await batcher.ask(("a", 1))
    driver.go()
    driver.is_late = False
    assert await batcher.ask(("a", 2)) == 2


async def test_the_loops_connection_gets_a_key_once_in_a_batch_of_limited_size(make, driver):
    batcher = make(drive=driver, batch_size=3)
    keys = ["same", "same", "a", "b", "c"]
    assert await asyncio.gather(*(batcher.ask((key, n)) for n, key in enumerate(keys))) == [0, 1, 2, 3, 4]
    assert driver.asked == [[("same", 0), ("a", 2), ("b", 3)], [("same", 1), ("c", 4)]]


async def test_thousands_of_operations_on_a_key_in_one_turn_each_have_theirs(make, driver):
    batcher = make(drive=driver, max_pending=10_000)
    assert await asyncio.gather(*(batcher.ask(("same", n)) for n in range(3000))) == list(range(3000))
    assert len(driver.asked) == 3000


async def test_a_cancelled_caller_is_not_asked_for(make, driver):
    batcher = make(drive=driver)
    task = asyncio.ensure_future(batcher.ask(("a", 1)))
    other = asyncio.ensure_future(batcher.ask(("b", 2)))
    await asyncio.sleep(0)
    task.cancel()
    assert await other == 2


async def test_what_was_locked_is_asked_again_of_the_thread(make, commit):
    def drive(ops, done):
        done([AGAIN if key == "locked" else value for key, value in ops])
        return True

    batcher = make(drive=drive)
    assert await asyncio.gather(batcher.ask(("locked", 1)), batcher.ask(("b", 2))) == [1, 2]
    assert commit.batches == [[("locked", 1)]]


@pytest.mark.parametrize("begins", [True, False])
async def test_close_finishes_what_was_asked_in_the_same_turn(make, driver, begins):
    driver.begins = begins
    batcher = make(drive=driver)
    pending = [batcher.ask(("same", n)) for n in range(3)]
    await batcher.close()
    assert await asyncio.gather(*pending) == [0, 1, 2]
    with pytest.raises(StorageClosed):
        await batcher.ask(("a", 1))


async def test_close_waits_for_what_the_loops_connection_is_at(make, commit, driver):
    driver.is_late = True
    batcher = make(drive=driver)
    tasks = [asyncio.ensure_future(batcher.ask(("a", 1)))]
    await asyncio.sleep(0.01)
    tasks.append(asyncio.ensure_future(batcher.ask(("a", 2))))
    await asyncio.sleep(0.01)
    closing = asyncio.ensure_future(batcher.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    driver.go()
    await closing
    assert await asyncio.gather(*tasks) == [1, 2]
    assert commit.batches == [[("a", 2)]]


async def test_what_is_submitted_goes_to_the_thread_without_another_turn_of_the_loop(make, commit, driver):
    batcher = make(drive=driver)
    future = batcher.submit(("a", 1))
    await asyncio.to_thread(commit.entered.wait, 5)
    assert driver.asked == []
    assert await future == 1


async def test_the_thread_stays_while_the_loops_connection_is_in_use(make, driver, monkeypatch):
    # By a clock that stands still between two questions, however long the thread looks.
    clock = [time.monotonic()]
    monkeypatch.setattr("fsm_storage.batching.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("fsm_storage.batching._now", lambda: clock[0])
    released = threading.Event()
    batcher = make(drive=driver, release=released.set, timeout=60)
    await batcher.ask(("a", 0))
    await batcher.submit(("a", 0))
    for n in range(4):
        clock[0] += 0.04
        await batcher.ask(("a", n))
        await asyncio.sleep(0.2)
        assert not released.is_set()
    clock[0] += 0.06
    assert await asyncio.to_thread(released.wait, 20)


@pytest.mark.parametrize("fails", [True, False])
async def test_close_finishes_what_the_loops_connection_gives_back(make, commit, driver, fails):
    driver.is_late, driver.fails = True, fails
    batcher = make(drive=driver)
    tasks = [asyncio.ensure_future(batcher.ask(("a", n))) for n in range(3)]
    await asyncio.sleep(0.01)
    await asyncio.to_thread(batcher.shut)
    driver.is_late = False
    driver.go()
    assert await asyncio.gather(*tasks) == [0, 1, 2]


async def test_what_is_left_for_a_later_turn_has_its_deadline(make, driver):
    driver.is_late = True
    batcher = make(drive=driver, timeout=1.0)
    began = time.monotonic()
    done = await asyncio.gather(*(batcher.ask(("same", n)) for n in range(12)), return_exceptions=True)
    assert {type(error) for error in done} == {StorageTimeout}
    assert time.monotonic() - began < 8  # one after the other, it would be 12 s
