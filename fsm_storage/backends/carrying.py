"""Brings operations to the database in batches: on the event loop's own connection, or in a worker thread."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from fsm_storage import signals
from fsm_storage.backends.forks import at_work
from fsm_storage.backends.near import Near
from fsm_storage.backends.session import Session
from fsm_storage.batching import AGAIN, Batcher, Replies
from fsm_storage.dialects import LOCKED, Errand, Read, Scope, Write, WriteReply

Operation = Read | Write | Errand


class Carrier:
    """Carries out the operations of one storage; it refuses them after `shut()`.

    `scope` is what they have in common; `timeout`, `max_pending` and `batch_size` are the batchers'.
    """

    def __init__(
        self, session: Session, scope: Scope, *, timeout: float, max_pending: int, batch_size: int
    ) -> None:
        self._session, self._scope = session, scope
        self._telling = scope._replace(tells=True)
        self._near = Near(session.database, timeout)
        self._timeout, self._max_pending, self._batch_size = timeout, max_pending, batch_size
        self._reads: Batcher[Operation, Any] | None = None
        self._writes: Sequence[Batcher[Operation, Any]] = ()
        self._starting = threading.Lock()
        self.closed = False
        _carriers.add(self)

    def read(self, read: Read) -> Awaitable[Any]:
        return (self._reads or self._start()[0]).ask(read)

    def write(self, op: Write | Errand) -> Awaitable[Any]:
        """Carry out a write or an errand, in a batch with others of whichever kind."""
        writes = self._writes or self._start()[1]
        if type(op) is not Write:
            return writes[0].submit(op)
        # Those of one key meet in one queue, which keeps them apart; in two, they would wait for the row.
        return writes[hash(op.key) % len(writes)].ask(op)

    async def close(self) -> None:
        """Finish what was accepted, for `timeout` seconds at the most, and refuse what comes later."""
        deadline = time.monotonic() + self._timeout
        self._shut_all()
        await asyncio.gather(*(batcher.settle() for batcher in self._batchers))
        threads = self._shut_all()  # some may have been started meanwhile
        if threads:
            await asyncio.get_running_loop().run_in_executor(None, _join, threads, deadline)

    def shut(self) -> None:
        """Do what `close()` does, from synchronous code."""
        _join(self._shut_all(), time.monotonic() + self._timeout)

    def _shut_all(self) -> list[threading.Thread]:
        self.closed = True
        return [thread for batcher in self._batchers if (thread := batcher.shut())]

    @property
    def _batchers(self) -> Sequence[Batcher[Operation, Any]]:
        return list(dict.fromkeys(batcher for batcher in (self._reads, *self._writes) if batcher))

    def _start(self) -> tuple[Batcher[Operation, Any], Sequence[Batcher[Operation, Any]]]:
        """Make the batchers, at the first operation: settings are not read earlier."""
        with self._starting:
            if not self._writes or self._reads is None:
                dialect = self._session.dialect
                writes = [self._batcher(f"writes {number}") for number in range(dialect.writers)]
                self._reads = self._batcher("reads") if dialect.reads_apart else writes[0]
                self._writes = writes
                if self.closed:
                    self.shut()
            return self._reads, self._writes

    def _batcher(self, what: str) -> Batcher[Operation, Any]:
        return Batcher(
            self._work,
            key=_collision_key,
            release=self._release_worker,
            name=f"fsm_storage {self._scope.alias} {what}",
            timeout=self._timeout,
            max_pending=self._max_pending,
            batch_size=self._batch_size,
            first=Read,
            drive=None if self._session.dialect.drives is None else self._drive,
            after=self._open_near,
        )

    def carry_out(self, ops: Sequence[Any], deadline: float) -> Replies[Any]:
        """Answer operations of one kind, on the calling thread's connection."""
        kind, scope = type(ops[0]), self._scope_now
        if kind is Read:
            return self._session.read(ops, scope, deadline)
        if kind is not Write:
            return self._session.carry_out(ops, scope, deadline)
        return self._told(ops, self._session.write(ops, scope, deadline))

    def _work(self, ops: Sequence[Any], deadline: float) -> Replies[Any]:
        """Answer operations of one kind, on a worker thread."""
        at_work.join()
        self._near.is_held = type(ops[0]) is not Read
        try:
            return self.carry_out(ops, deadline)
        finally:
            self._near.is_held = False

    def _open_near(self) -> None:
        if self.closed:
            return
        self._near.open(self._session.dialect, self._session.guard, prepares=self._session.may_prepare)

    def _release_worker(self) -> None:
        try:
            self._near.close()
        finally:
            self._session.release()

    def _drive(self, ops: Sequence[Any], done: Callable[[Replies[Any] | None], None]) -> bool:
        """Begin to answer reads, or writes, on the event loop's thread; say whether that is so."""
        scope, dialect = self._scope_now, self._near.dialect
        if dialect is None:
            return False
        if type(ops[0]) is Read:
            return self._near.start(dialect.read(ops, scope), None, done)
        # Where one writes at a time, what writes waits behind the thread, or it would take the lock from it.
        if (dialect.write_begin and self._near.is_held) or not self._session.are_free(ops):
            return False

        def told(replies: Sequence[WriteReply] | None) -> None:
            done(None if replies is None else self._told(ops, replies))

        return self._near.start(dialect.write(ops, scope, free=True), dialect.write_begin, told)

    def _told(self, writes: Sequence[Write], replies: Sequence[WriteReply]) -> Replies[Any]:
        """Tell the live pages of writes; return the replies for the batcher."""
        signals.hint_of(self._scope.alias, writes, replies)
        if LOCKED not in replies:
            return replies
        return [AGAIN if reply is LOCKED else reply for reply in replies]

    @property
    def _scope_now(self) -> Scope:
        return self._telling if signals.is_heard() else self._scope


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _collision_key(op: Operation) -> Hashable | None:
    """Return what at most one operation of a batch may have; reads never collide."""
    kind = type(op)
    if kind is Write:
        return op.key
    return None if kind is Read else (kind, op.key)


_carriers: weakref.WeakSet[Carrier] = weakref.WeakSet()


def _start_anew() -> None:
    """In the child of a fork: the thread that held the lock is not there."""
    for carrier in list(_carriers):
        carrier._starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
