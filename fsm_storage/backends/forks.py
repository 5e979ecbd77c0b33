"""What a fork must find at rest, and what its child must leave alone: the database's library and its connections.

SQLite takes locks of the whole process, also to allocate memory. A child that is forked while another thread holds
one has it for ever, and whatever it does with SQLite then never returns.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

PATIENCE = 0.25
"""Seconds that a fork waits. Who takes longer waits itself, for a server or for a file's lock, and holds nothing."""


class _Work(threading.local):
    """The calling thread's own `lock`, which it holds while it is in the database's library."""

    def __init__(self) -> None:
        with _listing:
            self.lock = threading.RLock()
            _locks.add(self.lock)


class _Fork(threading.local):
    """What the calling thread holds while it forks."""

    taken: tuple[Any, ...] = ()


_listing = threading.RLock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_fork = _Fork()
_kept: dict[tuple[int, str], Any] = {}
_left_behind: list[Any] = []
at_work = _Work()


def keep(database: str, connection: Any) -> None:
    """Hold what the calling thread has opened: a child, in which the thread is not, would close it."""
    _kept[threading.get_ident(), database] = connection


def let_go(database: str) -> None:
    """Hold it no longer, before the calling thread closes it."""
    _kept.pop((threading.get_ident(), database), None)


def _wait() -> None:
    deadline = time.monotonic() + PATIENCE
    _fork.taken = ()
    if _listing.acquire(timeout=PATIENCE):  # else another thread forks
        _fork.taken = (_listing,)
        for lock in list(_locks):
            if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                _fork.taken += (lock,)


def _go_on() -> None:
    taken, _fork.taken = _fork.taken, ()
    for lock in reversed(taken):
        lock.release()


def _start_anew() -> None:
    """In the child: only the thread that forked is there."""
    global _kept, _listing
    if not _fork.taken:
        _listing = threading.RLock()
    _go_on()
    _left_behind.append(_kept)
    _kept = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait, after_in_parent=_go_on, after_in_child=_start_anew)
