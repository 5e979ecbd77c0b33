"""Where leases are kept, as tests see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from fsm_storage import DjangoEventIsolation
from tests.rows import in_thread

Isolate = Callable[..., DjangoEventIsolation]


class Worker(Protocol):
    """A process that a test has started."""

    pid: int

    def wait(self) -> int:
        """Wait for its end and return its exit status."""

    def kill(self) -> None: ...


class Place(Protocol):
    """Where leases are kept, and how a test gets at them."""

    turns: float
    """Seconds in which two processes with eight tasks each have all had a turn."""
    lease: float
    """Seconds for which a process may stand still on a busy machine."""

    def leases(self) -> list[str]:
        """The keys that are held."""

    def take_away(self) -> None:
        """Let nobody hold anything."""

    def give_away(self) -> None:
        """Let somebody else hold what is held."""

    def start(self, writer: str, notes: Path, *arguments: Any) -> Worker:
        """Start one of the writers of this place in a process of its own."""


async def none_left(isolation: DjangoEventIsolation, place: Place) -> None:
    """The leases go a moment after the lock was left."""
    _, lines = isolation._open()
    assert lines._lines == {}
    # What was cancelled on its way may be granted yet, before it is given back: an empty table says nothing.
    async with asyncio.timeout(20):
        while any(lines.keeper._on_the_way.values()):
            await asyncio.sleep(0.01)
    await all_given_back(place)
    assert lines.keeper.count == 0


async def all_given_back(place: Place) -> None:
    for _ in range(1000):
        if not await in_thread(place.leases):
            break
        await asyncio.sleep(0.02)
    assert await in_thread(place.leases) == []


async def noted(notes: Path, words: str) -> None:
    """Wait until a process has noted this."""
    async with asyncio.timeout(60):
        while not notes.exists() or words not in notes.read_text():
            await asyncio.sleep(0.01)


def overlaps(place: Place, notes: Path, seconds: float, *owner: str) -> int:
    """Let two processes with eight tasks each take turns; count those that began before another had ended."""
    workers = [place.start("take_turns", notes, who, seconds, 8, *owner) for who in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    lines = [line.split() for line in notes.read_text().splitlines() if not line.startswith("ready")]
    assert {(who, task) for _, _, who, task in lines} == {(who, str(n)) for who in "ab" for n in range(8)}
    turns = sorted((int(began), int(ended)) for began, ended, _, _ in lines)
    assert len(turns) > 20
    return sum(later[0] < earlier[1] for earlier, later in pairwise(turns))
