"""Which handler is for which expiry. Needs no database, so that a bot's modules can be imported early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from aiogram.dispatcher.event.handler import CallableObject
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey

from fsm_storage.dialects import Spared

Part = Literal["state", "data"]
StateFilter = State | str | type[StatesGroup]
Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Expired:
    """A conversation as it was when its state, or its data, expired.

    `part` is what expired, `at` when. `data` is what was there: for the state's handler also if it
    expired together with the state, up to a minute before. `attempt` is 1 for the first.
    """

    alias: str
    key: StorageKey
    record_key: str
    part: Part
    state: str | None
    data: dict[str, Any]
    at: datetime
    attempt: int = 1


class Handlers:
    """Handlers, in the order in which they were registered. The first that fits is called."""

    def __init__(self) -> None:
        self._registered: list[tuple[frozenset[str] | None, CallableObject]] = []
        self._for_data: CallableObject | None = None

    def handler(self, *states: StateFilter) -> Callable[[Handler], Handler]:
        """Register the decorated function: see `register`."""

        def decorate(callback: Handler) -> Handler:
            self.register(callback, *states)
            return callback

        return decorate

    def register(self, callback: Callable[..., Any], *states: StateFilter) -> None:
        """Call `callback` when one of `states`, or a state of these groups, expires; without any, whichever.

        It gets an `Expired` and, by name, what aiogram's handlers get.
        """
        self._registered.append((_names(states), CallableObject(callback)))

    def data_handler(self) -> Callable[[Handler], Handler]:
        """Register the decorated function for data that expires, whatever the state. There can be one."""

        def decorate(callback: Handler) -> Handler:
            if self._for_data is not None:
                raise ValueError("there is a handler for expired data already")
            self._for_data = CallableObject(callback)
            return callback

        return decorate

    def find(self, part: Part, state: str | None) -> CallableObject | None:
        """Return the handler for an expiry."""
        if part == "data":
            return self._for_data
        for names, callback in self._registered:
            if names is None or state in names:
                return callback
        return None

    def spared(self) -> Spared:
        """Return what a sweep has to leave to these handlers."""
        names: set[str] = set()
        for some, _ in self._registered:
            if some is None:
                return Spared(None, self._for_data is not None)
            names |= some
        return Spared(tuple(sorted(names)), self._for_data is not None)


def _names(states: tuple[StateFilter, ...]) -> frozenset[str] | None:
    """Return the texts of states, None for every state. Raises `TypeError` for what is no state."""
    names: set[str] = set()
    for state in states:
        if isinstance(state, type) and issubclass(state, StatesGroup):
            names.update(state.__all_states_names__)
            continue
        name = state.state if isinstance(state, State) else state
        if not isinstance(name, str):
            raise TypeError(f"an expiry handler is for states and groups of states, not for {state!r}")
        if name == "*":
            return None
        names.add(name)
    return frozenset(names) if states else None
