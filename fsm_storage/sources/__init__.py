"""What other storages left behind, read as plain values: a module for each kind of storage. Nothing is written.

Such a module has `read(url, layout, clock)`, which yields `Found`; `clock` tells the time by which what is
relative to now becomes absolute. Add the scheme of its URLs to `SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import import_module
from typing import NoReturn

from fsm_storage.exceptions import FSMStorageError
from fsm_storage.sources.layout import KeyLayout
from fsm_storage.transfer import Found

SCHEMES = {
    "redis": "fsm_storage.sources.redis",
    "rediss": "fsm_storage.sources.redis",
    "unix": "fsm_storage.sources.redis",
    "sqlite": "fsm_storage.sources.sqlite",
    "mongodb": "fsm_storage.sources.mongodb",
    "mongodb+srv": "fsm_storage.sources.mongodb",
}


class SourceError(FSMStorageError):
    """A source cannot be opened, or broke down while it was read; the message says which and why."""


def read_source(url: str, layout: KeyLayout, clock: Callable[[], datetime]) -> Iterator[Found]:
    """Yield the conversations at `url`. Raises `SourceError`, also later on."""
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES:
        raise SourceError(f"{scheme!r} is no source; known are {', '.join(SCHEMES)}")
    try:
        module = import_module(SCHEMES[scheme])
    except ImportError as error:
        raise SourceError(
            f"reading {scheme} needs the package {error.name}: pip install {error.name}"
        ) from error
    found: Iterator[Found] = module.read(url, layout, clock)
    return found


def broken(url: str, error: Exception) -> NoReturn:
    """Raise the `SourceError` for an error of a driver, without the password that a URL may have."""
    place = url.rpartition("@")[2] if "@" in url else url.partition("://")[2] or url
    raise SourceError(f"reading {place} failed: {type(error).__name__}: {str(error).strip()}") from error
