"""MariaDB and MySQL: round trips count, and nothing merges JSON exactly. Reads and locks the rows, patches
them in Python, writes them back.

`BEGIN` travels with the first statement, `COMMIT` with the last ones: a batch is two round trips, three if
it makes new records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from fsm_storage.codec import outside_strings
from fsm_storage.dialects import (
    LOCKED,
    NOTHING_SPARED,
    AsOf,
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
)
from fsm_storage.dialects import mysql_leases as leases
from fsm_storage.dialects import mysql_peers as peers
from fsm_storage.dialects import mysql_sql as sql
from fsm_storage.dialects.rows import Expired, Row, Work, due_until, lapsed_of
from fsm_storage.exceptions import LeaseLost
from fsm_storage.patches import EMPTY, Content

# 1020, 1213 and 1614 deadlocks and the like, 1205 and 3572 a lock, 1062 a key that somebody made meanwhile,
# 1412 a table changed; 1040 and 1203 too many connections; 1053, 1077-1080, 1152, 1158-1161, 1184, 1927,
# 2002-2006, 2013, 2055, 4031 the server or the connection went; 1290, 1792, 1836 read only after a
# failover; 1317, 1969 and 3024 somebody or a time limit stopped the statement; 1047 a Galera node joins.
_TRANSIENT = re.compile(
    "1020|1040|1047|1053|1062|107[789]|1080|1152|115[89]|116[01]|1184|1203|1205|1213|1290|1317|1412|1614|"
    "1792|1836|1927|1969|200[2-6]|2013|2055|3024|3572|4031"
)
_MARGIN = 64 * 1024
"""Bytes of a packet that are kept for the rest of a statement with one large value."""


class MySQL:
    """See `Dialect`."""

    is_embedded = False
    reads_apart = True
    writers = 1
    write_begin = "START TRANSACTION"
    binds_on_server = False
    paramstyle = "format"
    drives = None
    joins = True
    claim = staticmethod(leases.claim)
    sweep_leases = staticmethod(leases.sweep)
    name = staticmethod(peers.name)

    def at(self, version: int) -> MySQL:
        return self

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        found: dict[bool, dict[str, Any]] = {}
        for data in (False, True):
            keys = [read.key for read in reads if read.data is data]
            if keys:
                rows = yield Statement(sql.READ_DATA if data else sql.READ_STATES, (scope.alias, keys))
                found[data] = dict(rows)
        return [found[read.data].get(read.key, EMPTY if read.data else None) for read in reads]

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, free: bool = False
    ) -> Plan[list[WriteReply]]:
        text = sql.SELECT if wait else f"{sql.SELECT} SKIP LOCKED"
        rows = yield Statement(text, (scope.alias, [write.key for write in writes]))
        packet, is_rounding, _, now, *_ = rows[0]
        found = {row[2]: Row(*row[3:]) for row in rows}
        missing = [write.key for write in writes if write.key not in found]
        locked: set[str] = set()
        if missing and not wait:  # skipped, or not there: only a read without a lock can tell
            existing = yield Statement(sql.EXISTING, (scope.alias, missing))
            locked = {row[0] for row in existing}
            absent = [key for key in missing if key not in locked]
            if absent:
                yield Statement(sql.NOBODY_MAKES, (scope.alias, absent), is_quiet=True)
        fences = {write.fence for write in writes if write.fence is not None}
        lost = (yield from leases.lost(fences, scope)) if fences else fences
        flaw = partial(_flaw, packet=packet, is_rounding=is_rounding, is_full=scope.history == "full")
        work = Work(scope, now, flaw)
        nothing = Row(now, None, 0, None, EMPTY, None, None)
        replies: list[WriteReply] = [
            LOCKED
            if write.key in locked
            else LeaseLost(write.fence.key)
            if write.fence is not None and write.fence in lost
            else work.add(write, found.get(write.key, nothing))
            for write in writes
        ]
        yield from _written(packet, _statements(work, packet))
        return replies

    def sweep(
        self, scope: Scope, limit: int, spared: Spared = NOTHING_SPARED, as_of: AsOf | None = None
    ) -> Plan[Sweep]:
        place = due_until(scope, as_of)
        is_spared = spared.states is None, spared.states or (None,)
        rows = yield Statement(sql.EXPIRED_STATES, (*place, *is_spared, limit))
        states = [Expired(*row[:-1]) for row in rows]
        if states:
            if scope.history != "off":
                yield from _pieces(
                    sql.TRANSITION, [one.transition("state", scope) for one in states], rows[0][-1]
                )
            yield Statement(sql.CLEAR_STATES, ([one.id for one in states],), is_quiet=True)
        rows = yield Statement(sql.EXPIRED_DATA, (*place, spared.data, *is_spared, limit))
        data = [Expired(*row[:-1]) for row in rows]
        lost = [one for one in data if one.data != EMPTY]
        if scope.history == "full" and lost:
            yield from _pieces(sql.TRANSITION, [one.transition("data", scope) for one in lost], rows[0][-1])
        idle, rest = (
            [one.id for one in data if one.state is None],
            [one.id for one in data if one.state is not None],
        )
        if idle:
            yield Statement(sql.DELETE, (idle,), is_quiet=True)
        if rest:
            yield Statement(sql.CLEAR_DATA, (rest,), is_quiet=True)
        lapsed = lapsed_of(states, lost, set(idle)) if scope.tells else ()
        return Sweep(len(states), len(lost), len(idle), lapsed)

    def session(self, timeout: float) -> Sequence[str]:
        # READ COMMITTED locks no gaps between rows. A thread that serves many waits for nobody longer than the
        # least that there is: with 0, MariaDB 10.11 rolls back behind a SKIP LOCKED and fails at the COMMIT.
        # Nothing is ever cut to fit a column.
        return (
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            "SET SESSION innodb_lock_wait_timeout = 1, lock_wait_timeout = 1,"
            " sql_mode = CONCAT_WS(',', NULLIF(@@sql_mode, ''), 'STRICT_TRANS_TABLES')",
        )

    def lock_limits(self, timeout: float) -> tuple[Sequence[str], Sequence[str]]:
        # There is no SET LOCAL, and the connection is the caller's.
        name = "SESSION innodb_lock_wait_timeout"
        before = f"SET @fsm_storage_wait = @@{name.replace(' ', '.')}, {name} = {max(1, int(timeout))}"
        return (before,), (f"SET {name} = @fsm_storage_wait",)

    def is_lock_timeout(self, code: str | None, message: str) -> bool:
        return code in {"1205", "3572"}

    def has_stale_plan(self, code: str | None) -> bool:
        return False

    def is_pooled(self, code: str | None) -> bool:
        return False

    def is_transient(self, code: str | None, message: str) -> bool:
        return code is not None and bool(_TRANSIENT.fullmatch(code))

    def is_missing_table(self, code: str | None, message: str) -> bool:
        return code in {"1146", "1054"}


def _statements(work: Work, packet: int) -> Iterator[Statement]:
    yield from _pieces(sql.INSERT, work.inserts, packet)
    yield from _pieces(sql.UPDATE_STATE, work.state_updates, packet)
    yield from _pieces(sql.UPDATE_ALL, work.updates, packet)
    yield from _pieces(sql.TRANSITION, work.transitions, packet)


def _pieces(many: sql.Many, rows: Rows, packet: int) -> Iterator[Statement]:
    """Yield one statement for all rows, or more where one packet might not hold them."""
    piece: Rows = []
    size = 0
    for row in rows:
        added = _bound(row)
        if piece and size + added > packet // 2:
            yield many.statement(piece)
            piece, size = [], 0
        piece.append(row)
        size += added
    if piece:
        yield many.statement(piece)


def _written(packet: int, statements: Iterable[Statement]) -> Plan[None]:
    """Send the statements, in one packet if it is sure to hold them."""
    listed = list(statements)
    is_small = sum(len(one.sql) + _bound(one.params) for one in listed) < packet // 2
    for one in listed:
        yield one._replace(is_quiet=is_small)


def _bound(values: Iterable[Any]) -> int:
    """Return a number of bytes that these values cannot exceed: UTF-8 takes 4 for a character, an escape 2."""
    return sum(4 * len(value) + 4 if isinstance(value, str) else 24 for value in values)


def _flaw(old: Content, new: Content, *, packet: int, is_rounding: bool, is_full: bool) -> str | None:
    """Say why the server could not keep `new`, or None."""
    if new.data is old.data:
        return None
    texts = (old.data, new.data) if is_full else (new.data,)
    if _bound(texts) > packet - _MARGIN:
        size = sum(map(_escaped_size, texts))
        if size > packet - _MARGIN:
            return f"takes {size} bytes in a statement, over the server's max_allowed_packet of {packet}"
    if is_rounding and _HAS_LONG_NUMBER.search(new.data) and _rounds(new.data):
        return "has an integer beyond 64 bits, which MySQL would round"
    return None


def _escaped_size(text: str) -> int:
    return len(text.encode()) + text.count('"') + text.count("\\") + text.count("'")


_HAS_LONG_NUMBER = re.compile(r"\d{19}")
_INTEGER = re.compile(r"(?<![\d.eE+-])-?\d{19,}(?![\d.eE])")


def _rounds(text: str) -> bool:
    """Say whether MySQL's JSON would make a float of an integer in `text`."""
    outside = outside_strings(text)[::2]
    numbers = (number for piece in outside for number in _INTEGER.findall(piece))
    return any(len(number) > 20 or not -(2**63) <= int(number) < 2**64 for number in numbers)


dialect = MySQL()
