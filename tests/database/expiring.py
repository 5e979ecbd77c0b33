"""Expiry handlers for processes of their own, which find them through the option `expiry`."""

from __future__ import annotations

import os

from aiogram import Bot

from fsm_storage import Expired, Expiry
from tests.database.writers import notes

PATH = "tests.database.expiring"
expiry = Expiry(interval=0.2)


@expiry.handler("waiting")
async def note(expired: Expired, bot: Bot) -> None:
    notes(os.environ["FSM_TEST_NOTES"])(f"{expired.key.chat_id} {bot.id}")


async def make_bot() -> Bot:
    return Bot(f"1:{'A' * 35}")
