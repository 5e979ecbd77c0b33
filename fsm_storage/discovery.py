"""Finds the states that a project declares: the groups in each installed app's `states.py`. No database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from aiogram.fsm.state import State, StatesGroup
from django.apps import apps
from django.core.signals import setting_changed
from django.utils.module_loading import autodiscover_modules

MODULE = "states"
_ANY = "*"


class DeclaredGroup(NamedTuple):
    """A group and its own states; those of a nested group are under the nested group's full name."""

    name: str
    states: tuple[str, ...]


class Catalog:
    """The declared states, in the order of declaration."""

    def __init__(self, groups: tuple[DeclaredGroup, ...]) -> None:
        self.groups = groups
        self._names = frozenset(name for group in groups for name in group.states)

    def __contains__(self, state: str) -> bool:
        return state in self._names

    @property
    def states(self) -> list[str]:
        return [name for group in self.groups for name in group.states]

    def within(self, group: str) -> list[str]:
        """Return the states of the group with this full name and of the groups nested in it."""
        return [name for name in self.states if is_within(group, name)]


@cache
def declared_states() -> Catalog:
    """Return what the installed apps declare. The first call imports every app's `states.py`.

    An error in such a module comes through, as one in an `admin.py` does.
    """
    autodiscover_modules(MODULE)
    states: dict[str, list[str]] = {}
    for group, name in _walk():
        names = states.setdefault(group, [])
        if name not in names:
            names.append(name)
    return Catalog(tuple(DeclaredGroup(group, tuple(names)) for group, names in states.items()))


def group_of(state: str) -> str:
    """Return the full name of a state's group, "" if its name has none."""
    return state.rpartition(":")[0]


def is_within(group: str, state: str) -> bool:
    """Say whether a state is of this group or of one nested in it; in the group "" are those without one."""
    found = group_of(state)
    return found == group or (bool(group) and found.startswith(f"{group}."))


def _walk() -> Iterator[tuple[str, str]]:
    seen: set[type[StatesGroup]] = set()
    for config in apps.get_app_configs():
        module = sys.modules.get(f"{config.name}.{MODULE}")
        for value in list(vars(module).values()) if module else []:
            if isinstance(value, type) and issubclass(value, StatesGroup):
                yield from _states_of(value.get_root(), seen)
            elif isinstance(value, State) and value.state and value.state != _ANY:
                yield group_of(value.state), value.state


def _states_of(group: type[StatesGroup], seen: set[type[StatesGroup]]) -> Iterator[tuple[str, str]]:
    """Yield a group's states, then those of the groups nested in it.

    Names are asked of each state: aiogram computes `__all_states_names__` when a class is made,
    before the class around it is, so two levels down they lack the outermost name.
    """
    if group in seen:
        return
    seen.add(group)
    for state in group.__states__:
        if state.state and state.state != _ANY:
            yield group_of(state.state), state.state
    for child in group.__childs__:
        yield from _states_of(child, seen)


def _settings_changed(*, setting: str, **_: object) -> None:
    if setting == "INSTALLED_APPS":
        declared_states.cache_clear()


setting_changed.connect(_settings_changed, dispatch_uid="fsm_storage.discovery")
