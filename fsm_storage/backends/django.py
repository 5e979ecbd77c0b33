"""`DjangoStorage`: aiogram's storage on a Django database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast

from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage, KeyBuilder, StateType, StorageKey
from asgiref.sync import sync_to_async
from django.core.checks import CheckMessage

from fsm_storage import signals
from fsm_storage.backends.arguments import Handlers, Identified, TtlOption, actor_name, edit_ttl, own_ttl
from fsm_storage.backends.carrying import Carrier, Operation
from fsm_storage.backends.fencing import HOLD
from fsm_storage.backends.moving import MovesChats
from fsm_storage.backends.options import check_options, checked_options, loaded
from fsm_storage.backends.session import Session
from fsm_storage.codec import Codec, Dumps, Loads
from fsm_storage.dialects import (
    NOTHING_SPARED,
    AsOf,
    Cause,
    Errand,
    History,
    Read,
    Scope,
    Write,
    WriteReply,
    Written,
)
from fsm_storage.exceptions import StorageClosed
from fsm_storage.keys import record_key, state_text
from fsm_storage.patches import EMPTY, KEEP, Keep, Patch, Ttl, ttl_seconds
from fsm_storage.signals import News

T = TypeVar("T")
R = TypeVar("R", bound=Identified)


class DjangoStorage(MovesChats, BaseStorage):
    """Keeps the conversations of a bot in the tables of a Django project.

    What it promises: when the await of a write returns, the database has committed it.
    `update_data` is atomic over all processes. A read sees every write that finished before it
    began. Concurrent operations share transactions. One object serves any number of threads and
    event loops, also after a fork.

    - `alias`: part of each record's identity; two storages with different aliases share nothing.
    - `database`: an alias of `DATABASES`; SQLite, PostgreSQL, MariaDB or MySQL.
    - `key_builder`: an aiogram `KeyBuilder`, or its dotted path; by default every part of the key counts.
    - `state_ttl`, `data_ttl`: seconds or timedelta; each write of a part restarts its time. None: for ever.
    - `json_loads`, `json_dumps`: functions, or their dotted paths.
    - `history`: "off", "states" (each real change of state becomes an `FSMTransition`), or "full"
      (each change of state or data, with the data before and after).
    - `timeout`: seconds that an operation may wait, retries included.
    - `max_pending`: operations that may wait at a time; past them, callers wait for room.
    - `batch_size`: operations in one transaction at the most.
    - `in_transaction`: for tests: run each operation on the connection of the thread that Django's
      `TestCase` uses, inside its transaction.
    - `expiry`: an `Expiry`, or its dotted path: the sweep leaves to it what it has handlers for.

    Operations raise `StorageTimeout`, `StorageUnavailable`, `StorageClosed`; errors of the caller
    derive from `ValueError` and `TypeError` and name the key. A cancelled caller stops waiting;
    its write happens whole or not at all.
    """

    def __init__(
        self,
        alias: str = "default",
        *,
        database: str = "default",
        key_builder: KeyBuilder | str | None = None,
        state_ttl: TtlOption = None,
        data_ttl: TtlOption = None,
        json_loads: Loads | str | None = None,
        json_dumps: Dumps | str | None = None,
        history: History = "states",
        timeout: float = 5.0,
        max_pending: int = 10_000,
        batch_size: int = 256,
        in_transaction: bool = False,
        expiry: Handlers | str | None = None,
    ) -> None:
        checked_options(
            alias,
            {
                "database": database, "key_builder": key_builder, "state_ttl": state_ttl, "data_ttl": data_ttl,
                "json_loads": json_loads, "json_dumps": json_dumps, "history": history,
                "timeout": timeout, "max_pending": max_pending, "batch_size": batch_size,
                "in_transaction": in_transaction, "expiry": expiry,
            },
        )  # fmt: skip
        self.alias, self.database, self.in_transaction = alias, database, in_transaction
        self._key_builder: KeyBuilder | None = loaded(key_builder, called=True)
        self.codec = Codec(loaded(json_loads), loaded(json_dumps))
        self._state_ttl, self._data_ttl = Ttl(ttl_seconds(state_ttl)), Ttl(ttl_seconds(data_ttl))
        self._scope = Scope(alias, history, self.codec)
        self._session, self.timeout = Session(database, timeout), timeout
        self._carrier = Carrier(
            self._session, self._scope, timeout=timeout, max_pending=max_pending, batch_size=batch_size
        )
        self._expiry = expiry
        self.sender: type[BaseStorage] = type(self)

    @classmethod
    def check(cls, alias: str, options: Mapping[str, Any]) -> list[CheckMessage]:
        """System checks of the `OPTIONS` of one alias."""
        return check_options(cls, alias, options)

    async def set_state(self, key: StorageKey, state: StateType = None, ttl: TtlOption | Keep = KEEP) -> None:
        """Set the state. `ttl`: how long this state lives, in place of the storage's `state_ttl`; None: for ever.

        A wrong `ttl` raises `InvalidTtl` or `InvalidTtlType`, and nothing is written.
        """
        text = self.key_text(key)
        rule = self._state_ttl if ttl is KEEP else own_ttl(ttl, text)
        await self._write(Write(text, key, Patch(state_text(state, text)), rule, self._data_ttl))

    async def get_state(self, key: StorageKey) -> str | None:
        return cast("str | None", await self._read(Read(self.key_text(key))))

    async def set_data(self, key: StorageKey, data: Mapping[str, Any], ttl: TtlOption | Keep = KEEP) -> None:
        """Replace the data. `ttl`: how long it lives, in place of the storage's `data_ttl`; None: for ever."""
        text = self.key_text(key)
        rule = self._data_ttl if ttl is KEEP else own_ttl(ttl, text)
        patch = Patch(data=self.codec.encode(data, text))
        await self._write(Write(text, key, patch, self._state_ttl, rule))

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        text = self.key_text(key)
        return self.codec.decode(cast(str, await self._read(Read(text, data=True))), text)

    async def get_value(
        self, storage_key: StorageKey, dict_key: str, default: Any | None = None
    ) -> Any | None:
        data = await self.get_data(storage_key)
        return data.get(dict_key, default)

    async def update_data(
        self, key: StorageKey, data: Mapping[str, Any], ttl: TtlOption | Keep = KEEP
    ) -> dict[str, Any]:
        """Lay `data` over what is there, key by key, atomically over all processes; return all of it.

        `ttl`: how long the whole data lives from now, in place of the storage's `data_ttl`; None: for ever.
        """
        text = self.key_text(key)
        rule = self._data_ttl if ttl is KEEP else own_ttl(ttl, text)
        patch = Patch(merge=(self.codec.encode(data, text),))
        written: Written = await self._write(Write(text, key, patch, self._state_ttl, rule))
        return written.merged if written.merged is not None else self.codec.decode(written.text or "", text)

    @property
    def closed(self) -> bool:
        return self._carrier.closed

    async def close(self) -> None:
        """Finish what was accepted, for `timeout` seconds at the most, and refuse what comes later."""
        await self._carrier.close()

    def shut(self) -> None:
        """Do what `close()` does, from synchronous code. What a running loop has open is closed in its next turn."""
        self._carrier.shut()

    def edit(
        self,
        records: Sequence[Identified],
        *,
        state: StateType | Keep = KEEP,
        data: Mapping[str, Any] | Keep = KEEP,
        state_ttl: TtlOption | Keep = KEEP,
        data_ttl: TtlOption | Keep = KEEP,
        if_versions: Sequence[int] | None = None,
        by: Any = None,
        source: str = "admin",
    ) -> int:
        """Change records from synchronous code, in one transaction; return how many were written.

        See `FSMRecord.edit`, which is how to call it. All are changed or, when it raises, none.
        """
        patches = [
            Patch(
                KEEP if state is KEEP else state_text(state, record.key),
                KEEP if data is KEEP else self.codec.encode(data, record.key),
            )
            for record in records
        ]
        state_rule, data_rule = edit_ttl(state_ttl, self._state_ttl), edit_ttl(data_ttl, self._data_ttl)
        versions: Sequence[int | None] = [None] * len(records) if if_versions is None else if_versions
        writes = [
            Write(record.key, record.storage_key, patch, state_rule, data_rule, version)
            for record, patch, version in zip(records, patches, versions, strict=True)
        ]
        replies = self._write_here(writes, Cause(source, actor_name(by)))
        return sum(isinstance(reply, Written) and reply.version is not None for reply in replies)

    def delete(self, records: Sequence[Identified], *, by: Any = None, source: str = "admin") -> None:
        """Clear records and delete their rows, in one transaction, so that the history tells who ended them.

        Signals and hints say that they are gone. All are deleted or, when it raises, none. Runs in the
        caller's transaction if there is one. Synchronous.
        """
        from fsm_storage.models import FSMRecord  # not earlier: a storage is imported before Django is set up

        writes = [Write(record.key, record.storage_key, Patch(None, EMPTY)) for record in records]
        cause = Cause(source, actor_name(by))
        scope = self._scope._replace(cause=cause, tells=signals.is_heard())
        rows = FSMRecord.objects.using(self.database).filter(
            alias=self.alias, key__in=[write.key for write in writes]
        )

        def clear_and_delete() -> Sequence[WriteReply]:
            replies = self._session.write_here(writes, scope)
            rows.delete()
            return replies

        replies = self._session.atomically(clear_and_delete)
        self._session.after_commit(
            partial(signals.announce_deleted, self.sender, self.alias, writes, replies, cause)
        )

    def put(self, writes: Sequence[Write], *, by: Any = None, source: str = "import") -> Sequence[WriteReply]:
        """Carry out writes to different keys in one transaction, the caller's if there is one.

        A write whose `if_version` is not met (0: there is no record) is answered with `VersionConflict`,
        and the others are done; for any other error it raises, and none is. Synchronous.
        """
        return self._write_here(writes, Cause(source, actor_name(by)), conflicts_raise=False)

    def _write_here(
        self, writes: Sequence[Write], cause: Cause, *, conflicts_raise: bool = True
    ) -> Sequence[WriteReply]:
        scope = self._scope._replace(cause=cause, tells=signals.is_heard())
        replies = self._session.write_here(writes, scope, conflicts_raise=conflicts_raise)
        if scope.tells or signals.hints:
            self._session.after_commit(
                partial(signals.announce, self.sender, self.alias, writes, replies, cause)
            )
        return replies

    @property
    def expiry(self) -> Handlers | None:
        """The handlers of expiries, imported when they are first asked for. Raises `ImportError`."""
        if isinstance(self._expiry, str):
            self._expiry = cast("Handlers", loaded(self._expiry))
        return self._expiry

    async def clear_expired(self, key: StorageKey, part: Literal["state", "data"], version: int) -> None:
        """Clear an expired part of a record that is at `version`. Raises `VersionConflict` at any other."""
        patch = Patch(state=None) if part == "state" else Patch(data=EMPTY)
        await self._write(Write(self.key_text(key), key, patch, if_version=version))

    def retried(self, question: Callable[[], T]) -> T:
        """Call `question`, which uses Django's ORM, and again while the database fails for a moment."""
        return self._session.retried(question)

    def release(self) -> None:
        """Close the calling thread's connection."""
        self._session.release()

    def sweep(self, limit: int = 1000, *, as_of: AsOf | None = None) -> tuple[int, int, int]:
        """Clear up to `limit` expired states and as many data, and delete the records left idle.

        With `as_of`, only what had expired by then, of records at a smaller version. What `expiry` has
        handlers for is left to them. Returns the three counts; all 0 when there is nothing left to do. Synchronous.
        """
        scope = self._scope._replace(tells=bool(signals.is_heard() or signals.hints))
        spared = self.expiry.spared() if self.expiry else NOTHING_SPARED
        swept = self._session.sweep(scope, limit, spared, as_of)
        if swept.lapsed:
            told = partial(signals.announce_lapsed, self.sender, self.alias, swept.lapsed)
            self._session.after_commit(told)
        return swept.states, swept.data, swept.records

    def submit(self, op: Write | Errand) -> Awaitable[Any]:
        """Carry out a write or an errand, in a batch with others of whichever kind."""
        if self.in_transaction:
            return self._now(op)
        return self._carrier.write(op)

    async def finish(self, errands: Sequence[Errand]) -> None:
        """Carry out errands of one kind, also after `close()`. Raises the first error."""
        if self.in_transaction:
            await sync_to_async(self._finish_here)(errands)
        else:
            await asyncio.to_thread(self._finish_apart, errands)

    def create_isolation(self, **options: Any) -> BaseEventIsolation:
        """Return a `DjangoEventIsolation` with its leases in this storage's database and under its alias.

        `options`: `lease` and `timeout`, seconds or timedelta.
        """
        isolation: BaseEventIsolation = loaded("fsm_storage.DjangoEventIsolation")(storage=self, **options)
        return isolation

    @property
    def lease_place(self) -> Hashable:
        """Where the writes find the leases."""
        return self.database, self.alias

    def lease_key(self, key: StorageKey) -> str:
        """Return the text by which the lease on `key` is known: that of the record."""
        return self.key_text(key)

    def key_text(self, key: StorageKey) -> str:
        """Return the text by which `key` is known in the database. Raises `InvalidKey`, `InvalidKeyType`."""
        return record_key(key, self._key_builder)

    def _read(self, read: Read) -> Awaitable[Any]:
        if self.in_transaction:
            return self._now(read)
        return self._carrier.read(read)

    def _write(self, write: Write) -> Awaitable[Any]:
        hold = HOLD.get()
        if hold is not None and (fence := hold.fence(self.lease_place)):
            write = write._replace(fence=fence)
        if signals.is_heard():
            # Shielded: a caller that is cancelled stops waiting, but what it wrote is told all the same.
            return asyncio.shield(self._write_and_tell(write))
        return self.submit(write)

    async def _write_and_tell(self, write: Write) -> Written:
        written: Written = await self.submit(write)
        if written.change is not None:
            cause = self._scope.cause
            news = News(self.alias, write.parts, write.key, written.version, cause, written.change)
            await signals.atell(self.sender, news)
        return written

    async def _now(self, op: Operation) -> Any:
        if self.closed:
            raise StorageClosed
        reply = await sync_to_async(self._carry_out_here)(op)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _carry_out_here(self, op: Operation) -> Any:
        if isinstance(op, Write):
            replies = self._session.write_here([op], self._scope._replace(tells=signals.is_heard()))
            signals.hint_of(self.alias, [op], replies)
            return replies[0]
        return self._carrier.carry_out([op], 0.0)[0]

    def _finish_here(self, errands: Sequence[Errand]) -> None:
        deadline = time.monotonic() + self.timeout
        for reply in self._session.carry_out(errands, self._scope, deadline) if errands else ():
            if isinstance(reply, BaseException):
                raise reply

    def _finish_apart(self, errands: Sequence[Errand]) -> None:
        """Do it on a connection that is closed afterwards, because nobody else looks after this thread's."""
        try:
            self._finish_here(errands)
        finally:
            self._session.release()
