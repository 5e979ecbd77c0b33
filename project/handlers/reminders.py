"""What the bot does when a conversation's time is up. Named in the setting `FSM_STORAGES`, option `expiry`."""

import os
from datetime import timedelta

from aiogram import Bot
from aiogram.fsm.context import FSMContext

from fsm_storage import Expired, Expiry, with_ttl
from project.menu import PAYMENTS, choices
from project.states import Order

PAYMENT_PATIENCE = timedelta(seconds=float(os.environ.get("PAYMENT_PATIENCE", "900")))

expiry = Expiry()


@expiry.handler(Order.payment)
async def remind_of_payment(expired: Expired, bot: Bot, state: FSMContext) -> None:
    """Offer once to go on with the order; the second time, let it go."""
    chat, thread = expired.key.chat_id, expired.key.thread_id
    if expired.data.get("reminded"):
        await state.clear()
        await bot.send_message(
            chat, "Your order was not paid, so it is gone. /order", message_thread_id=thread
        )
        return
    # The message first: if the process dies in between, a second reminder is better than none.
    await bot.send_message(
        chat,
        "Your order is still here. How will you pay?",
        message_thread_id=thread,
        reply_markup=choices("payment", PAYMENTS),
    )
    await state.set_data({**expired.data, "reminded": True})
    await with_ttl(state, PAYMENT_PATIENCE).set_state(Order.payment)
