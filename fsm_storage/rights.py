"""Who may see and do what: the permissions, `FSM_ADMIN`, and the mask over data. No database, no HTML.

One place for the admin's pages, its exports and live events alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

HIDDEN = "•••"
DEFAULTS: dict[str, Any] = {"MASK": ["*"], "READ_ONLY": False, "NAMES": None, "LIVE": "/ws/fsm_storage/"}

Path = tuple[str, ...]
Hides = Callable[[Path], bool]


class InvalidAdminError(ImproperlyConfigured):
    """`FSM_ADMIN` is wrong; the message names the key and the value."""


class Rights(NamedTuple):
    """What a user may do with conversations. Nothing goes without `view`; read-only takes all changing away."""

    view: bool = False
    view_data: bool = False
    change_state: bool = False
    change_data: bool = False
    bulk: bool = False
    export: bool = False
    delete: bool = False

    @property
    def change(self) -> bool:
        return self.change_state or self.change_data


def rights_of(user: Any) -> Rights:
    """Return the rights of a user. Changing data needs `view_data` too: nobody edits what they cannot see."""

    def may(action: str) -> bool:
        return bool(user.has_perm(f"fsm_storage.{action}_fsmrecord"))

    if not may("view"):
        return Rights()
    view_data, writes = may("view_data"), not option("READ_ONLY")
    return Rights(
        view=True,
        view_data=view_data,
        change_state=writes and may("change_state"),
        change_data=writes and view_data and may("change_data"),
        bulk=writes and may("bulk"),
        export=may("export"),
        delete=writes and may("delete"),
    )


class Mask:
    """What a user does not see of the data. Keys stay, the values under hidden ones become `HIDDEN`."""

    def __init__(self, hides: Hides | None = None) -> None:
        self._hides = hides

    def __bool__(self) -> bool:
        return self._hides is not None

    def over(self, data: Any) -> Any:
        """Return `data` as the user may see it. What is no object, or nested too deep, is hidden as a whole."""
        if self._hides is None:
            return data
        if not isinstance(data, dict):
            return HIDDEN
        try:
            return self._over(data, (), self._hides)
        except RecursionError:
            return HIDDEN

    def hides(self, path: Sequence[str]) -> bool:
        """Say whether the value at `path`, or one that it lies in, is hidden.

        A digit may be a place in a list, which no rule names, or a key: hidden if it is in one of the two.
        """
        if self._hides is None:
            return False
        readings = (tuple(path), tuple(key for key in path if not key.lstrip("-").isdigit()))
        return any(
            self._hides(reading[:length]) for reading in readings for length in range(1, len(reading) + 1)
        )

    def _over(self, value: Any, path: Path, hides: Hides) -> Any:
        if path and hides(path):
            return HIDDEN
        if isinstance(value, dict):
            seen = {}
            for key, inner in value.items():
                seen[key] = self._over(inner, (*path, key), hides)
            return seen
        if isinstance(value, list):
            items = []
            for item in value:
                items.append(self._over(item, path, hides))  # noqa: PERF401 - a frame less for each level
            return items
        return value


def mask_for(user: Any) -> Mask:
    """Return the mask through which a user sees data: none for those with `view_data`."""
    return Mask() if rights_of(user).view_data else Mask(_rule(option("MASK")))


def option(name: str) -> Any:
    """Return one of `FSM_ADMIN`. Raises `InvalidAdminError`."""
    given = getattr(settings, "FSM_ADMIN", {})
    if not isinstance(given, Mapping):
        raise InvalidAdminError(f"FSM_ADMIN must be a dict, not {given!r}")
    return given.get(name, DEFAULTS[name])


def check_options() -> None:
    """Raise `InvalidAdminError` for the first thing that is wrong with `FSM_ADMIN`."""
    option("MASK")
    unknown = sorted(set(getattr(settings, "FSM_ADMIN", {})) - set(DEFAULTS), key=str)
    if unknown:
        raise InvalidAdminError(f"FSM_ADMIN has {unknown[0]!r}; it takes {', '.join(map(repr, DEFAULTS))}")
    if not isinstance(option("READ_ONLY"), bool):
        raise InvalidAdminError(f"FSM_ADMIN['READ_ONLY'] must be True or False, not {option('READ_ONLY')!r}")
    _rule(option("MASK"))
    _check_names(option("NAMES"))
    live = option("LIVE")
    if live is not False and not (isinstance(live, str) and live.startswith("/")):
        raise InvalidAdminError(
            f"FSM_ADMIN['LIVE'] must be the path of the websocket, like {DEFAULTS['LIVE']!r}, or False, not {live!r}"
        )


def _check_names(names: Any) -> None:
    try:
        found = import_string(names) if isinstance(names, str) else names
    except ImportError as error:
        raise InvalidAdminError(f"FSM_ADMIN['NAMES'] {names!r} cannot be imported: {error}") from error
    if found is not None and found is not False and not callable(found):
        raise InvalidAdminError(
            f"FSM_ADMIN['NAMES'] must be a function of ids, its dotted path, None or False, not {names!r}"
        )


def _rule(mask: Any) -> Hides:
    """Return what `MASK` means: a function of a path, or patterns, without a dot for a key at any depth."""
    if isinstance(mask, str):
        try:
            mask = import_string(mask)
        except ImportError as error:
            raise InvalidAdminError(
                f"FSM_ADMIN['MASK'] {mask!r} cannot be imported: {error}; a single pattern goes into a list"
            ) from error
    if callable(mask):
        return mask  # type: ignore[no-any-return]
    if not isinstance(mask, list | tuple) or not all(isinstance(pattern, str) for pattern in mask):
        raise InvalidAdminError(
            f"FSM_ADMIN['MASK'] must be a list of patterns, or a function or its dotted path, not {mask!r}"
        )
    return lambda path: _fits(path, mask)


def _fits(path: Path, patterns: Iterable[str]) -> bool:
    whole, last = ".".join(path).casefold(), path[-1].casefold()
    return any(
        fnmatchcase(whole if "." in pattern else last, pattern)
        for pattern in (pattern.casefold() for pattern in patterns)
    )
