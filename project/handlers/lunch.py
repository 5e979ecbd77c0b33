"""/lunch: the people of a group, or of one topic of it, order together.

Two records are at work: each person's own state in the topic (FSMStrategy.USER_IN_TOPIC), and
the topic's shared list, which is a context of its own under the destiny "lunch".
"""

from dataclasses import replace
from typing import Any

from aiogram import F, Router
from aiogram.fsm.context import FSMContext
from aiogram.types import CallbackQuery, ForceReply, Message, User
from aiogram.utils.formatting import Text, TextMention

from project.handlers.general import show
from project.menu import Choice, choices
from project.states import Lunch

PLACES = {"pizza": "Pizza Nostra", "khinkali": "Хинкальная", "ramen": "Ramen Bar"}
ACTIONS = {"join": "I am in", "close": "Close the list"}
DISH = "dish:"


def topic_context(state: FSMContext) -> FSMContext:
    """Return the context that everyone in the chat or topic of `state` shares."""
    key = replace(state.key, user_id=state.key.chat_id, destiny="lunch")
    return FSMContext(state.storage, key)


async def start(message: Message, state: FSMContext) -> None:
    topic = topic_context(state)
    if await topic.get_state() == Lunch.collecting:
        place = await topic.get_value("place", "")
        await message.answer(_invitation(place), reply_markup=choices("lunch", ACTIONS))
        return
    await state.set_state(Lunch.place)
    await message.answer("Where from?", reply_markup=choices("place", PLACES))


async def choose_place(callback: CallbackQuery, callback_data: Choice, state: FSMContext) -> None:
    topic = topic_context(state)
    await state.clear()
    if await topic.get_state() is not None:
        await show(callback, "A list is open here already.")
        return
    place = PLACES[callback_data.answer]
    await topic.set_data({"place": place, "organiser": callback.from_user.id})
    await topic.set_state(Lunch.collecting)
    await show(callback, _invitation(place), choices("lunch", ACTIONS))


async def join(callback: CallbackQuery, state: FSMContext) -> None:
    if await topic_context(state).get_state() != Lunch.collecting:
        await callback.answer("The list is closed.")
        return
    await state.set_state(Lunch.dish)
    await callback.answer()
    if isinstance(callback.message, Message):
        # A reply reaches the bot even when its privacy mode hides the group's other messages.
        await callback.message.answer(
            **_to(callback.from_user, "what will you have?"), reply_markup=ForceReply(selective=True)
        )


async def take_dish(message: Message, state: FSMContext) -> None:
    topic = topic_context(state)
    await state.clear()
    if message.from_user is None or await topic.get_state() != Lunch.collecting:
        await message.answer("Sorry, the list is closed.")
        return
    # One key per person: `update_data` merges keys, so two people who answer at once both stay.
    person = message.from_user
    await topic.update_data({f"{DISH}{person.id}": f"{person.first_name}: {message.text}"})
    await message.answer(**_to(person, "you are on the list."))


async def close(callback: CallbackQuery, state: FSMContext) -> None:
    topic = topic_context(state)
    lunch = await topic.get_data()
    if lunch.get("organiser") != callback.from_user.id:
        await callback.answer("Only the one who opened the list can close it.", show_alert=True)
        return
    await topic.clear()
    dishes = [dish for key, dish in lunch.items() if key.startswith(DISH)]
    await show(callback, "\n".join([f"Lunch from {lunch['place']}:", *(dishes or ["nobody is in."])]))


async def only_in_groups(message: Message) -> None:
    await message.answer("Add me to a group and send /lunch there.")


def _invitation(place: str) -> str:
    return f"Lunch from {place}. Who is in?"


def _to(user: User, text: str) -> dict[str, Any]:
    """Return the text and the entities of a message that mentions `user`, whatever is in the name."""
    return Text(TextMention(user.first_name, user=user), f", {text}").as_kwargs()


def router() -> Router:
    router = Router(name="lunch")
    message, button = router.message, router.callback_query
    message.filter(F.chat.type.in_({"group", "supergroup"}))
    button.register(choose_place, Lunch.place, Choice.filter((F.question == "place") & F.answer.in_(PLACES)))
    message.register(take_dish, Lunch.dish, F.text)
    button.register(join, Choice.filter((F.question == "lunch") & (F.answer == "join")))
    button.register(close, Choice.filter((F.question == "lunch") & (F.answer == "close")))
    return router
