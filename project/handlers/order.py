"""/order: item, size, amount, address, phone, payment, confirmation."""

import logging
import re

from aiogram import F, Router
from aiogram.fsm.context import FSMContext
from aiogram.types import CallbackQuery, Message

from fsm_storage import with_ttl
from project.handlers.general import show
from project.handlers.reminders import PAYMENT_PATIENCE
from project.menu import CONFIRMATION, ITEMS, PAYMENTS, SIZES, Choice, choices, summary
from project.states import Order

logger = logging.getLogger(__name__)

MAX_AMOUNT = 20
ADDRESS = re.compile(r"(?=.*\d)(?=.*[^\W\d]).{5,200}", re.DOTALL)
PHONE = re.compile(r"\+?\d{10,15}")
PHONE_PUNCTUATION = re.compile(r"[\s()-]+")


async def start(message: Message, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Order.item)
    await message.answer("What would you like?", reply_markup=choices("item", ITEMS))


async def choose_item(callback: CallbackQuery, callback_data: Choice, state: FSMContext) -> None:
    await state.update_data(item=callback_data.answer)
    await state.set_state(Order.size)
    await show(callback, f"{ITEMS[callback_data.answer]}. Which size?", choices("size", SIZES))


async def choose_size(callback: CallbackQuery, callback_data: Choice, state: FSMContext) -> None:
    await state.update_data(size=callback_data.answer)
    await state.set_state(Order.amount)
    await show(callback, f"{SIZES[callback_data.answer]}. How many?")


async def take_amount(message: Message, state: FSMContext) -> None:
    text = (message.text or "").strip()
    if not (text.isdecimal() and 1 <= int(text) <= MAX_AMOUNT):
        await message.answer(f"Please send a number from 1 to {MAX_AMOUNT}.")
        return
    await state.update_data(amount=int(text))
    await state.set_state(Order.address)
    await message.answer("Where shall we bring it? Street and number, please.")


async def take_address(message: Message, state: FSMContext) -> None:
    text = (message.text or "").strip()
    if not ADDRESS.fullmatch(text):
        await message.answer("Please send a street and a house number.")
        return
    await state.update_data(address=text)
    await state.set_state(Order.phone)
    await message.answer("At which phone number can the courier reach you?")


async def take_phone(message: Message, state: FSMContext) -> None:
    phone = PHONE_PUNCTUATION.sub("", message.text or "")
    if not PHONE.fullmatch(phone):
        await message.answer("That is not a phone number. Please send it like +49 30 1234567.")
        return
    await state.update_data(phone=phone)
    await with_ttl(state, PAYMENT_PATIENCE).set_state(Order.payment)  # then, see `reminders`
    await message.answer("How will you pay?", reply_markup=choices("payment", PAYMENTS))


async def choose_payment(callback: CallbackQuery, callback_data: Choice, state: FSMContext) -> None:
    order = await state.update_data(payment=callback_data.answer)
    await state.set_state(Order.confirmation)
    await show(callback, f"{summary(order)}\n\nIs that right?", choices("confirmation", CONFIRMATION))


async def confirm(callback: CallbackQuery, state: FSMContext) -> None:
    order = await state.get_data()
    logger.info("order of %d: %s", callback.from_user.id, order)  # a shop would save it in its own models
    await state.clear()
    await show(callback, f"{summary(order)}\n\nThank you, {callback.from_user.first_name}! It is on its way.")


async def start_again(callback: CallbackQuery, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Order.item)
    await show(callback, "What would you like?", choices("item", ITEMS))


def router() -> Router:
    router = Router(name="order")
    message, button = router.message, router.callback_query
    message.filter(F.chat.type == "private")
    button.register(choose_item, Order.item, Choice.filter((F.question == "item") & F.answer.in_(ITEMS)))
    button.register(choose_size, Order.size, Choice.filter((F.question == "size") & F.answer.in_(SIZES)))
    message.register(take_amount, Order.amount, F.text)
    message.register(take_address, Order.address, F.text)
    message.register(take_phone, Order.phone, F.text)
    button.register(
        choose_payment, Order.payment, Choice.filter((F.question == "payment") & F.answer.in_(PAYMENTS))
    )
    confirmation = F.question == "confirmation"
    button.register(confirm, Order.confirmation, Choice.filter(confirmation & (F.answer == "yes")))
    button.register(start_again, Order.confirmation, Choice.filter(confirmation & (F.answer == "no")))
    return router
