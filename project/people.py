"""A crowd of scripted people who talk to the bot through the stand-in, at a bounded pace."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable
from contextlib import ExitStack, suppress

from aiogram.types import Chat, User

from project.bot_api import BotAPI
from project.conversations import SCRIPTS, lunch
from project.person import GaveUp, Pace, Person, Refused, Silence

FIRST_NAMES = {
    "en": (
        "Anna",
        "Ben",
        "Clara",
        "Daniel",
        "Emma",
        "Frank",
        "Grace",
        "Harry",
        "Irene",
        "Jack",
        "Kate",
        "Liam",
    ),
    "ru": (
        "Борис",
        "Вера",
        "Глеб",
        "Дарья",
        "Егор",
        "Жанна",
        "Захар",
        "Ирина",
        "Лидия",
        "Олег",
        "Роман",
        "Фёдор",
    ),
}
LAST_NAMES = {
    "en": (
        "Adams",
        "Baker",
        "Clark",
        "Evans",
        "Fisher",
        "Green",
        "Hughes",
        "King",
        "Lewis",
        "Morris",
        "Turner",
    ),
    "ru": ("Бондаренко", "Гончар", "Живаго", "Коваль", "Мельник", "Рерих", "Седых", "Франко", "Черных"),
}
GROUPS = ("Office, 3rd floor", "Бухгалтерия", "Backend team", "Отдел продаж")
TOPICS = (2, 3)  # thread ids; messages in a forum's General topic carry none
MEMBERS = 4  # of a topic, its organiser among them

FIRST_USER_ID = 500_000_001
FIRST_GROUP_ID = -1_001_500_000_001
GIVES_UP = 0.3  # the chance that a conversation is left half-way


class People:
    """`count` people, each in private, and some of them in the topics of groups as well.

    Together they act `pace` times a second. The same seed gives the same people.
    """

    def __init__(self, api: BotAPI, count: int = 300, *, pace: float = 20.0, seed: int = 1) -> None:
        self._api = api
        self._rng = random.Random(seed)
        self._pace = Pace(pace, self._rng)
        self._round = count / pace  # seconds in which everyone acts once
        self.users = [make_user(FIRST_USER_ID + number, self._rng) for number in range(count)]
        self.endings: Counter[str] = Counter()
        """How conversations ended: finished, given up, refused, unanswered."""

    async def run(self, seconds: float | None = None) -> None:
        """Talk for so many seconds; by default until cancelled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
                for user in self.users:
                    tasks.create_task(self._talk_in_private(user))
                for number, title in enumerate(GROUPS[: len(self.users) // (MEMBERS * len(TOPICS))]):
                    group = Chat(id=FIRST_GROUP_ID - number, type="supergroup", title=title, is_forum=True)
                    for thread_id in TOPICS:
                        tasks.create_task(self._have_lunches(group, thread_id))

    async def _talk_in_private(self, user: User) -> None:
        chat = Chat(id=user.id, type="private", first_name=user.first_name, last_name=user.last_name)
        scripts, weights = [*SCRIPTS], [*SCRIPTS.values()]
        while True:
            (script,) = self._rng.choices(scripts, weights)
            with self._api.listen(chat.id) as inbox:
                steps = self._rng.randint(1, 8) if self._rng.random() < GIVES_UP else None
                person = Person(self._api, user, chat, inbox, self._pace, steps_left=steps)
                ending = await self._ending(script(person, self._rng))
                if ending == "given up" and self._rng.random() < 0.3:
                    person.steps_left = None
                    await self._ending(person.say("/cancel"))
            await asyncio.sleep(self._rng.uniform(0, 6 if ending == "given up" else 2) * self._round)

    async def _have_lunches(self, group: Chat, thread_id: int) -> None:
        users = self._rng.sample(self.users, MEMBERS)
        while True:
            with ExitStack() as stack:
                organiser, *members = (
                    Person(
                        self._api,
                        user,
                        group,
                        stack.enter_context(self._api.listen(group.id)),
                        self._pace,
                        thread_id=thread_id,
                    )
                    for user in users
                )
                await self._ending(lunch(organiser, members, self._rng))
            await asyncio.sleep(self._rng.uniform(0, 2) * self._round)

    async def _ending(self, conversation: Awaitable[object]) -> str:
        """Hold a conversation; say how it ended, and count that."""
        try:
            await conversation
            ending = "finished"
        except GaveUp:
            ending = "given up"
        except (Refused, LookupError):  # somebody moved the conversation in the admin
            ending = "refused"
        except Silence:
            ending = "unanswered"
        self.endings[ending] += 1
        return ending


def make_user(user_id: int, rng: random.Random) -> User:
    language = rng.choice(("en", "ru"))
    first_name = rng.choice(FIRST_NAMES[language])
    last_name = rng.choice(LAST_NAMES[language]) if rng.random() < 0.7 else None
    username = f"{(last_name or first_name).lower()}{user_id % 1000}" if language == "en" else None
    return User(
        id=user_id,
        is_bot=False,
        first_name=first_name,
        last_name=last_name,
        username=username,
        language_code=language,
    )
