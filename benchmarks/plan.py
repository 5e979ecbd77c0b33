"""Which cells a run has, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.contenders import (
    ANSWERING_NAMES,
    DISPATCHER_NAMES,
    HANDLER_NAMES,
    LOCK_NAMES,
    QUICK_DISPATCHER_NAMES,
    QUICK_NAMES,
)

Kind = Literal["migrate", "handler", "dispatcher", "answering", "statement", "lock", "shared-lock"]

WARM_UP_SECONDS = 0.3
"""How long a cell works before it is measured."""

_CHATS = (1, 64, 512)
_QUICK_CHATS = (1, 64)
_DISPATCHER_CHATS = 64
_DISPATCHER_TIMES = 4
"""So many times as long as the others: its filters run in threads, and its figures swing more."""
_LOCK_CHATS = 64
_STATEMENT_NAMES = ("ours-postgres-off", "ours-postgres-states")


@dataclass(frozen=True)
class Cell:
    """One measurement: a contender at work for so many chats and seconds."""

    kind: Kind
    contender: str
    chats: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind} {self.contender} C={self.chats}"


def cells_of_a_round(*, quick: bool, seconds: float, only: Sequence[str]) -> list[Cell]:
    """Return the cells of one round; every round has the same, so contenders take turns.

    With `only`, those whose name ("handler redis C=64") has one of its texts in it.
    """
    chats = _QUICK_CHATS if quick else _CHATS
    names = QUICK_NAMES if quick else HANDLER_NAMES
    cells = [Cell("handler", name, count, seconds) for count in chats for name in names]
    cells += [Cell("statement", name, 1, seconds) for name in _STATEMENT_NAMES]
    dispatchers = QUICK_DISPATCHER_NAMES if quick else DISPATCHER_NAMES
    answering = [] if quick else ANSWERING_NAMES
    long = seconds * _DISPATCHER_TIMES
    cells += [Cell("dispatcher", name, _DISPATCHER_CHATS, long) for name in dispatchers]
    cells += [Cell("answering", name, _DISPATCHER_CHATS, long) for name in answering]
    locks: tuple[Kind, ...] = ("lock",) if quick else ("lock", "shared-lock")
    cells += [Cell(kind, name, _LOCK_CHATS, seconds) for kind in locks for name in LOCK_NAMES]
    return [cell for cell in cells if not only or any(text in str(cell) for text in only)]
