"""The scripts that people follow. Each is one conversation, with the mistakes that people make."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from aiogram.types import Message

from project.handlers.lunch import ACTIONS, PLACES
from project.handlers.support import TOPICS
from project.menu import CONFIRMATION, ITEMS, PAYMENTS, SIZES
from project.person import Person

AMOUNT_MISTAKES = ("two", "0", "две", "100500")
ADDRESSES = (
    "12 Baker Street",
    "Hauptstraße 5",
    "7 Mill Lane, flat 3",
    "221 King's Road",
    "Тверская 18, кв. 40",
    "ул. Ленина, 3",
    "Невский проспект 100",
    "Садовая 24, домофон 9",
)
ADDRESS_MISTAKES = ("home", "as always", "к офису", "12")
PHONE_MISTAKES = ("later", "12345", "он у вас есть", "+49 abc")
COMPLAINTS = (
    "It has been an hour.",
    "The box was open.",
    "I asked for no olives.",
    "Привезли не ту пиццу.",
    "Курьер не нашёл подъезд.",
    "I was charged twice.",
)
COMMENTS = (
    "Great!",
    "Still hot, thank you",
    "Очень вкусно",
    "Долго ехали",
    "A bit salty",
    "Спасибо курьеру!",
)
DISHES = ("tonkotsu", "margherita", "хинкали, 8 штук", "a salad", "харчо", "суп дня", "two of anything")

Script = Callable[[Person, random.Random], Awaitable[object]]


async def order(person: Person, rng: random.Random) -> None:
    question = await person.say("/order")
    question = await person.press(question, rng.choice([*ITEMS.values()]))
    await person.press(question, rng.choice([*SIZES.values()]))
    await _stumble(person, rng, AMOUNT_MISTAKES, 0.1)
    await person.say(str(rng.choice((1, 1, 1, 2, 2, 3, 8))))
    await _stumble(person, rng, ADDRESS_MISTAKES, 0.1)
    await person.say(rng.choice(ADDRESSES))
    await _stumble(person, rng, PHONE_MISTAKES, 0.25)
    question = await person.say(_phone(rng))
    question = await person.press(question, rng.choice([*PAYMENTS.values()]))
    await person.press(question, CONFIRMATION["no" if rng.random() < 0.1 else "yes"])


async def support(person: Person, rng: random.Random) -> None:
    question = await person.say("/support")
    await person.press(question, rng.choice([*TOPICS.values()]))
    await person.say(rng.choice(COMPLAINTS))
    if rng.random() < 0.3:
        await person.say(rng.choice(COMPLAINTS))
    if rng.random() < 0.5:
        await person.say("/cancel")


async def feedback(person: Person, rng: random.Random) -> None:
    question = await person.say("/feedback")
    question = await person.press(question, "★" * rng.choice((1, 2, 3, 4, 4, 5, 5, 5)))
    if rng.random() < 0.4:
        await person.press(question, "Skip")
    else:
        await person.say(rng.choice(COMMENTS))


async def lunch(organiser: Person, members: list[Person], rng: random.Random) -> None:
    """Order together. A list that is still open from another day is taken up again."""
    message = await organiser.say("/lunch")
    if ACTIONS["join"] not in _buttons(message):
        message = await organiser.press(message, rng.choice([*PLACES.values()]))
    joining = [asyncio.create_task(_join(member, message, rng)) for member in members]
    try:
        await asyncio.gather(*joining)
    finally:
        for task in joining:
            task.cancel()
    await organiser.press(message, ACTIONS["close"])


async def _join(member: Person, message: Message, rng: random.Random) -> None:
    question = await member.press(message, ACTIONS["join"], addressed=True)
    if rng.random() < 0.85:  # the rest never say what they want
        await member.say(rng.choice(DISHES), reply_to=question, addressed=True)


async def _stumble(person: Person, rng: random.Random, mistakes: tuple[str, ...], chance: float) -> None:
    if rng.random() < chance:
        await person.say(rng.choice(mistakes))


def _phone(rng: random.Random) -> str:
    digits = f"{rng.randrange(10**7):07}"
    return rng.choice((f"+49 30 {digits}", f"8 (900) {digits[:3]}-{digits[3:5]}-{digits[5:]}"))


def _buttons(message: Message) -> set[str]:
    rows = message.reply_markup.inline_keyboard if message.reply_markup else []
    return {button.text for row in rows for button in row}


SCRIPTS: dict[Script, int] = {order: 6, support: 2, feedback: 2}  # and how often each is chosen
