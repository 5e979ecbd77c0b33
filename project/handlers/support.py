"""/support: a topic, a description, and the wait for an agent, who works in the admin."""

from aiogram import F, Router
from aiogram.fsm.context import FSMContext
from aiogram.types import CallbackQuery, Message

from project.handlers.general import show
from project.menu import Choice, choices
from project.states import Support

TOPICS = {"late": "My order is late", "wrong": "Something is wrong with it", "other": "Something else"}


async def start(message: Message, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Support.topic)
    await message.answer("What is it about?", reply_markup=choices("topic", TOPICS))


async def choose_topic(callback: CallbackQuery, callback_data: Choice, state: FSMContext) -> None:
    await state.update_data(topic=callback_data.answer)
    await state.set_state(Support.description)
    await show(callback, f"{TOPICS[callback_data.answer]}. Please describe it.")


async def take_description(message: Message, state: FSMContext) -> None:
    await state.update_data(messages=[message.text])
    await state.set_state(Support.waiting)
    await message.answer("Thank you. An agent will answer you here. /cancel if it is settled.")


async def take_another_message(message: Message, state: FSMContext) -> None:
    messages = await state.get_value("messages", [])
    await state.update_data(messages=[*messages, message.text])
    await message.answer("Noted. An agent will read it.")


def router() -> Router:
    router = Router(name="support")
    message, button = router.message, router.callback_query
    message.filter(F.chat.type == "private")
    button.register(
        choose_topic, Support.topic, Choice.filter((F.question == "topic") & F.answer.in_(TOPICS))
    )
    message.register(take_description, Support.description, F.text)
    message.register(take_another_message, Support.waiting, F.text)
    return router
