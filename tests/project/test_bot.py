"""The bot end to end: people talk over HTTP, and the records in the database move as they should."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State
from aiogram.fsm.storage.base import BaseStorage

from fsm_storage.backends.django import DjangoStorage
from fsm_storage.models import FSMRecord, FSMTransition
from project.bot import GracefulDispatcher, build_bot, build_dispatcher
from project.bot_api import BotAPI
from project.handlers.lunch import topic_context
from project.person import Person, Refused
from project.states import Feedback, Lunch, Order, Support
from tests.conftest import SQLITE
from tests.project.conftest import ANNA, FORUM, OLEG, PRIVATE, MakePerson, key_of, running_bot
from tests.rows import in_thread

pytestmark = [pytest.mark.parametrize("database", [SQLITE], indirect=True)]

ORDER_DATA = {
    "item": "pepperoni",
    "size": "l",
    "amount": 2,
    "address": "ул. Ленина, 3",
    "phone": "+49301234567",
    "payment": "cash",
}


@pytest.fixture
async def bot(api: BotAPI, storage: DjangoStorage) -> AsyncIterator[GracefulDispatcher]:
    async with running_bot(api, storage) as dispatcher:
        yield dispatcher


@pytest.fixture
def anna(bot: GracefulDispatcher, make_person: MakePerson) -> Person:
    return make_person()


def context(person: Person, storage: BaseStorage) -> FSMContext:
    return FSMContext(storage, key_of(person))


async def test_an_order_from_the_first_question_to_the_last(anna: Person, storage: DjangoStorage) -> None:
    state = context(anna, storage)
    question = await anna.say("/order")
    assert await state.get_state() == Order.item
    question = await anna.press(question, "Pepperoni")
    assert (await state.get_state(), await state.get_data()) == (Order.size, {"item": "pepperoni"})
    assert (await anna.press(question, "Large")).text == "Large. How many?"
    assert await state.get_state() == Order.amount
    await anna.say("2")
    assert await state.get_state() == Order.address
    await anna.say("ул. Ленина, 3")
    assert await state.get_state() == Order.phone
    question = await anna.say("+49 (30) 123-45-67")
    assert await state.get_state() == Order.payment
    question = await anna.press(question, "Cash")
    assert question.text == (
        "2 × Pepperoni, large\nTo: ул. Ленина, 3\nPhone: +49301234567\nPayment: cash, 32 €\n\nIs that right?"
    )
    assert (await state.get_state(), await state.get_data()) == (Order.confirmation, ORDER_DATA)
    thanks = await anna.press(question, "Order")
    assert (thanks.text or "").endswith("Thank you, Anna! It is on its way.")
    assert thanks.reply_markup is None
    assert (await state.get_state(), await state.get_data()) == (None, {})


async def test_an_order_leaves_its_history(anna: Person) -> None:
    question = await anna.say("/order")
    await anna.press(question, "Pepperoni")
    await anna.say("/cancel")

    def steps() -> list[tuple[str, str]]:
        return [(step.from_state or "", step.to_state or "") for step in FSMTransition.objects.order_by("pk")]

    assert await in_thread(steps) == [("", "Order:item"), ("Order:item", "Order:size"), ("Order:size", "")]


@pytest.mark.parametrize(
    ("state", "text", "answer"),
    [
        (Order.amount, "two", "Please send a number from 1 to 20."),
        (Order.amount, "21", "Please send a number from 1 to 20."),
        (Order.amount, "²", "Please send a number from 1 to 20."),
        (Order.address, "home", "Please send a street and a house number."),
        (Order.address, "12 34", "Please send a street and a house number."),
        (Order.phone, "12345", "That is not a phone number. Please send it like +49 30 1234567."),
        (Order.item, "pizza", "I did not understand that. Please answer the question above, or /cancel."),
    ],
)
async def test_a_wrong_answer_is_asked_for_again(
    anna: Person, storage: DjangoStorage, state: State, text: str, answer: str
) -> None:
    conversation = context(anna, storage)
    await conversation.set_state(state)
    assert (await anna.say(text)).text == answer
    assert await conversation.get_state() == state


EVERY_STATE = [*Order.__states__, *Support.__states__, *Feedback.__states__]


@pytest.mark.parametrize("state", EVERY_STATE, ids=lambda state: state.state)
async def test_every_command_works_in_every_state(anna: Person, storage: DjangoStorage, state: State) -> None:
    conversation = context(anna, storage)
    for command, group in (("/order", Order), ("/support", Support), ("/feedback", Feedback)):
        await conversation.set_state(state)
        await anna.say(command)
        assert await conversation.get_state() == group.__states__[0]
    await conversation.set_data({"item": "margherita"})
    await anna.say("/cancel")
    assert (await conversation.get_state(), await conversation.get_data()) == (None, {})
    assert (await anna.say("/cancel")).text == "There is nothing to cancel."


async def test_a_button_of_an_earlier_question_is_out_of_date(anna: Person, storage: DjangoStorage) -> None:
    question = await anna.say("/order")
    await anna.say("/cancel")
    with pytest.raises(Refused, match="out of date"):
        await anna.press(question, "Pepperoni")
    assert await context(anna, storage).get_state() is None


async def test_who_says_no_starts_again(anna: Person, storage: DjangoStorage) -> None:
    state = context(anna, storage)
    await state.update_data({key: value for key, value in ORDER_DATA.items() if key != "payment"})
    await state.set_state(Order.phone)
    question = await anna.say("+49301234567")
    question = await anna.press(question, "Card")
    assert (await anna.press(question, "Start again")).text == "What would you like?"
    assert (await state.get_state(), await state.get_data()) == (Order.item, {})


async def test_support_waits_for_an_agent_and_notes_what_is_added(
    anna: Person, storage: DjangoStorage
) -> None:
    question = await anna.say("/support")
    await anna.press(question, "My order is late")
    await anna.say("An hour!")
    await anna.say("Still nothing")
    state = context(anna, storage)
    assert await state.get_state() == Support.waiting
    assert await state.get_data() == {"topic": "late", "messages": ["An hour!", "Still nothing"]}


@pytest.mark.parametrize("skips", [False, True])
async def test_feedback(
    anna: Person, storage: DjangoStorage, skips: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "project")
    question = await anna.say("/feedback")
    question = await anna.press(question, "★★★")
    assert question.text == "★★★ What went wrong?"
    await (anna.press(question, "Skip") if skips else anna.say("Cold"))
    assert await context(anna, storage).get_state() is None
    assert caplog.messages == ["feedback: 3 stars" if skips else "feedback: 3 stars, 'Cold'"]


async def test_lunch_is_for_groups(anna: Person) -> None:
    assert (await anna.say("/lunch")).text == "Add me to a group and send /lunch there."


async def test_two_topics_are_kept_apart(
    bot: GracefulDispatcher, make_person: MakePerson, storage: DjangoStorage
) -> None:
    here, there = make_person(chat=FORUM, thread_id=2), make_person(chat=FORUM, thread_id=3)
    await there.say("/lunch")
    message = await here.say("/lunch")
    await here.press(message, "Ramen Bar")
    assert await context(there, storage).get_state() == Lunch.place
    assert await context(here, storage).get_state() is None
    assert await topic_context(context(here, storage)).get_state() == Lunch.collecting
    assert await topic_context(context(there, storage)).get_state() is None


async def test_all_who_join_at_once_are_on_the_list(
    bot: GracefulDispatcher, make_person: MakePerson, storage: DjangoStorage
) -> None:
    anna, oleg = (make_person(user, FORUM, thread_id=2) for user in (ANNA, OLEG))
    message = await anna.press(await anna.say("/lunch"), "Ramen Bar")

    async def join(person: Person, dish: str) -> None:
        question = await person.press(message, "I am in", addressed=True)
        await person.say(dish, reply_to=question, addressed=True)

    await asyncio.gather(join(anna, "ramen"), join(oleg, "суп"))
    with pytest.raises(Refused, match="Only the one who opened"):
        await oleg.press(message, "Close the list")
    result = await anna.press(message, "Close the list")
    first, *dishes = (result.text or "").splitlines()
    assert first == "Lunch from Ramen Bar:"
    assert sorted(dishes) == ["Anna: ramen", "Олег <b>: суп"]
    assert await in_thread(FSMRecord.objects.live().count) == 0


async def test_an_open_list_is_shown_again(
    bot: GracefulDispatcher, make_person: MakePerson, storage: DjangoStorage
) -> None:
    anna, oleg = (make_person(user, FORUM, thread_id=2) for user in (ANNA, OLEG))
    message = await anna.press(await anna.say("/lunch"), "Ramen Bar")
    assert (await oleg.say("/lunch")).text == message.text
    assert await context(oleg, storage).get_state() is None


async def test_commands_and_the_wanted_updates_are_told_to_telegram(
    bot: GracefulDispatcher, api: BotAPI
) -> None:
    assert [command.command for command in api.commands] == [
        "order",
        "support",
        "feedback",
        "lunch",
        "cancel",
    ]
    assert sorted(bot.resolve_used_update_types()) == ["callback_query", "message"]


async def test_a_flood_delays_an_answer_and_does_not_lose_it(anna: Person, api: BotAPI) -> None:
    api.flood("sendMessage", 1)
    assert (await anna.say("/order")).text == "What would you like?"


async def test_a_handler_in_progress_finishes_before_the_storage_closes(
    api: BotAPI, storage: DjangoStorage, database: str
) -> None:
    started, finished = asyncio.Event(), asyncio.Event()
    dispatcher = build_dispatcher(storage)

    @dispatcher.message.outer_middleware
    async def slow(handler, event, data):  # type: ignore[no-untyped-def]
        started.set()
        await asyncio.sleep(0.1)
        result = await handler(event, data)
        assert not storage.closed
        finished.set()
        return result

    polling = asyncio.create_task(
        dispatcher.start_polling(build_bot(api.token, api.url), handle_signals=False)
    )
    await api.say(ANNA, PRIVATE, "/order")
    await started.wait()
    await dispatcher.stop_polling()
    await polling
    assert finished.is_set()
    assert storage.closed
    record = await in_thread(FSMRecord.objects.get)
    assert record.state == "Order:item"
