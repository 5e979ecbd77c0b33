"""An order that is left at the payment, end to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiogram.fsm.context import FSMContext

from fsm_storage import DjangoStorage
from project.bot_api import BotAPI
from project.handlers.reminders import expiry
from project.states import Order
from tests.conftest import SQLITE
from tests.project.conftest import MakePerson, key_of, running_bot
from tests.rows import in_thread, let_time_pass, transitions

pytestmark = [pytest.mark.parametrize("database", [SQLITE], indirect=True)]

ORDER = {"item": "pepperoni", "size": "l", "amount": 2, "address": "12 Baker Street", "phone": "+49301234567"}


async def test_an_order_left_at_the_payment_is_offered_once_more_and_then_dropped(
    api: BotAPI, make_storage: Callable[..., DjangoStorage], make_person: MakePerson
) -> None:
    anna = make_person()
    async with running_bot(api, make_storage()):
        await anna.say("/order")
    for texts in (
        "Your order is still here. How will you pay?",
        "Your order was not paid, so it is gone. /order",
    ):
        storage = make_storage(state_ttl=1000, data_ttl=1000, expiry=expiry)
        state = FSMContext(storage, key_of(anna))
        if "still" in texts:
            await state.set_data(ORDER)
            await state.set_state(Order.payment)
        await in_thread(let_time_pass, storage.database, 1001)
        async with running_bot(api, storage, expiry), asyncio.timeout(30):
            message = await anna.inbox.get()
            assert message.text == texts
            expected = Order.payment if "still" in texts else None
            while await state.get_state() != expected:
                await asyncio.sleep(0.01)
            if "still" in texts:
                assert await state.get_data() == {**ORDER, "reminded": True}
    assert ("Order:payment", None, "expiry", "") in await in_thread(transitions, storage.database)


async def test_who_answers_the_reminder_goes_on(
    api: BotAPI, make_storage: Callable[..., DjangoStorage], make_person: MakePerson
) -> None:
    anna = make_person()
    async with running_bot(api, make_storage()):
        await anna.say("/order")
    storage = make_storage(state_ttl=1000, data_ttl=1000, expiry=expiry)
    state = FSMContext(storage, key_of(anna))
    await state.set_data(ORDER)
    await state.set_state(Order.payment)
    await in_thread(let_time_pass, storage.database, 1001)
    async with running_bot(api, storage, expiry), asyncio.timeout(30):
        reminder = await anna.inbox.get()
        while await state.get_state() != Order.payment:
            await asyncio.sleep(0.01)
        question = await anna.press(reminder, "Card")
        assert "Is that right?" in (question.text or "")
        assert (await anna.press(question, "Order")).text is not None
        assert await state.get_state() is None
