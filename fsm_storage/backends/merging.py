"""Atomic merges by compare-and-set, of one event loop: those that wait for one key go together.

Compare-and-set and not a merge within Redis, because the JSON decoder of its scripts rounds integers
beyond 2^53. Without the grouping, 64 merges of one key would need 64 rounds: one wins in each.

A merge does not read first. It guesses that Redis holds what was last seen there; a wrong guess is answered
with what it holds, as a read would be. So a guess can cost nothing but its bytes on the way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.backends.writing import DONE, Write
from fsm_storage.codec import WireCodec
from fsm_storage.dialects import Fence
from fsm_storage.exceptions import InvalidData, StorageTimeout
from fsm_storage.outbox import DATA, Record
from fsm_storage.patches import EMPTY

_LEAD: Final = object()
_FREE_TRIES = 4
"""A wrong guess costs one more round, and so does another process's write; only when that goes on, wait a little."""
_GUESSES = 4096
_LONGEST_GUESS = 2048
"""How many values are kept to guess from, of how many bytes each: 8 MiB at the most."""


class Merge(NamedTuple):
    """Lay `data` over what is in the Redis key `name`."""

    name: str
    key: StorageKey
    data: dict[str, Any]
    ttl_ms: int | None
    fence: Fence | None = None


_Waiter: TypeAlias = tuple[Merge, "asyncio.Future[Any]"]


class Store(Protocol):
    """Reads a key and carries out a write, by a deadline."""

    def read(self, name: str, deadline: float) -> Awaitable[Any]: ...

    def write(self, write: Write, deadline: float) -> Awaitable[Any]: ...


class Merger:
    """Carries out merges. Whoever comes first to a key leads: merges for all who came, and hands over."""

    def __init__(self, store: Store, codec: WireCodec, timeout: float) -> None:
        self._store, self._codec, self._timeout = store, codec, timeout
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._guesses: dict[str, bytes] = {}

    def saw(self, name: str, value: bytes | None) -> None:
        """Take note of what Redis holds under `name`, or held a moment ago."""
        guesses = self._guesses
        guesses.pop(name, None)
        if value is not None and len(value) <= _LONGEST_GUESS:
            guesses[name] = value  # as the newest
            if len(guesses) > _GUESSES:
                del guesses[next(iter(guesses))]

    async def merge(self, merge: Merge) -> dict[str, Any]:
        """Return all the data that is there afterwards. A cancelled merge happens whole or not at all."""
        deadline = time.monotonic() + self._timeout
        waiting = self._waiting.get(merge.name)
        if waiting is None:
            self._waiting[merge.name] = deque()
            return await self._lead(merge, deadline)
        turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting.append((merge, turn))
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                text = await turn
        except (asyncio.CancelledError, TimeoutError) as error:
            if turn.done() and not turn.cancelled() and turn.result() is _LEAD:
                self._hand_over(merge.name)
            turn.cancel()
            if isinstance(error, TimeoutError):
                raise StorageTimeout(self._timeout, "merges of the same data are waiting already") from error
            raise
        if text is _LEAD:
            return await self._lead(merge, deadline)
        return self._codec.decode(text, merge.name)

    async def _lead(self, merge: Merge, deadline: float) -> dict[str, Any]:
        group: list[_Waiter] = []
        try:
            text, data = await self._compare_and_set(merge, group, deadline)
        except BaseException:
            # The others try by themselves: it may have been this one's data, or its deadline.
            self._waiting[merge.name].extendleft(reversed(group))
            raise
        else:
            for _, turn in group:
                if not turn.done():
                    turn.set_result(text)
            return data
        finally:
            self._hand_over(merge.name)

    def _hand_over(self, name: str) -> None:
        """Make the next one lead, or forget the key."""
        waiting = self._waiting[name]
        while waiting:
            _, turn = waiting.popleft()
            if not turn.done():
                turn.set_result(_LEAD)
                return
        del self._waiting[name]

    async def _compare_and_set(
        self, merge: Merge, group: list[_Waiter], deadline: float
    ) -> tuple[str, dict[str, Any]]:
        """Merge `merge`, and those under the same lease who wait behind it, which are moved to `group`."""
        found, is_guess = self._guesses.get(merge.name), True
        failures = 0
        while True:
            waiting = self._waiting[merge.name]
            for waiter in [waiter for waiter in waiting if waiter[0].fence == merge.fence]:
                waiting.remove(waiter)
                group.append(waiter)
            group[:] = [waiter for waiter in group if not waiter[1].done()]
            try:
                text, data = self._fold(found, merge, group)
            except InvalidData:
                if is_guess:
                    found, is_guess = await self._store.read(merge.name, deadline), False
                    continue
                if not group:
                    raise
                # Together they are too much; which of them, shows when each goes alone.
                waiting.extendleft(reversed(group))
                group.clear()
                text, data = self._fold(found, merge, [])
            last = group[-1][0] if group else merge
            record = Record(merge.key, DATA, None if text == EMPTY else text, last.ttl_ms)
            reply = await self._store.write(Write(merge.name, record, found, merge.fence), deadline)
            if reply == DONE:
                self.saw(merge.name, None if text == EMPTY else text.encode())
                return text, data
            found, is_guess = reply, False
            failures += 1
            if failures > _FREE_TRIES:
                await self._pause(failures, deadline)

    def _fold(
        self, found: bytes | None, merge: Merge, group: Sequence[_Waiter]
    ) -> tuple[str, dict[str, Any]]:
        data = self._codec.decode_bytes(found, merge.name)
        data.update(merge.data)
        for other, _ in group:
            data.update(other.data)
        return self._codec.encode(data, merge.name, trusted=True), data

    async def _pause(self, failures: int, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise StorageTimeout(self._timeout, "other processes keep changing this data")
        await asyncio.sleep(random.uniform(0, min(0.001 * 2**failures, 0.05)))  # noqa: S311 - jitter
