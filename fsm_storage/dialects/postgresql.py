"""PostgreSQL: each round trip counts. One statement locks, patches, writes the history and commits a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.codec import outside_strings, too_long
from fsm_storage.dialects import (
    LAST_VERSION,
    LOCKED,
    NOTHING_SPARED,
    AsOf,
    Change,
    Fence,
    Lapse,
    Lapsed,
    Plan,
    Read,
    ReadReply,
    Rows,
    Scope,
    Spared,
    Statement,
    Sweep,
    Write,
    WriteReply,
    Written,
)
from fsm_storage.dialects import postgresql_leases as leases
from fsm_storage.dialects import postgresql_peers as peers
from fsm_storage.dialects import postgresql_sql as sql
from fsm_storage.dialects import postgresql_upsert as upserts
from fsm_storage.exceptions import CorruptData, LeaseLost, VersionConflict
from fsm_storage.patches import EMPTY, KEEP, NEVER, Patch, Ttl

# 40001 serialization failure, 40P01 deadlock, 55P03 lock not available, 57P0x the server is going
# down or coming up, 53300 too many connections, 08xxx the connection; 25006 after a failover.
# 0A000 is a prepared plan that a migration has overtaken, 26000 and 42P05 are a pooler that gives
# each transaction another connection, which does not have what was prepared, or has it already.
_TRANSIENT = re.compile(r"40001|40P01|55P03|57P0[1-5]|53300|08...|25006|0A000|26000|42P05")

_HAS_EXPONENT = re.compile(r"\d[eE]\+?\d")
_EXPONENT = re.compile(r"-?\d+(?:\.\d+)?[eE]\+?\d{1,3}(?!\d)")


def exact(text: str) -> str:
    """Write out the exponents of large floats, with a fraction.

    jsonb keeps decimal numbers, so 1e+23 would come back as the integer 10**23, which is not the
    float 1e+23. With a fraction it comes back as a float, and reads as the same one.
    """
    if not _HAS_EXPONENT.search(text):
        return text
    pieces = outside_strings(text)
    if not any(_HAS_EXPONENT.search(piece) for piece in pieces[::2]):
        return text
    whole, place = [], 0
    for index, piece in enumerate(pieces):
        original = text[place : place + len(piece)]
        whole.append(original if index % 2 else _EXPONENT.sub(_written_out, original))
        place += len(piece) + 1
    return '"'.join(whole)


def _written_out(match: re.Match[str]) -> str:
    plain = format(Decimal(match[0]), "f")
    return plain if "." in plain else f"{plain}.0"


class _Batched(NamedTuple):
    """A write whose merges were made one."""

    key: str
    parts: Any
    patch: Patch
    state_ttl: Any
    data_ttl: Any
    if_version: int | None
    fence: Fence | None
    as_of: AsOf | None
    over: str | None


# What a write has in each column of a batch.
_VARYING: dict[str, Callable[[_Batched], Any]] = {
    "key": lambda w: w.key,
    "chat_id": lambda w: w.parts.chat_id,
    "user_id": lambda w: w.parts.user_id,
    "sets_state": lambda w: w.patch.state is not KEEP,
    "state": lambda w: None if w.patch.state is KEEP else w.patch.state,
    "base": lambda w: None if w.patch.data is KEEP else exact(w.patch.data),
    "over": lambda w: w.over,
}
_FENCE: dict[str, Callable[[_Batched], Any]] = {
    "fence_key": lambda w: w.fence and w.fence.key,
    "fence_token": lambda w: w.fence and w.fence.token,
}


def _until(as_of: AsOf, ttl: Ttl) -> float | None:
    return None if ttl.seconds is None else as_of.at + ttl.seconds


# What one that was made elsewhere has besides.
_AS_OF: dict[str, Callable[[Any, AsOf], Any]] = {
    "as_version": lambda w, as_of: as_of.version,
    "at": lambda w, as_of: as_of.at,
    "seen_at": lambda w, as_of: as_of.seen_at,
    "state_until": lambda w, as_of: _until(as_of, w.state_ttl),
    "data_until": lambda w, as_of: _until(as_of, w.data_ttl),
    "leaves_trace": lambda w, as_of: as_of.leaves_trace,
}


def _common(write: _Batched | Write) -> tuple[Any, ...]:
    """Return what `write` has in each column of `sql.COMMON`."""
    parts, state_ttl, data_ttl = write.parts, write.state_ttl, write.data_ttl
    if write.as_of is not None:  # it has instants instead
        state_ttl = data_ttl = NEVER
    place = (parts.bot_id, parts.thread_id, parts.business_connection_id, parts.destiny)
    return (*place, *state_ttl, *data_ttl, write.if_version)


class PostgreSQL:
    """See `Dialect`. `returns_old`: the server can return the old row, as PostgreSQL does from 18 on."""

    is_embedded = False
    reads_apart = True
    writers = 2
    write_begin = None
    binds_on_server = True
    paramstyle = "format"
    drives = ()
    joins = False
    claim = staticmethod(leases.claim)
    sweep_leases = staticmethod(leases.sweep)
    name = staticmethod(peers.name)

    def __init__(self, *, returns_old: bool = False) -> None:
        self._returns_old = returns_old

    def at(self, version: int) -> PostgreSQL:
        return PostgreSQL(returns_old=version >= 180000)

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        found: dict[bool, dict[str, Any]] = {}
        for data in (False, True):
            keys = [read.key for read in reads if read.data is data]
            if keys:
                text = sql.READ_DATA if data else sql.READ_STATES
                lone = len(keys) == 1
                rows = yield Statement(
                    text + (sql.ONE if lone else sql.ANY), (scope.alias, keys[0] if lone else keys)
                )
                found[data] = dict(rows)
        return [found[read.data].get(read.key, EMPTY if read.data else None) for read in reads]

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, free: bool = False
    ) -> Plan[list[WriteReply]]:
        done: dict[str, WriteReply] = {}
        if free and not scope.tells:
            done = yield from self._write_shortly(writes, scope)
            if len(done) == len(writes):
                return [done[write.key] for write in writes]
        rest = [write for write in writes if write.key not in done] if done else writes
        replies = yield from self._write_locked(rest, scope, wait=wait)
        if not done:
            return replies
        done.update(zip((write.key for write in rest), replies, strict=True))
        return [done[write.key] for write in writes]

    def _write_shortly(self, writes: Sequence[Write], scope: Scope) -> Plan[dict[str, WriteReply]]:
        """Do what an upsert can do, without a lock before it; say what was done."""
        if len(writes) == 1:
            short = _lone(writes[0], scope, returns_old=self._returns_old)
            rows = (yield short) if short is not None else []
            return {write.key: Written(*row) for write, row in zip(writes, rows, strict=False)}
        if scope.history == "full" or (scope.history == "states" and not self._returns_old):
            return {}
        if not all(map(upserts.is_plain, writes)) or len({_common(write) for write in writes}) > 1:
            return {}
        data = [exact(patch.merge[0] if patch.merge else EMPTY if patch.data is KEEP else patch.data)
                for patch in (write.patch for write in writes)]  # fmt: skip
        rows = yield upserts.upsert(writes, data, scope)
        done: dict[str, WriteReply] = {key: Written(version, text) for key, version, text in rows}
        if len(done) < len(writes):
            done.update({write.key: Written(None) for write in writes if upserts.makes_nothing(write, done)})
        return done

    def _write_locked(self, writes: Sequence[Write], scope: Scope, *, wait: bool) -> Plan[list[WriteReply]]:
        """Lock what is there, and do all that a write can ask for."""
        batch = [_Batched(*write, _over(write.patch, scope)) for write in writes]
        fenced = any(write.fence for write in writes)
        varying = _VARYING | _FENCE if fenced else _VARYING
        params: dict[str, Any] = {name: [get(write) for write in batch] for name, get in varying.items()}
        params.update(alias=scope.alias, source=scope.cause.source, actor=scope.cause.actor)
        common = [_common(write) for write in batch]
        alike = len(set(common)) == 1
        params.update(
            zip(sql.COMMON, common[0] if alike else map(list, zip(*common, strict=True)), strict=True)
        )
        made_elsewhere = [(write, write.as_of) for write in writes if write.as_of is not None]
        if made_elsewhere:
            params.update({name: [get(*one) for one in made_elsewhere] for name, get in _AS_OF.items()})
        steps = [
            (write.key, step.state, step.version, step.at, *step.cause)
            for write, as_of in made_elsewhere
            for step in as_of.steps
        ]
        if steps:
            params.update(zip(sql.STEPS, map(list, zip(*steps, strict=True)), strict=True))
        text = sql.write(
            scope.history,
            wait=wait,
            tells=scope.tells,
            alike=alike,
            fenced=fenced,
            as_of=bool(made_elsewhere),
            steps=bool(steps),
        )
        rows = yield Statement(text, params)
        by_key = {row[0]: row for row in rows}
        return [_reply(write, by_key[write.key]) for write in writes]

    def sweep(
        self, scope: Scope, limit: int, spared: Spared = NOTHING_SPARED, as_of: AsOf | None = None
    ) -> Plan[Sweep]:
        full = scope.history == "full"
        params = {
            "alias": scope.alias, "limit": limit, "noted": scope.history != "off",
            "spared_states": None if spared.states is None else list(spared.states),
            "spares_data": spared.data,
            "until": None if as_of is None else as_of.at,
            "below": LAST_VERSION if as_of is None else as_of.version,
        }  # fmt: skip
        text = sql.SWEEP_STATES.format(data="data" if full else "NULL::jsonb")
        states = yield Statement(text, params)
        data = yield Statement(sql.SWEEP_DATA, {**params, "noted": full})
        lost = [row for row in data if not row[-1]]
        deleted = {row[0] for row in data if row[-2]}
        lapsed = _lapsed(states, lost, deleted) if scope.tells else ()
        return Sweep(len(states), len(lost), len(deleted), lapsed)

    def session(self, timeout: float) -> Sequence[str]:
        return ()

    def lock_limits(self, timeout: float) -> tuple[Sequence[str], Sequence[str]]:
        return (f"SET LOCAL lock_timeout = {max(1, int(timeout * 1000))}",), ()

    def is_lock_timeout(self, code: str | None, message: str) -> bool:
        return code == "55P03"

    def has_stale_plan(self, code: str | None) -> bool:
        return code == "0A000"

    def is_pooled(self, code: str | None) -> bool:
        return code in {"26000", "42P05"}

    def is_transient(self, code: str | None, message: str) -> bool:
        return code is None or bool(_TRANSIENT.fullmatch(code))

    def is_missing_table(self, code: str | None, message: str) -> bool:
        return code in {"42P01", "42703"}


def _over(patch: Patch, scope: Scope) -> str | None:
    if not patch.merge:
        return None
    return exact(patch.merge[0] if len(patch.merge) == 1 else scope.codec.fold("", EMPTY, patch.merge)[0])


def _lone(write: Write, scope: Scope, *, returns_old: bool) -> Statement | None:
    """Return the one upsert that does `write`, if it is plain enough for one."""
    key, parts, patch, state_ttl, data_ttl, if_version, fence, as_of = write
    if if_version is not None or as_of is not None:
        return None
    if state_ttl.renew or data_ttl.renew or state_ttl.keep or data_ttl.keep:
        return None
    ttl, data = (state_ttl if patch.state is not KEEP else data_ttl).seconds, None
    if isinstance(patch.state, str) and not patch.touches_data and scope.history != "full":
        noted = upserts.LONE_STATE_NOTED if returns_old else sql.LONE_STATE_NOTED
        text = noted if scope.history == "states" else sql.LONE_STATE + sql.LONE_RETURNING
    elif patch.state is not KEEP or scope.history == "full":
        return None
    elif patch.data is not KEEP and patch.data != EMPTY and not patch.merge:
        text, data = sql.LONE_REPLACE + sql.LONE_RETURNING, exact(patch.data)
    elif patch.data is KEEP and len(patch.merge) == 1 and patch.merge[0] != EMPTY:
        text, data = sql.LONE_MERGE + sql.LONE_MERGE_RETURNING, exact(patch.merge[0])
    else:
        return None
    params = {
        **vars(parts), "alias": scope.alias, "key": key, "ttl": ttl, "state": patch.state, "data": data,
        "source": scope.cause.source, "actor": scope.cause.actor,
    }  # fmt: skip
    if patch.state is KEEP:
        del params["state"]
    if fence is not None:
        text = sql.fenced(text)
        params.update(fence_key=fence.key, fence_token=fence.token)
    return Statement(text, params)


def _reply(write: Write, row: tuple[Any, ...]) -> WriteReply:
    _, found, version, is_lost, is_stale, is_corrupt, excess, is_nothing, data, *told = row
    if version is not None:
        return Written(version, data, change=_change(*told) if told else None)
    if is_lost and write.fence is not None:
        return LeaseLost(write.fence.key)
    if is_stale:
        expected = write.if_version or 0 if write.as_of is None else write.as_of.version
        return VersionConflict(write.key, expected, found)
    if is_corrupt:
        return CorruptData(write.key, "no JSON object")
    if excess is not None:
        return too_long(excess, write.key)
    if is_nothing:
        return Written(None, data)
    return LOCKED


def _change(
    old_state: str | None, new_state: str | None, data_changed: bool,
    raw_state: str | None, state_lapsed: bool, state_at: datetime, data_lapsed: bool, data_at: datetime,
) -> Change:  # fmt: skip
    lapses = []
    if state_lapsed:
        lapses.append(Lapse("state", raw_state, state_at))
    if data_lapsed:
        lapses.append(Lapse("data", raw_state, data_at))
    return Change(old_state, new_state, data_changed, tuple(lapses))


def _lapsed(states: Rows, data: Rows, deleted: Collection[str]) -> list[Lapsed]:
    cleared: list[tuple[Literal["state", "data"], Rows]] = [("state", states), ("data", data)]
    return [
        Lapsed(
            key, StorageKey(*parts), None if key in deleted else version + 1, Lapse(part, state, expired_at)
        )
        for part, rows in cleared
        for key, *parts, version, state, expired_at, _, _ in rows
    ]


dialect = PostgreSQL()
