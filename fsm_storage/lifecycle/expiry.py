"""`Expiry`: handlers for conversations whose time is up, and when they run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aiogram import Bot, Dispatcher
from aiogram.dispatcher.event.handler import HandlerObject

from fsm_storage.exceptions import InvalidStorageError
from fsm_storage.lifecycle.handlers import Expired, Handlers

if TYPE_CHECKING:
    from fsm_storage.backends.django import DjangoStorage

__all__ = ["Expired", "Expiry"]


class Expiry(Handlers):
    """Calls handlers when a state, or data, has expired.

        expiry = Expiry()

        @expiry.handler(Order.payment)
        async def remind(expired: Expired, bot: Bot, state: FSMContext) -> None: ...

        expiry.setup(dispatcher)

    At least once for each expiry, in any number of processes, also if one is killed; never for a record
    that was written again before. A handler that raises is called again with back-off, `attempts`
    times in all; then its error is logged and the part is cleared. What a handler leaves expired
    is cleared after it.

    - `concurrency`: handlers at a time, in each process.
    - `attempts`: how often a handler is called that raises.
    - `timeout`: seconds that a handler may take; longer counts as an error.
    - `interval`: seconds between two looks at the database at the most. A look comes sooner where the
      next expiry is known.
    """

    def __init__(
        self, *, concurrency: int = 20, attempts: int = 5, timeout: float = 300.0, interval: float = 10.0
    ) -> None:
        super().__init__()
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        for name, seconds in (("timeout", timeout), ("interval", interval)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
                raise ValueError(f"{name} must be seconds above 0, not {seconds!r}")
        self.concurrency, self.attempts, self.timeout, self.interval = (
            concurrency,
            attempts,
            timeout,
            interval,
        )
        self._running: asyncio.Task[None] | None = None

    def setup(self, dispatcher: Dispatcher) -> None:
        """Run from the dispatcher's startup to its shutdown, for the bots that it starts with.

        Raises `InvalidStorageError` if the dispatcher's storage does not name this object as its `expiry`:
        then a sweep elsewhere would clear what the handlers are for.
        """
        _check(dispatcher.storage, self)
        dispatcher.startup.register(self._start)
        # First of all: aiogram's own, which closes the storage, was registered when the dispatcher was made.
        dispatcher.shutdown.handlers.insert(0, HandlerObject(self._stop))

    async def run(self, storage: DjangoStorage, bots: Iterable[Bot], **workflow: Any) -> None:
        """Call the handlers of these bots' conversations, and sweep the rest, until cancelled.

        When it is cancelled, handlers that are at work get five seconds to finish. One that does not
        is cancelled, and is called again later.
        """
        from fsm_storage.lifecycle.runner import Runner

        _check(storage, self)
        await Runner(self, storage, bots, workflow).run()

    async def _start(
        self, dispatcher: Dispatcher, bot: Bot | None = None, bots: Iterable[Bot] = (), **workflow: Any
    ) -> None:
        found = list(bots) or ([] if bot is None else [bot])
        workflow = {**dispatcher.workflow_data, **workflow, "dispatcher": dispatcher}
        workflow.pop("router", None)
        storage: Any = dispatcher.storage
        self._running = asyncio.create_task(self.run(storage, found, **workflow), name="fsm_storage expiry")

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.wait([running])


def _check(storage: Any, expiry: Expiry) -> None:
    if getattr(storage, "expiry", None) is not expiry:
        raise InvalidStorageError(
            f"{type(storage).__name__} does not know these expiry handlers, so a sweep would clear what they are "
            "for: name them in its option `expiry`, for example OPTIONS = {'expiry': 'shop.expiry.expiry'}"
        )
