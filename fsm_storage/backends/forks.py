"""What a fork must find at rest, and what its child must leave alone: SQLite, and the connections to a database.

SQLite works in this process, under locks of the whole process, also to allocate memory. A child that is forked
while another thread holds one has it for ever, and whatever it does with SQLite then never returns. And it takes
over what SQLite knows of files that are open: it does not lock them again, its parent's locks are not its own, and
the last other process to close the file deletes the log with the child's commits (https://sqlite.org/howtocorrupt.html,
2.6). So a fork waits until no thread of the storages is in SQLite, and all their connections to it are closed
before; they open new ones. Connections to servers stay open, and in the child nobody closes them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

from django.db.backends.base.base import BaseDatabaseWrapper

logger = logging.getLogger("fsm_storage")

PATIENCE = 1.5
"""Seconds that a fork waits for all threads. One that waits for a file's lock comes by once a second."""
_TURN = 0.02
"""Seconds for which it waits for one of them, before it looks for the others."""


class Closable(Protocol):
    """A connection that belongs to no thread."""

    def close(self) -> None: ...


class _Thread:
    """A thread that works with a database: the lock that it holds while it is in SQLite, and its connections."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wrappers: dict[str, Any] = {}


class _Work(threading.local):
    """The calling thread's side. `is_ours`: nobody else uses its connections, so they may be closed for a fork."""

    def __init__(self) -> None:
        self.is_ours = False
        self.thread = _Thread()
        self._lock: Any = self.thread.lock
        with _listing:
            _threads.add(self.thread)

    def guard(self) -> AbstractContextManager[Any]:
        """Return what the calling thread holds while it is in SQLite. It may do so twice."""
        # Or a thread that is always busy would take its lock again before the fork has it.
        if _is_waiting and not self._lock._is_owned():
            with _listing:
                pass
        return self._lock  # type: ignore[no-any-return]

    def join(self) -> None:
        """Make the calling thread one of ours, all its life."""
        self.is_ours = True

    def keep(self, wrapper: BaseDatabaseWrapper) -> None:
        """Know a connection of the calling thread, which is one of ours."""
        self.thread.wrappers[wrapper.alias] = wrapper


class _Fork:
    """A fork that is under way: which locks it holds, and of whom."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.threads: list[_Thread] = []
        self.is_safe = False


class _Forks(threading.local):
    """Those of the calling thread; a signal handler may fork while it is at one."""

    def __init__(self) -> None:
        self.under_way: list[_Fork] = []


_listing = threading.RLock()
_is_waiting = False
"""A fork does, and holds `_listing`."""
_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()
_apart: weakref.WeakSet[Closable] = weakref.WeakSet()
left_behind: list[Any] = []
"""A forked child must neither use its parent's connections nor close them."""
_forks = _Forks()
at_work = _Work()


def close_before_forks(connection: Closable) -> None:
    """Have `connection` closed before each fork, while no thread holds its guard."""
    with _listing:
        _apart.add(connection)


def _before() -> None:
    global _is_waiting
    fork = _Fork()
    _forks.under_way.append(fork)
    if not _take(fork, _listing, 2 * PATIENCE):  # another thread forks
        return
    _is_waiting = True
    fork.threads = list(_threads)
    waiting, deadline = list(fork.threads), time.monotonic() + PATIENCE
    while waiting and (left := deadline - time.monotonic()) > 0:
        waiting = [thread for thread in waiting if not _take(fork, thread.lock, min(_TURN, left))]
    if not waiting:
        fork.is_safe = True
        for connection in list(_apart):
            connection.close()
        for thread in fork.threads:
            _close_embedded(thread)


def _take(fork: _Fork, lock: Any, patience: float) -> bool:
    if not lock.acquire(timeout=patience):
        return False
    fork.taken.append(lock)
    return True


def _close_embedded(thread: _Thread) -> None:
    for wrapper in thread.wrappers.values():
        # Not its own `close()`, which asks in which thread that is, and whether there a loop runs.
        if wrapper.vendor == "sqlite" and wrapper.connection is not None and not wrapper.is_in_memory_db():
            connection, wrapper.connection = wrapper.connection, None
            with suppress(Exception):
                connection.close()


def _in_parent() -> None:
    fork = _go_on()
    if not fork.is_safe:
        logger.warning("a child was forked while a thread was in SQLite: it must not use SQLite")


def _in_child() -> None:
    """Only the thread that forked is there."""
    global _listing, _threads
    fork = _go_on()
    left_behind.append(fork.threads)
    _listing = threading.RLock()
    _threads = weakref.WeakSet([at_work.thread])


def _go_on() -> _Fork:
    global _is_waiting
    fork = _forks.under_way.pop()
    _is_waiting = any(other.taken for other in _forks.under_way)
    for lock in reversed(fork.taken):
        lock.release()
    return fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
