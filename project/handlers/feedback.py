"""/feedback: a rating and a comment."""

import logging

from aiogram import F, Router
from aiogram.fsm.context import FSMContext
from aiogram.types import CallbackQuery, Message

from project.handlers.general import show
from project.menu import Choice, Rate, choices, stars
from project.states import Feedback

logger = logging.getLogger(__name__)


async def start(message: Message, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Feedback.rating)
    await message.answer("How was your last order?", reply_markup=stars())


async def rate(callback: CallbackQuery, callback_data: Rate, state: FSMContext) -> None:
    await state.update_data(rating=callback_data.stars)
    await state.set_state(Feedback.comment)
    question = "What should we know?" if callback_data.stars > 3 else "What went wrong?"
    await show(callback, f"{'★' * callback_data.stars} {question}", choices("comment", {"skip": "Skip"}))


async def take_comment(message: Message, state: FSMContext) -> None:
    logger.info("feedback: %d stars, %r", await state.get_value("rating", 0), message.text)
    await state.clear()
    await message.answer("Thank you, we read every comment.")


async def skip_comment(callback: CallbackQuery, state: FSMContext) -> None:
    logger.info("feedback: %d stars", await state.get_value("rating", 0))
    await state.clear()
    await show(callback, "Thank you for the rating.")


def router() -> Router:
    router = Router(name="feedback")
    message, button = router.message, router.callback_query
    message.filter(F.chat.type == "private")
    button.register(rate, Feedback.rating, Rate.filter())
    message.register(take_comment, Feedback.comment, F.text)
    button.register(skip_comment, Feedback.comment, Choice.filter(F.question == "comment"))
    return router
