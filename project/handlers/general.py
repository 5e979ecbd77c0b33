"""What is the same in every conversation: /start, /cancel, answers to buttons, and the fallback."""

from contextlib import suppress

from aiogram import F, Router
from aiogram.exceptions import TelegramBadRequest
from aiogram.fsm.context import FSMContext
from aiogram.types import CallbackQuery, InlineKeyboardMarkup, Message

GREETING = "Hello! Hungry? /order\nA problem with an order? /support\nTell us how it was: /feedback"


async def start(message: Message, state: FSMContext) -> None:
    await state.clear()
    await message.answer(GREETING)


async def cancel(message: Message, state: FSMContext) -> None:
    if await state.get_state() is None:
        await message.answer("There is nothing to cancel.")
        return
    await state.clear()
    await message.answer("Cancelled. /order whenever you like.")


async def not_understood(message: Message, state: FSMContext) -> None:
    if await state.get_state() is None:
        await message.answer(GREETING)
    else:
        await message.answer("I did not understand that. Please answer the question above, or /cancel.")


async def out_of_date(callback: CallbackQuery) -> None:
    """Answer a button of a question that is no longer open; unanswered, it would spin for a minute."""
    await callback.answer("This button is out of date.")


async def show(callback: CallbackQuery, text: str, keyboard: InlineKeyboardMarkup | None = None) -> None:
    """Take note of a button, and put `text` where its question was."""
    with suppress(TelegramBadRequest):  # "query is too old", when the bot was down for a while
        await callback.answer()
    if isinstance(callback.message, Message):
        await callback.message.edit_text(text, reply_markup=keyboard)


def fallback() -> Router:
    router = Router(name="fallback")
    router.message.register(not_understood, F.chat.type == "private")
    router.callback_query.register(out_of_date)
    return router
