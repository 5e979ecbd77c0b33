"""The states of the bot's conversations. The admin offers these when a state is set by hand."""

from aiogram.fsm.state import State, StatesGroup


class Order(StatesGroup):
    """One person orders pizza, in private."""

    item = State()
    size = State()
    amount = State()
    address = State()
    phone = State()
    payment = State()
    confirmation = State()


class Support(StatesGroup):
    """One person asks for help and waits for an agent."""

    topic = State()
    description = State()
    waiting = State()


class Feedback(StatesGroup):
    """One person rates the last order."""

    rating = State()
    comment = State()


class Lunch(StatesGroup):
    """A topic of a group orders lunch together."""

    place = State()  # of the organiser
    dish = State()  # of each person who joins
    collecting = State()  # of the topic as a whole
