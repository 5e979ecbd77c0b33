"""Handlers that run when a conversation's time is up: which, when, how often, and what they leave behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiogram import Bot, Dispatcher
from aiogram.exceptions import TelegramForbiddenError
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey
from aiogram.methods import SendMessage

from fsm_storage import DjangoStorage, Expired, Expiry
from fsm_storage.exceptions import InvalidStorageError
from fsm_storage.lifecycle import runner
from fsm_storage.models import FSMLease, FSMRecord
from fsm_storage.signals import conversation_expired
from tests.rows import in_thread, let_time_pass, record, records, transitions

Make = Callable[..., DjangoStorage]


class Order(StatesGroup):
    item = State()
    payment = State()


class Support(StatesGroup):
    waiting = State()


def chat(number: int, bot: int = 1) -> StorageKey:
    return StorageKey(bot_id=bot, chat_id=number, user_id=number)


def bot(number: int = 1) -> Bot:
    return Bot(f"{number}:{'A' * 35}")


@pytest.fixture
def expiry() -> Expiry:
    return Expiry(interval=0.05)


@pytest.fixture
def storage(make_storage: Make, expiry: Expiry) -> DjangoStorage:
    return make_storage(state_ttl=1000, data_ttl=1000, expiry=expiry)


@asynccontextmanager
async def running(expiry: Expiry, storage: DjangoStorage, *bots: Bot, **workflow: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(expiry.run(storage, bots or [bot()], **workflow))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            raise task.exception() or AssertionError("it ended by itself")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def cleared(database: str) -> None:
    """Wait until nothing is left in the table that has expired, or holds nothing."""
    rows = FSMRecord.objects.using(database)
    async with asyncio.timeout(30):
        while await in_thread((rows.expired() | rows.idle()).exists):
            await asyncio.sleep(0.02)


async def expire(storage: DjangoStorage) -> None:
    await in_thread(let_time_pass, storage.database, 1001)


async def talk(storage: DjangoStorage, number: int, state: State = Order.payment, **data: Any) -> None:
    await storage.update_data(chat(number), data)
    await storage.set_state(chat(number), state)


async def test_a_handler_gets_the_conversation_as_it_was(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    calls: list[Any] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired, bot: Bot, state: FSMContext, shop: str, **rest: Any) -> None:
        calls.append((expired, bot, shop, await state.get_state(), await state.get_data()))

    await talk(storage, 5, item="pizza")
    await expire(storage)
    row = await in_thread(record, database)
    own = bot()
    async with running(expiry, storage, own, shop="Nostra"):
        await cleared(database)
    expected = Expired(
        database, chat(5), row.key, "state", "Order:payment", {"item": "pizza"}, row.state_expires_at
    )
    assert calls == [(expected, own, "Nostra", None, {})]
    assert await in_thread(records, database) == []
    assert (await in_thread(transitions, database))[-1] == ("Order:payment", None, "expiry", "")
    assert not await in_thread(FSMLease.objects.using(database).exists)


async def test_the_first_handler_that_fits_is_called(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    calls: list[Any] = []

    def noting(name: str) -> Callable[..., Any]:
        async def note(expired: Expired) -> None:
            calls.append((name, expired.key.chat_id, expired.part))

        return note

    expiry.register(noting("payment"), Order.payment)
    expiry.register(noting("order"), Order)
    expiry.register(noting("text"), "by:text")
    expiry.data_handler()(noting("data"))
    for number, state in enumerate((Order.payment, Order.item, "by:text", Support.waiting, "other")):
        await storage.set_state(chat(number), state)
        if number > 2:
            await storage.set_data(chat(number), {"n": number})
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert sorted(calls) == [
        ("data", 3, "data"),
        ("data", 4, "data"),
        ("order", 1, "state"),
        ("payment", 0, "state"),
        ("text", 2, "state"),
    ]
    assert await in_thread(records, database) == []


async def test_a_handler_without_states_is_for_all(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    calls: list[Any] = []

    @expiry.handler()
    def note(expired: Expired) -> None:  # a plain function is called in a thread, as by aiogram
        calls.append((expired.key.chat_id, expired.part))

    expiry.data_handler()(note)
    await storage.set_state(chat(1), "any")
    await storage.set_data(chat(2), {"n": 2})
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert sorted(calls) == [(1, "state"), (2, "data")]


async def test_a_handler_may_move_the_conversation_on(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    @expiry.handler(Order.payment)
    async def resume(expired: Expired, state: FSMContext) -> None:
        await state.set_data(expired.data)
        await state.set_state(Order.item)

    await talk(storage, 5, item="pizza")
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert await storage.get_state(chat(5)) == "Order:item"
    assert await storage.get_data(chat(5)) == {"item": "pizza"}
    assert (await in_thread(transitions, database))[-2:] == [
        ("Order:payment", None, "expiry", ""),
        (None, "Order:item", "bot", ""),
    ]


async def test_what_was_renewed_is_left_alone(
    expiry: Expiry, storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed between the first look and the second one, when the lease is held."""
    calls: list[int] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append(expired.key.chat_id)

    for number in range(2):
        await talk(storage, number)
    await expire(storage)
    select = runner.Runner._select

    def select_and_renew(self: runner.Runner, limit: int) -> Any:
        found = select(self, limit)
        row = FSMRecord.objects.using(database).get(chat_id=0)
        if row.current_state is None:
            row.edit(state=Order.payment, state_ttl=1000)
        return found

    monkeypatch.setattr(runner.Runner, "_select", select_and_renew)
    async with running(expiry, storage):
        await cleared(database)
        await asyncio.sleep(0.2)
    assert calls == [1]
    assert await storage.get_state(chat(0)) == "Order:payment"
    assert not await in_thread(FSMLease.objects.using(database).exists)


async def test_what_is_written_while_the_handler_runs_is_respected(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    """A new state stays; new data stays too, and the expired state beside it is cleared."""

    @expiry.handler(Order)
    async def interfere(expired: Expired) -> None:
        await storage.update_data(expired.key, {"new": 1})
        if expired.key.chat_id == 1:
            await storage.set_state(expired.key, Order.item)

    for number in (1, 2):
        await talk(storage, number)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    rows = {row.chat_id: (row.state, row.data) for row in await in_thread(records, database)}
    assert rows == {1: ("Order:item", {"new": 1}), 2: (None, {"new": 1})}


async def test_a_failing_handler_is_called_again_then_reported(
    expiry: Expiry,
    storage: DjangoStorage,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(runner, "MAX_BACK_OFF", 0.5)
    expiry.attempts = 3
    attempts: list[tuple[int, int]] = []

    @expiry.handler(Order.payment)
    async def fail(expired: Expired) -> None:
        attempts.append((expired.key.chat_id, expired.attempt))
        if expired.key.chat_id == 1 or expired.attempt == 1:
            raise ZeroDivisionError("on purpose")

    for number in range(1, 4):
        await talk(storage, number)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert sorted(attempts) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)]
    errors = [entry for entry in caplog.records if entry.levelname == "ERROR"]
    assert len(errors) == 1
    assert "'1:1:1'" in errors[0].getMessage()
    assert "failed 3 times" in errors[0].getMessage()
    assert errors[0].exc_info is not None
    assert await in_thread(records, database) == []
    assert not await in_thread(FSMLease.objects.using(database).exists)


async def test_many_that_fail_keep_new_ones_waiting_but_not_each_other(
    expiry: Expiry, storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_BACK_OFF", 0.2)
    monkeypatch.setattr(runner, "MAX_SETBACKS", 2)
    expiry.attempts, expiry.concurrency = 2, 1
    attempts: list[tuple[int, int]] = []

    @expiry.handler(Order.payment)
    async def fail(expired: Expired) -> None:
        attempts.append((expired.key.chat_id, expired.attempt))
        raise ZeroDivisionError("on purpose")

    for number in range(1, 7):
        await talk(storage, number)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert sorted(attempts) == [(number, attempt) for number in range(1, 7) for attempt in (1, 2)]


async def test_an_attempt_is_not_forgotten_while_the_bot_works_on_the_conversation(
    expiry: Expiry, storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsm_storage.leases import LeaseKeeper

    monkeypatch.setattr(runner, "MAX_BACK_OFF", 0.1)
    attempts: list[int] = []
    keeper = LeaseKeeper(storage, 60)

    @expiry.handler(Order.payment)
    async def fail_once(expired: Expired) -> None:
        attempts.append(expired.attempt)
        if expired.attempt == 1:
            raise ZeroDivisionError("on purpose")

    await talk(storage, 1)
    await expire(storage)
    async with running(expiry, storage):
        await until(lambda: bool(attempts))
        while (lease := await keeper.acquire(storage.key_text(chat(1)))) is None:
            await asyncio.sleep(0.005)
        await asyncio.sleep(1.0)  # past the next attempt, and looked for several times
        keeper.release(lease)
        await cleared(database)
    await keeper.close()
    assert attempts == [1, 2]


async def test_a_failure_is_forgotten_when_its_record_was_renewed(
    expiry: Expiry, storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be looked for again and again, for ever."""
    monkeypatch.setattr(runner, "MAX_BACK_OFF", 0.2)
    failed = asyncio.Event()

    @expiry.handler(Order.payment)
    async def fail(expired: Expired) -> None:
        failed.set()
        raise ZeroDivisionError

    await talk(storage, 1)
    await expire(storage)
    own = runner.Runner(expiry, storage, [bot()], {})
    task = asyncio.create_task(own.run())
    await asyncio.wait_for(failed.wait(), 20)
    await storage.set_state(chat(1), Order.payment)
    await until(lambda: not own._setbacks and not own._tasks)
    task.cancel()
    await asyncio.wait([task])
    assert await storage.get_state(chat(1)) == "Order:payment"


async def test_one_that_fails_does_not_hold_up_others(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    """There is room for one at a time, and the first is not tried again for longer than the test waits."""

    class NotNow(Exception):
        retry_after = 600

    expiry.concurrency = 1
    calls: list[int] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append(expired.key.chat_id)
        if len(calls) == 1:
            raise NotNow

    for number in range(5):
        await talk(storage, number)
    await expire(storage)
    async with running(expiry, storage):
        await until(lambda: len(calls) >= 5)
    assert sorted(calls) == list(range(5))


async def test_a_user_who_blocked_the_bot_is_no_reason_to_try_again(
    expiry: Expiry, storage: DjangoStorage, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append(expired.attempt)
        raise TelegramForbiddenError(SendMessage(chat_id=1, text=""), "bot was blocked by the user")

    await talk(storage, 1)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert calls == [1]
    assert not [entry for entry in caplog.records if entry.levelname in ("WARNING", "ERROR")]


async def test_a_handler_that_takes_too_long_counts_as_failed(
    expiry: Expiry, storage: DjangoStorage, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    expiry.timeout, expiry.attempts = 0.05, 1

    @expiry.handler(Order.payment)
    async def hang(expired: Expired) -> None:
        await asyncio.Event().wait()

    await talk(storage, 1)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert "failed 1 times" in caplog.text


async def test_handlers_at_a_time_are_bounded(expiry: Expiry, storage: DjangoStorage, database: str) -> None:
    expiry.concurrency = 3
    at_work: set[int] = set()
    most = 0

    @expiry.handler(Order.payment)
    async def work(expired: Expired) -> None:
        nonlocal most
        at_work.add(expired.key.chat_id)
        most = max(most, len(at_work))
        await asyncio.sleep(0.01)
        at_work.discard(expired.key.chat_id)

    for number in range(20):
        await talk(storage, number)
    await expire(storage)
    async with running(expiry, storage):
        await cleared(database)
    assert most == 3


async def test_only_the_conversations_of_the_own_bots_are_handled(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    calls: list[int] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append(expired.key.bot_id)

    for number in (1, 2, 3):
        await storage.set_state(chat(7, bot=number), Order.payment)
    await expire(storage)
    async with running(expiry, storage, bot(1), bot(2)):
        async with asyncio.timeout(30):
            while len(await in_thread(records, database)) > 1:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)  # in which the third one's is not handled
    assert sorted(calls) == [1, 2]
    assert [row.bot_id for row in await in_thread(records, database)] == [3]


async def test_a_key_that_a_bot_handler_holds_has_to_wait(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    from fsm_storage.leases import LeaseKeeper

    calls: list[int] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append(expired.key.chat_id)

    for number in (1, 2):
        await talk(storage, number)
    await expire(storage)
    keeper = LeaseKeeper(storage, 60)
    lease = await keeper.acquire(storage.key_text(chat(1)))
    assert lease is not None
    async with running(expiry, storage):
        await until(lambda: bool(calls))
        await asyncio.sleep(0.3)
        assert calls == [2]
        await storage.set_state(chat(1), Order.item)  # the bot's handler goes on with it
        keeper.release(lease)
        await asyncio.sleep(0.3)
    await keeper.close()
    assert calls == [2]
    assert await storage.get_state(chat(1)) == "Order:item"


async def test_the_plain_sweep_leaves_to_handlers_what_is_theirs(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    expiry.register(print, Order.payment)
    expiry.register(print, Support)
    for number, state in enumerate((Order.payment, Order.item, Support.waiting)):
        await talk(storage, number, state, n=number)
    await storage.set_data(chat(3), {"n": 3})
    await expire(storage)
    assert await in_thread(storage.sweep) == (1, 2, 2)

    def left() -> dict[int, Any]:
        return {row.chat_id: (row.state, row.data) for row in records(database)}

    both = {0: ("Order:payment", {"n": 0}), 2: ("Support:waiting", {"n": 2})}
    assert await in_thread(left) == both
    expiry.data_handler()(print)
    await storage.set_data(chat(4), {"n": 4})
    await storage.set_state(chat(4), "other")
    await expire(storage)
    assert await in_thread(storage.sweep) == (1, 0, 0)
    assert await in_thread(left) == {**both, 4: (None, {"n": 4})}
    expiry.register(print)
    await storage.set_state(chat(5), "other")
    await expire(storage)
    assert await in_thread(storage.sweep) == (0, 0, 0)


async def test_data_goes_with_its_own_time_unless_its_state_goes_then(
    expiry: Expiry, make_storage: Make, database: str
) -> None:
    storage = make_storage(data_ttl=100, expiry=expiry)
    calls: list[Any] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        calls.append((expired.key.chat_id, expired.data))

    for number, ttl in enumerate((120, 500)):
        await storage.set_data(chat(number), {"n": number})
        await storage.set_state(chat(number), Order.payment, ttl=ttl)
    await in_thread(let_time_pass, database, 110)
    assert await in_thread(storage.sweep) == (0, 1, 0)  # of the second: its state lives on for long
    await in_thread(let_time_pass, database, 400)
    async with running(expiry, storage):
        await cleared(database)
    assert sorted(calls) == [(0, {"n": 0}), (1, {})]


async def test_the_signal_comes_when_the_handler_is_done(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    order: list[str] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        order.append("handler")

    async def hear(part: str, state: str, **_: Any) -> None:
        order.append(f"{part} {state}")

    conversation_expired.connect(hear)
    try:
        await talk(storage, 1)
        await expire(storage)
        async with running(expiry, storage):
            await cleared(database)
    finally:
        conversation_expired.disconnect(hear)
    assert order == ["handler", "state Order:payment"]


async def test_a_shutdown_lets_handlers_finish(expiry: Expiry, storage: DjangoStorage, database: str) -> None:
    go_on, begun, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @expiry.handler(Order.payment)
    async def work(expired: Expired) -> None:
        begun.set()
        await go_on.wait()
        done.set()

    await talk(storage, 1)
    await expire(storage)
    async with running(expiry, storage):
        await asyncio.wait_for(begun.wait(), 20)
        asyncio.get_running_loop().call_later(0.1, go_on.set)
    assert done.is_set()
    assert await storage.get_state(chat(1)) is None
    assert not await in_thread(FSMRecord.objects.using(database).state_expired().exists)
    assert not await in_thread(FSMLease.objects.using(database).exists)


async def test_a_handler_that_a_shutdown_cancels_is_called_again(
    expiry: Expiry, storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DRAIN", 0.05)
    begun = asyncio.Event()
    calls = 0

    @expiry.handler(Order.payment)
    async def work(expired: Expired) -> None:
        nonlocal calls
        calls += 1
        begun.set()
        if calls == 1:
            await asyncio.Event().wait()

    await talk(storage, 1)
    await expire(storage)
    async with running(expiry, storage):
        await asyncio.wait_for(begun.wait(), 20)
    assert (await in_thread(record, database)).state == "Order:payment"
    assert not await in_thread(FSMLease.objects.using(database).exists)
    async with running(expiry, storage):
        await cleared(database)
    assert calls == 2


async def test_it_starts_and_stops_with_the_dispatcher(
    expiry: Expiry, storage: DjangoStorage, database: str
) -> None:
    calls: list[Any] = []

    @expiry.handler(Order.payment)
    async def note(expired: Expired, dispatcher: Dispatcher, shop: str, bot: Bot) -> None:
        calls.append((dispatcher, shop, bot.id))

    dispatcher = Dispatcher(storage=storage, shop="Nostra")
    expiry.setup(dispatcher)
    await talk(storage, 1)
    await expire(storage)
    own = bot()
    await dispatcher.emit_startup(bot=own, bots=[own], dispatcher=dispatcher, **dispatcher.workflow_data)
    await cleared(database)
    await dispatcher.emit_shutdown(bot=own, bots=[own], dispatcher=dispatcher, **dispatcher.workflow_data)
    assert calls == [(dispatcher, "Nostra", 1)]
    assert storage.closed


def test_a_storage_that_does_not_know_the_handlers_is_refused(make_storage: Make, database: str) -> None:
    with pytest.raises(InvalidStorageError, match="does not know these expiry handlers"):
        Expiry().setup(Dispatcher(storage=make_storage()))
    with pytest.raises(InvalidStorageError, match="expiry must be an Expiry"):
        make_storage(expiry=5)


by_path = Expiry()
by_path.register(print, Order.payment)


def test_the_handlers_may_be_named_by_their_path(make_storage: Make, database: str) -> None:
    storage = make_storage(expiry=f"{__name__}.by_path")
    by_path.setup(Dispatcher(storage=storage))
    assert storage.expiry is by_path


async def test_an_expiry_that_is_known_is_not_waited_for_longer_than_it_takes(
    make_storage: Make, database: str
) -> None:
    expiry = Expiry(interval=60)
    called = asyncio.Event()

    @expiry.handler(Order.payment)
    async def note(expired: Expired) -> None:
        called.set()

    storage = make_storage(expiry=expiry)
    await storage.set_state(chat(1), Order.payment, ttl=1)
    began = time.monotonic()
    async with running(expiry, storage):
        await called.wait()
    assert time.monotonic() - began < expiry.interval / 2


@pytest.mark.parametrize("wrong", [5, None, State, b"Order:payment"], ids=repr)
def test_what_is_no_state_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="for states and groups of states"):
        Expiry().register(print, wrong)


def test_wrong_options_are_named() -> None:
    for options in ({"concurrency": 0}, {"attempts": 1.5}, {"timeout": 0}, {"interval": "5"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Expiry(**options)  # type: ignore[arg-type]
    expiry = Expiry()
    expiry.data_handler()(print)
    with pytest.raises(ValueError, match="already"):
        expiry.data_handler()(print)
