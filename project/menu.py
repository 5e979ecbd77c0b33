"""What is sold, and the buttons by which it is chosen. No state here."""

from collections.abc import Mapping
from typing import Any

from aiogram.filters.callback_data import CallbackData
from aiogram.types import InlineKeyboardButton, InlineKeyboardMarkup

ITEMS = {"margherita": "Margherita", "pepperoni": "Pepperoni", "four_cheeses": "Four cheeses"}
SIZES = {"s": "Small", "m": "Medium", "l": "Large"}
PAYMENTS = {"card": "Card", "cash": "Cash"}
CONFIRMATION = {"yes": "Order", "no": "Start again"}

PRICES = {"margherita": 9, "pepperoni": 11, "four_cheeses": 12}
SURCHARGES = {"s": 0, "m": 3, "l": 5}


class Choice(CallbackData, prefix="choice"):
    """A button under a question: which question, which answer."""

    question: str
    answer: str


class Rate(CallbackData, prefix="rate"):
    stars: int


def choices(question: str, answers: Mapping[str, str]) -> InlineKeyboardMarkup:
    """Return a keyboard with one row per answer."""
    return InlineKeyboardMarkup(
        inline_keyboard=[
            [button(text, Choice(question=question, answer=answer))] for answer, text in answers.items()
        ]
    )


def stars() -> InlineKeyboardMarkup:
    return InlineKeyboardMarkup(
        inline_keyboard=[[button("★" * count, Rate(stars=count))] for count in range(5, 0, -1)]
    )


def button(text: str, data: CallbackData) -> InlineKeyboardButton:
    return InlineKeyboardButton(text=text, callback_data=data.pack())


def total(order: Mapping[str, Any]) -> int:
    """Return the price of an order in euros."""
    return int(order["amount"]) * (PRICES[order["item"]] + SURCHARGES[order["size"]])


def summary(order: Mapping[str, Any]) -> str:
    return (
        f"{order['amount']} × {ITEMS[order['item']]}, {SIZES[order['size']].lower()}\n"
        f"To: {order['address']}\n"
        f"Phone: {order['phone']}\n"
        f"Payment: {PAYMENTS[order['payment']].lower()}, {total(order)} €"
    )
