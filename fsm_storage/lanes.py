"""Who waits on an event loop, and until when. Lives on the loop's own thread; knows neither a database nor Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("fsm_storage")

Asked = tuple[Any, "asyncio.Future[Any]"]
"""An operation that the loop's own connection may answer, and who waits for it."""


class Lane:
    """One event loop's side: who waits for a reply, and until when. Lives on its loop's thread.

    `give_up()` makes the error for those whose time is up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[], Exception]) -> None:
        self.loop, self._give_up = loop, give_up
        self.new_future = loop.create_future
        self.waiting: dict[asyncio.Future[Any], float] = {}
        # What the loop's own connection shall answer, and how many batches it is at.
        self.asked: list[Asked] = []
        self.driven = 0
        self.at_rest: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def expect(self, deadline: float) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.new_future()
        self.wait_for(future, deadline)
        return future

    def wait_for(self, future: asyncio.Future[Any], deadline: float) -> float:
        """Fail `future` at its deadline: this one, or the one that it has already. Return which."""
        known = self.waiting.get(future)
        if known is not None:
            return known
        self.waiting[future] = deadline
        if self._timer is None or deadline < self._due:
            self._set_timer(deadline)
        return deadline

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self.loop.call_later(max(0.0, due - time.monotonic()), self._expire)

    def deliver(self, replies: list[tuple[asyncio.Future[Any], Any]]) -> None:
        forget = self.waiting.pop
        for future, reply in replies:
            forget(future, None)
            if future.done():  # its caller was cancelled, or gave up waiting
                continue
            if isinstance(reply, BaseException):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    def _expire(self) -> None:
        """Fail those whose time is up. One timer serves all: it is set for whoever is first."""
        now = time.monotonic()
        for future, deadline in list(self.waiting.items()):
            if deadline > now:
                continue
            del self.waiting[future]
            if not future.done():
                future.set_exception(self._give_up())
        self._timer = None
        if self.waiting:
            self._set_timer(min(self.waiting.values()))


def set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def call(lane: Lane, function: Callable[..., None], argument: Any) -> None:
    """Call `function` on the lane's loop, from any thread."""
    try:
        lane.loop.call_soon_threadsafe(function, argument)
    except RuntimeError:  # the loop was closed; nobody waits there any more
        logger.debug("replies for a closed event loop were dropped")
