"""The queue of updates, with Telegram's rules of long polling."""

import asyncio
import itertools
from collections import deque

from aiogram import methods
from aiogram.types import TelegramObject, Update

from project.bot_api.wire import APIError

MAX_UPDATES = 100
# Not sent unless they are asked for by name: https://core.telegram.org/bots/api#getupdates
NOT_BY_DEFAULT = {"chat_member", "message_reaction", "message_reaction_count"}


class Updates:
    """The unconfirmed updates of a bot, and the one poll that may wait for them."""

    def __init__(self) -> None:
        self.last_id = 0
        self._unconfirmed: deque[Update] = deque()
        self._allowed: list[str] = []
        self._poll: asyncio.Future[bool] | None = None  # done: is the poll to go on?

    def __len__(self) -> int:
        return len(self._unconfirmed)

    @property
    def is_polled(self) -> bool:
        """Say whether a poll waits now."""
        return self._poll is not None

    def add(self, **event: TelegramObject) -> None:
        """Queue an update. One of a type that the bot did not ask for is dropped."""
        (kind,) = event
        if kind in self._allowed or (not self._allowed and kind not in NOT_BY_DEFAULT):
            self.last_id += 1
            self._unconfirmed.append(Update.model_validate({"update_id": self.last_id, **event}))
            self._end_poll(go_on=True)

    def drop(self) -> None:
        self._unconfirmed.clear()

    async def poll(self, call: methods.GetUpdates) -> list[Update]:
        """Confirm what is below the offset; return what waits, or what comes within the timeout.

        A poll that still waits is ended with 409 by a newer one, as Telegram does.
        """
        self._end_poll(go_on=False)
        if call.allowed_updates is not None:
            self._allowed = call.allowed_updates
        self._confirm(call.offset or 0)
        if not self._unconfirmed and call.timeout and not await self._wait(call.timeout):
            raise APIError(
                409,
                "Conflict: terminated by other getUpdates request; "
                "make sure that only one bot instance is running",
            )
        limit = min(max(call.limit or MAX_UPDATES, 1), MAX_UPDATES)
        return list(itertools.islice(self._unconfirmed, limit))

    async def _wait(self, seconds: int) -> bool:
        poll: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._poll = poll
        try:
            async with asyncio.timeout(seconds):
                return await poll
        except TimeoutError:
            return True
        finally:
            if self._poll is poll:
                self._poll = None

    def _end_poll(self, *, go_on: bool) -> None:
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(go_on)

    def _confirm(self, offset: int) -> None:
        """Forget the updates below `offset`; below zero, it counts from the end of the queue."""
        while self._unconfirmed and (
            self._unconfirmed[0].update_id < offset or 0 < -offset < len(self._unconfirmed)
        ):
            self._unconfirmed.popleft()
