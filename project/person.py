"""One person in one chat, as a script sees them: say, press, hear."""

import asyncio
import random

from aiogram.types import Chat, Message, User

from project.bot_api import BotAPI

PATIENCE = 30.0  # seconds a person waits for the bot


class GaveUp(Exception):
    """The person left in the middle of a conversation."""


class Silence(Exception):
    """The bot did not answer the person in time."""


class Refused(Exception):
    """The bot answered a button with a notice instead of a message."""


class Pace:
    """Spreads the messages of all people over time: `rate` a second together, at irregular moments."""

    def __init__(self, rate: float, rng: random.Random) -> None:
        self._mean = 1 / rate
        self._rng = rng
        self._next = 0.0

    async def turn(self) -> None:
        """Wait until the caller may act. Turns are given in the order in which they are asked for."""
        now = asyncio.get_running_loop().time()
        self._next = max(now, self._next) + self._rng.uniform(0.5, 1.5) * self._mean
        await asyncio.sleep(self._next - now)


class Person:
    """A user in a chat, or in the topic `thread_id` of a group.

    `say` and `press` wait for the bot's next message here and return it; with `addressed`, for the
    next one that mentions this person. They raise `Silence`, and `GaveUp` once `steps_left` is 0.
    """

    def __init__(
        self,
        api: BotAPI,
        user: User,
        chat: Chat,
        inbox: "asyncio.Queue[Message]",
        pace: Pace,
        *,
        thread_id: int | None = None,
        steps_left: int | None = None,
    ) -> None:
        self.api, self.user, self.chat, self.inbox, self.pace = api, user, chat, inbox, pace
        self.thread_id, self.steps_left = thread_id, steps_left

    async def say(self, text: str, *, reply_to: Message | None = None, addressed: bool = False) -> Message:
        await self._begin()
        await self.api.say(self.user, self.chat, text, thread_id=self.thread_id, reply_to=reply_to)
        return await self._hear(addressed)

    async def press(self, message: Message, button: str, *, addressed: bool = False) -> Message:
        """Press `button` under `message`. `LookupError` if it is not there, `Refused` if it does nothing."""
        await self._begin()
        pressed = await self.api.press(self.user, message, button)
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await pressed
        except TimeoutError as error:
            raise Silence from error
        if answer.text:
            raise Refused(answer.text)
        return await self._hear(addressed)

    async def _begin(self) -> None:
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise GaveUp
            self.steps_left -= 1
        await self.pace.turn()
        while not self.inbox.empty():  # what came before the question is not its answer
            self.inbox.get_nowait()

    async def _hear(self, addressed: bool) -> Message:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    message = await self.inbox.get()
                    if message.message_thread_id == self.thread_id and (
                        not addressed or self._is_in(message)
                    ):
                        return message
        except TimeoutError as error:
            raise Silence from error

    def _is_in(self, message: Message) -> bool:
        mentioned = [entity.user.id for entity in message.entities or () if entity.user]
        return self.user.id in mentioned
