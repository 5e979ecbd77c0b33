"""`RedisStorage`: aiogram's storage on Redis, mirrored into Django through an outbox."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from aiogram.fsm.storage.base import (
    BaseEventIsolation,
    BaseStorage,
    DefaultKeyBuilder,
    KeyBuilder,
    StateType,
    StorageKey,
)
from asgiref.sync import async_to_sync
from django.core.checks import CheckMessage
from django.db import transaction
from django.utils.module_loading import import_string
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError

from fsm_storage.backends.arguments import Mirroring, TtlOption, own_ttl
from fsm_storage.backends.django import DjangoStorage
from fsm_storage.backends.fencing import HOLD
from fsm_storage.backends.merging import Merge
from fsm_storage.backends.options import checked_options, loaded
from fsm_storage.backends.redis_editing import Edited, RedisEditor, Shown, Wish, rewrites, wait_for_mirror
from fsm_storage.backends.redis_leases import LOCK, Claims, is_held
from fsm_storage.backends.redis_leases import carry_out as carry_out_claims
from fsm_storage.backends.redis_options import check_redis_options, client
from fsm_storage.backends.redis_side import Side
from fsm_storage.backends.wire import wire_for
from fsm_storage.backends.writing import Outbox, Write
from fsm_storage.codec import Dumps, Loads, WireCodec
from fsm_storage.dialects import Claim, Errand, Fence, History
from fsm_storage.exceptions import (
    CorruptData,
    InvalidStorageError,
    NotEditable,
    RedisUnavailable,
    StorageClosed,
    VersionConflict,
)
from fsm_storage.keys import check_key, check_key_text, state_text
from fsm_storage.outbox import DATA, STATE, Part, Record, missed_name, stream_name
from fsm_storage.patches import EMPTY, KEEP, Keep, Ttl, ttl_seconds

if TYPE_CHECKING:
    from fsm_storage.models import FSMRecord

OUTBOX_BYTES = 256 * 1024 * 1024


class RedisStorage(BaseStorage):
    """Keeps the conversations of a bot in Redis as aiogram's `RedisStorage` does: same keys, same values.

    What it adds: `update_data` is atomic over all processes; concurrent operations of an event loop share
    round trips; a lost connection is mended within `timeout`; and with `mirror`, each write stands, in the
    same Redis transaction, in an outbox from which it is mirrored into Django's tables.

    - `redis`: a client of redis-py, also one of Sentinel's; or its dotted path, or that of a function that
      returns one. Or `url`, with `connection_kwargs`, as in `from_url`.
    - `key_builder`: an aiogram `KeyBuilder`, or its dotted path; by default aiogram's `DefaultKeyBuilder()`,
      which leaves out the bot and the business connection.
    - `state_ttl`, `data_ttl`: seconds or timedelta; each write of a part restarts its time. None: for ever.
    - `json_loads`, `json_dumps`: functions, or their dotted paths.
    - `mirror`: True mirrors in this process too; "apart" leaves that to `manage.py fsm_mirror`; False is
      Redis alone.
    - `alias`: names the outbox, and is part of each mirrored record's identity.
    - `database`: the alias in `DATABASES` of the mirror; `history`: as of `DjangoStorage`, for the mirror.
    - `timeout`: seconds that an operation may wait, retries included.
    - `max_pending`: operations of an event loop that may wait at a time; past them, callers wait for room.
    - `outbox_bytes`: how large the outbox may grow in Redis while nothing mirrors it. Past it only the names
      of the keys written are noted, and mirrored as they are then.

    Operations raise `StorageTimeout`, `RedisUnavailable`, `StorageClosed`; errors of the caller derive from
    `ValueError` and `TypeError` and name the key. A cancelled caller stops waiting; its write happens whole
    or not at all. One object serves any number of threads and event loops; each loop has its own connections.
    """

    def __init__(
        self,
        redis: Redis | RedisCluster | str | None = None,
        key_builder: KeyBuilder | str | None = None,
        state_ttl: TtlOption = None,
        data_ttl: TtlOption = None,
        json_loads: Loads | str = json.loads,
        json_dumps: Dumps | str = json.dumps,
        *,
        mirror: bool | Literal["apart"] = True,
        alias: str = "default",
        database: str = "default",
        history: History = "states",
        timeout: float = 5.0,
        max_pending: int = 10_000,
        outbox_bytes: int = OUTBOX_BYTES,
        url: str | None = None,
        connection_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        checked_options(
            alias,
            {
                "key_builder": key_builder, "state_ttl": state_ttl, "data_ttl": data_ttl,
                "json_loads": json_loads, "json_dumps": json_dumps, "mirror": mirror, "history": history,
                "timeout": timeout, "max_pending": max_pending, "outbox_bytes": outbox_bytes,
            },
        )  # fmt: skip
        try:
            self.redis = client(redis, url, connection_kwargs, mirror=bool(mirror))
        except (InvalidStorageError, ImportError) as error:
            raise InvalidStorageError(f"storage {alias!r}: {error}") from error
        self.key_builder: KeyBuilder = loaded(key_builder, called=True) or DefaultKeyBuilder()
        self.alias, self.database, self.mirror, self.history = alias, database, mirror, history
        self.codec = WireCodec(loaded(json_loads), loaded(json_dumps))
        self.state_ttl, self.data_ttl = state_ttl, data_ttl
        self._ttl_ms = {
            STATE: _ttl_ms(Ttl(ttl_seconds(state_ttl))),
            DATA: _ttl_ms(Ttl(ttl_seconds(data_ttl))),
        }
        self.timeout, self._limits = timeout, (timeout, max_pending, outbox_bytes)
        self._sides: dict[asyncio.AbstractEventLoop, Side] = {}
        self._claims = Claims(self.redis, alias, timeout, max_pending)
        self._lock = threading.Lock()
        self._mirroring: Mirroring | None = None
        self._tables: DjangoStorage | None = None
        self.closed = False

    @classmethod
    def from_url(
        cls, url: str, connection_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> RedisStorage:
        """Return a storage on the Redis at `url`; `kwargs` are the storage's, as in aiogram."""
        return cls(url=url, connection_kwargs=connection_kwargs, **kwargs)

    @classmethod
    def check(cls, alias: str, options: Mapping[str, Any]) -> list[CheckMessage]:
        """System checks of the `OPTIONS` of one alias."""
        return check_redis_options(cls, alias, options)

    def create_isolation(self, **options: Any) -> BaseEventIsolation:
        """Return a `DjangoEventIsolation` with its leases in this Redis, under the keys of aiogram's locks.

        `options`: `lease` and `timeout`, seconds or timedelta.
        """
        if "lock_kwargs" in options:
            raise InvalidStorageError(
                "create_isolation() of RedisStorage takes no lock_kwargs: in place of their timeout, give "
                "lease=…, which is renewed while a handler runs; of their blocking_timeout, timeout=…"
            )
        isolation: BaseEventIsolation = loaded("fsm_storage.DjangoEventIsolation")(storage=self, **options)
        return isolation

    @property
    def lease_place(self) -> Hashable | None:
        """Where the writes find the leases. None for a Cluster: they may be on different nodes."""
        return None if isinstance(self.redis, RedisCluster) else self.redis

    def lease_key(self, key: StorageKey) -> str:
        """Return the Redis key of the lease on `key`."""
        return self._name(key, LOCK)

    def submit(self, errand: Errand) -> Awaitable[Any]:
        """Carry out a claim, in a batch with others; or an errand on a table of the mirror's database."""
        if isinstance(errand, Claim):
            return self._claims.batcher.submit(errand)
        return self._table().submit(errand)

    async def finish(self, claims: Sequence[Claim]) -> None:
        """Carry out claims, also after `close()`. Raises the first error."""
        wire = wire_for(self.redis)
        try:
            async with asyncio.timeout(self.timeout):
                replies = await carry_out_claims(wire, claims, self.alias) if claims else []
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(self.alias, error) from error
        finally:
            await wire.hang_up()
            if self.closed and isinstance(self.redis, RedisCluster):
                await self.redis.aclose()
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply

    async def set_state(self, key: StorageKey, state: StateType = None, ttl: TtlOption | Keep = KEEP) -> None:
        """Set the state. `ttl`: how long this state lives, in place of the storage's `state_ttl`; None: for ever.

        A wrong `ttl` raises `InvalidTtl` or `InvalidTtlType`, and nothing is written.
        """
        name = self._name(key, STATE)
        record = Record(key, STATE, state_text(state, name), self._ttl_of(STATE, ttl, name))
        await self._side().writes.submit(Write(name, record, fence=self._fence()))

    async def get_state(self, key: StorageKey) -> str | None:
        name = self._name(key, STATE)
        found: bytes | None = await self._side().reads.submit((name, STATE))
        try:
            return None if found is None else found.decode()
        except UnicodeDecodeError as error:
            raise CorruptData(name, str(error), STATE) from error

    async def set_data(self, key: StorageKey, data: Mapping[str, Any], ttl: TtlOption | Keep = KEEP) -> None:
        """Replace the data. `ttl`: how long it lives, in place of the storage's `data_ttl`; None: for ever."""
        name = self._name(key, DATA)
        text = self.codec.encode(data, name)
        record = Record(key, DATA, None if text == EMPTY else text, self._ttl_of(DATA, ttl, name))
        side = self._side()
        await side.writes.submit(Write(name, record, fence=self._fence()))
        side.merger.saw(name, None if record.value is None else text.encode())

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        name = self._name(key, DATA)
        side = self._side()
        found = await side.reads.submit((name, DATA))
        data = self.codec.decode_bytes(found, name)
        side.merger.saw(name, found)
        return data

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
        name = self._name(key, DATA)
        ttl_ms = self._ttl_of(DATA, ttl, name)
        merge = Merge(name, key, self.codec.detached(data, name), ttl_ms, self._fence())
        return await self._side().merger.merge(merge)

    async def close(self) -> None:
        """Finish what was accepted, for `timeout` seconds at the most, refuse what comes later, and close `redis`."""
        deadline = time.monotonic() + self.timeout
        own = self._sides.get(asyncio.get_running_loop())
        self._refuse()
        parts = [part for part in (own, self._claims.batcher, self._tables) if part is not None]
        await asyncio.gather(*(part.close() for part in parts))  # side by side: each may take all the time
        if self._mirroring is not None:
            self._mirroring.stop()
            await asyncio.to_thread(self._mirroring.join, max(0.0, deadline - time.monotonic()))
        if isinstance(self.redis, RedisCluster):
            await self.redis.aclose()
        else:
            await self.redis.aclose(close_connection_pool=True)

    def shut(self) -> None:
        """Refuse what comes later, from synchronous code; what was accepted is finished on its event loop."""
        self._refuse()
        if self._tables is not None:
            self._tables.shut()
        if self._mirroring is not None:
            self._mirroring.stop()
            self._mirroring.join(self.timeout)

    def edit(
        self,
        records: Sequence[FSMRecord],
        *,
        state: StateType | Keep = KEEP,
        data: Mapping[str, Any] | Keep = KEEP,
        state_ttl: TtlOption | Keep = KEEP,
        data_ttl: TtlOption | Keep = KEEP,
        if_versions: Sequence[int] | None = None,
        by: Any = None,
        source: str = "admin",
    ) -> int:
        """Change mirrored records from synchronous code: in Redis, from where the mirror brings it back.

        See `FSMRecord.edit`, which is how to call it. Each record by itself is changed whole or not at all.
        With `if_versions`, only where Redis holds what the record shows: a single record that has moved on
        raises `VersionConflict`, among several it is left out. Those changed get the version that they will
        have. Redis knows nothing of a transaction of Django: what is written there is not rolled back.
        """
        wish = Wish(state, data, state_ttl, data_ttl, by, source)
        versions: Sequence[int | None] = [None] * len(records) if if_versions is None else if_versions
        replies = self._edit_here([(Shown.of(*pair), wish) for pair in zip(records, versions, strict=True)])
        if len(replies) == 1 and isinstance(replies[0], VersionConflict):
            raise replies[0]
        return sum(isinstance(reply, int) for reply in replies)

    def edit_each(
        self, edits: Sequence[tuple[FSMRecord, Mapping[str, Any]]], *, by: Any = None, source: str = "admin"
    ) -> list[Edited]:
        """Change the state or the data of each record in its own way, where Redis holds what the record shows.

        A part that is not there, or has expired, stays so. Return for each its new version, None if nothing
        was to change, or the conflict. Waits for the mirror once.
        """
        found = rewrites(self.database, edits, by, source)
        replies = iter(self._edit_here([one for one in found if isinstance(one, tuple)]))
        return [next(replies) if isinstance(one, tuple) else one for one in found]

    def _edit_here(self, edits: Sequence[tuple[Shown, Wish]]) -> list[Edited]:
        if not self.mirror:
            raise NotEditable(self.alias, "it is not mirrored")
        replies = async_to_sync(self._edit)(edits)
        pairs = zip((shown.record for shown, _ in edits), replies, strict=True)
        changed = {record.key: reply for record, reply in pairs if isinstance(reply, int)}
        wait_for_mirror(self.database, self.alias, changed)
        return replies

    def delete(self, records: Sequence[FSMRecord], *, by: Any = None, source: str = "admin") -> None:
        """Clear mirrored records in Redis and delete their rows, so that the history tells who ended them.

        What Redis does not take is not deleted. As with `edit`, the records before that one are cleared there.
        """
        wish = Wish(None, {}, by=by, source=source)
        with transaction.atomic(using=self.database):
            # The rows first, which can be brought back. The mirror then finds nothing left to clear.
            self._table().delete(records, by=by, source=source)
            self._edit_here([(Shown(record, None, {}, None), wish) for record in records])

    def is_leased(self, key: StorageKey) -> bool:
        """Say whether a handler is at work on `key`, as far as Redis says so at once. Synchronous."""
        return async_to_sync(is_held)(wire_for(self.redis), self.lease_key(key))

    async def _edit(self, edits: Sequence[tuple[Shown, Wish]]) -> list[Edited]:
        wire = wire_for(self.redis)
        editor = RedisEditor(wire, self.alias, self.key_builder, self.codec, self._ttl_ms)
        try:
            return await editor.edit_all(edits, self.timeout)
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(self.alias, error) from error
        finally:
            await wire.hang_up()

    def _table(self) -> DjangoStorage:
        """Return the storage on the tables of the mirror."""
        if not self.mirror:
            raise NotEditable(self.alias, "it keeps nothing in Django")
        with self._lock:
            if self._tables is None:
                self._tables = DjangoStorage(
                    self.alias, database=self.database, history=self.history, timeout=self.timeout
                )
                self._tables.sender = type(self)
        return self._tables

    def _refuse(self) -> None:
        self.closed = True
        self._claims.batcher.shut()
        with self._lock:
            sides = list(self._sides.values())
        for side in sides:
            try:
                side.loop.call_soon_threadsafe(side.shut)
            except RuntimeError:  # the loop was closed, and took its connections with it
                continue

    def _fence(self) -> Fence | None:
        """Return the lease under which the caller writes, if it is one of this Redis. Raises `LeaseLost`."""
        hold = HOLD.get()
        return None if hold is None else hold.fence(self.lease_place)

    def _name(self, key: StorageKey, part: Part | Literal["lock"]) -> str:
        check_key(key)
        name = self.key_builder.build(key, part)
        check_key_text(name)
        return name

    def _ttl_of(self, part: Part, ttl: TtlOption | Keep, name: str) -> int | None:
        return self._ttl_ms[part] if ttl is KEEP else _ttl_ms(own_ttl(ttl, name))

    def _side(self) -> Side:
        return self._sides.get(asyncio.get_running_loop()) or self._add_side()

    def _add_side(self) -> Side:
        if self.closed:
            raise StorageClosed
        loop = asyncio.get_running_loop()
        with self._lock:
            # Short-lived loops (async_to_sync) leave theirs behind.
            for old in [old for old in self._sides if old.is_closed()]:
                del self._sides[old]
            self._start_mirroring()
            outbox = Outbox(stream_name(self.alias), missed_name(self.alias)) if self.mirror else None
            side = self._sides[loop] = Side(self.redis, self.codec, outbox, self.alias, self._limits)
            return side

    def _start_mirroring(self) -> None:
        """Mirror in this process, unless something else does. A fork has no threads, so it gets one of its own."""
        if self.mirror is True and (self._mirroring is None or not self._mirroring.is_alive()):
            # By its dotted path: the mirror stands on this room.
            self._mirroring = cast(Mirroring, import_string("fsm_storage.mirror.worker.MirrorThread")(self))
            self._mirroring.start()


def _ttl_ms(ttl: Ttl) -> int | None:
    return None if ttl.seconds is None else max(1, round(ttl.seconds * 1000))
