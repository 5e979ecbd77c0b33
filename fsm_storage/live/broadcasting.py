"""Hints of this process on their way to the channel layer. Knows no websocket."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from channels.layers import InMemoryChannelLayer, get_channel_layer

from fsm_storage.live import EVERY, GROUP

logger = logging.getLogger("fsm_storage")

MAX_RECORDS = 500
"""In one message, about 40 kB. When more have changed, it says only that."""
TIMEOUT = 5.0
LONGEST_PAUSE = 30.0
EXIT_SECONDS = 2.0
"""For which the end of a process waits for what it has not sent yet."""


class Broadcaster:
    """Sends hints to a channel layer, at most once in `EVERY` seconds, from a thread of its own.

    Whoever writes only takes a note, so a layer that is slow or down holds nobody up. What could not be
    sent is sent later as "much has changed", and never grows. After a fork, the child begins anew.
    """

    def __init__(self) -> None:
        self.home: asyncio.AbstractEventLoop | None = None
        """A loop in which websockets are served: a layer in memory works in no other."""
        self._begin()

    def _begin(self) -> None:
        self._news = threading.Condition()
        self._records: dict[tuple[str, str], int | None] = {}
        self._more = False
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def start_anew(self) -> None:
        """In the child of a fork: it has neither the thread nor the loop."""
        self.home = None
        self._begin()

    def hint(self, alias: str, written: Sequence[tuple[str, int | None]]) -> None:
        """Take a note of what was written. Returns at once."""
        with self._news:
            if not self._more:
                self._records.update({(alias, key): version for key, version in written})
                if len(self._records) > MAX_RECORDS:
                    self._forget()
            if self._thread is None and not self._ends.is_set():
                self._thread = threading.Thread(target=self._work, name="fsm_storage live", daemon=True)
                self._thread.start()
            self._news.notify()

    def finish(self, timeout: float = EXIT_SECONDS) -> None:
        """Send what is left, for `timeout` seconds at the most, and stop."""
        with self._news:
            self._ends.set()
            self._news.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _forget(self) -> None:
        self._records.clear()
        self._more = True

    def _work(self) -> None:
        pause = EVERY
        with asyncio.Runner(loop_factory=_Loop) as runner:
            while message := self._next():
                try:
                    self._send(runner, message)
                    pause = EVERY
                except Exception as error:
                    if pause == EVERY:  # once for each time that it is down
                        logger.warning("live pages are not told: %s: %s", type(error).__name__, error)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    with self._news:
                        self._forget()
                    if self._ends.is_set():
                        return
                self._ends.wait(pause)

    def _next(self) -> dict[str, Any] | None:
        """Wait for something to send; None: it is the end."""
        with self._news:
            self._news.wait_for(lambda: self._records or self._more or self._ends.is_set())
            if not self._records and not self._more:
                return None
            records = [[alias, key, version] for (alias, key), version in self._records.items()]
            message = {"type": "hint", "records": records, "more": self._more}
            self._records.clear()
            self._more = False
            return message

    def _send(self, runner: asyncio.Runner, message: dict[str, Any]) -> None:
        layer, home = get_channel_layer(), self.home
        if layer is None:
            return
        if home is not None and home.is_running():
            sending = asyncio.run_coroutine_threadsafe(layer.group_send(GROUP, message), home)
            try:
                sending.result(TIMEOUT)
            finally:
                sending.cancel()
        elif not isinstance(layer, InMemoryChannelLayer):  # else nobody in this process looks
            runner.run(asyncio.wait_for(layer.group_send(GROUP, message), TIMEOUT))


class _Loop(asyncio.SelectorEventLoop):
    """A loop that needs no other thread: none starts once the interpreter is ending.

    A loop resolves host names in its pool, and a command's only hint may come at its very end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_default_executor(_Here())

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as in asyncio
        """Nothing to wait for. asyncio would in a thread, which Python 3.12 refuses to start."""


class _Here(ThreadPoolExecutor):
    """Does the work in the calling thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


broadcaster = Broadcaster()
atexit.register(broadcaster.finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=broadcaster.start_anew)
