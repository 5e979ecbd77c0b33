"""How each database family is spoken to. Pure: values in, (SQL, parameters) out; nothing is executed here.

A `Plan` is a generator: it yields statements, is sent their rows, and returns the replies. Whoever
drives it owns the connection and the transaction.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.codec import Codec
from fsm_storage.keys import name_key
from fsm_storage.patches import NEVER, Patch, Seconds, Ttl

History = Literal["off", "states", "full"]
Rows: TypeAlias = list[tuple[Any, ...]]
T = TypeVar("T")


class Statement(NamedTuple):
    """One round trip, or a part of one: what is `is_quiet`, whose rows nobody wants, may go with the next one."""

    sql: str
    params: Sequence[Any] | Mapping[str, Any] = ()
    is_quiet: bool = False


Plan: TypeAlias = Generator[Statement, Rows, T]


class Read(NamedTuple):
    """Ask for the state of a key, or for its data."""

    key: str
    data: bool = False


class Fence(NamedTuple):
    """The lease under which a write is made. Once it is another's, the write is refused."""

    key: str
    token: int


class Write(NamedTuple):
    """Apply a patch to a key. With `if_version`, only to a record at that version; 0: if there is none.

    With a `fence`, only while its lease is in the table; else the reply is `LeaseLost`.
    With `as_of`, as if it were then, and only to a record at a smaller version; else the answer is `VersionConflict`.
    """

    key: str
    parts: StorageKey
    patch: Patch
    state_ttl: Ttl = NEVER
    data_ttl: Ttl = NEVER
    if_version: int | None = None
    fence: Fence | None = None
    as_of: AsOf | None = None


class Lapse(NamedTuple):
    """A part that a write or the sweep found expired and cleared. `state` is what the record's was."""

    part: Literal["state", "data"]
    state: str | None
    at: datetime


class Change(NamedTuple):
    """What a write changed, as the bot sees it; `lapses` had expired before and were still in the row."""

    old_state: str | None
    new_state: str | None
    data_changed: bool
    lapses: tuple[Lapse, ...] = ()


class Written(NamedTuple):
    """What a write left behind: the version (None: there was and is no record).

    After a merge, the data too, as text or as the value in it. With `Scope.tells`, what it changed.
    """

    version: int | None
    text: str | None = None
    merged: dict[str, Any] | None = None
    change: Change | None = None


class Lapsed(NamedTuple):
    """A record of which the sweep cleared a part. `version` is the new one, None if it was deleted."""

    key: str
    parts: StorageKey
    version: int | None
    lapse: Lapse


class Sweep(NamedTuple):
    """How many states and data were cleared and records deleted; with `Scope.tells`, which."""

    states: int
    data: int
    records: int
    lapsed: Sequence[Lapsed] = ()


class Spared(NamedTuple):
    """What the sweep leaves to handlers: the expired states that are among `states` (None: all); expired data.

    Data that expired with its state, or up to `TOGETHER` seconds before it, is left for the state's handler.
    """

    states: tuple[str, ...] | None = ()
    data: bool = False


NOTHING_SPARED: Final = Spared()
LAST_VERSION: Final = 2**63 - 1
TOGETHER: Final = 60


class Cause(NamedTuple):
    """Who writes, for the transitions."""

    source: str = "bot"
    actor: str = ""


class Step(NamedTuple):
    """A state that a write made elsewhere went through, the last one included. `version` is when it was made."""

    state: str | None
    version: int
    at: Seconds
    cause: Cause


class AsOf(NamedTuple):
    """When a write was really made, elsewhere, in seconds since the epoch by the database's clock.

    What had expired is judged as of then, and TTLs count from then. `version` is the record's from then on.
    With history "states", `steps` are what is noted, but for those that the record has seen: their versions
    are no larger than its own.
    """

    version: int
    at: Seconds
    steps: tuple[Step, ...] = ()

    @property
    def seen_at(self) -> Seconds:
        """As of when it is judged whether the state had expired that it meets."""
        return self.steps[0].at if self.steps else self.at

    @property
    def leaves_trace(self) -> bool:
        """Whether there was a state in between, so that a record is kept even if nothing is left of it."""
        return any(step.state is not None for step in self.steps)


class Scope(NamedTuple):
    """What all operations of a batch have in common."""

    alias: str
    history: History
    codec: Codec
    cause: Cause = Cause()
    tells: bool = False
    """Replies shall say what was there before, which costs a little: somebody listens to the signals."""


ReadReply: TypeAlias = str | BaseException | None
LOCKED: Final = "locked"
"""The reply to a write whose row another transaction holds: nothing was done, ask again."""
WriteReply: TypeAlias = Written | BaseException | Literal["locked"]


class Errand(Protocol):
    """An operation on another table than the records. Those of a kind in a batch are one plan.

    Of a kind, a batch has at most one with the same `key`.
    """

    @property
    def key(self) -> Hashable: ...

    @staticmethod
    def plan(dialect: Dialect, errands: Sequence[Any], scope: Scope) -> Plan[list[Any]]:
        """Return the dialect's plan for them, which ends with one reply for each."""


class Claim(NamedTuple):
    """Take, renew or give back the lease on a key.

    - Without a token: take it, if it is free, has run out, or is this owner's already.
    - With the token: renew it, if it is still this owner's.
    - With 0 seconds: give it back; without a token, whichever this owner has.

    The reply is the token of the lease, None if nothing was done.
    """

    key: str
    owner: str
    seconds: float
    token: int | None = None

    @staticmethod
    def plan(dialect: Dialect, errands: Sequence[Claim], scope: Scope) -> Plan[list[int | None]]:
        return dialect.claim(errands, scope)


class Naming(NamedTuple):
    """Keep what a chat or a user is called, if that is news; the reply says whether it was.

    None: somebody else holds the row, and nothing was done. `key` is the id.
    """

    key: int
    title: str
    username: str

    def columns(self) -> tuple[int | str, ...]:
        """Return the values of the row: the id, the names, and the keys by which they are searched."""
        title = name_key(self.title)
        return (*self, title, title.partition(" ")[2], name_key(self.username))

    @staticmethod
    def plan(dialect: Dialect, errands: Sequence[Naming], scope: Scope) -> Plan[list[bool | None]]:
        return dialect.name(errands)


class Dialect(Protocol):
    """One database family."""

    is_embedded: bool
    """There is no server: the library works on a file, in this process and under locks of the whole process."""
    reads_apart: bool
    """Reads do not wait for a commit when they have a connection of their own."""
    writers: int
    """How many connections of a process write at a time: one carries out its batch while another commits."""
    write_begin: str | None
    """The statement that opens a transaction for writing; None: a plan is one statement, which commits itself."""
    binds_on_server: bool
    """Parameters are sent apart from the statement, which Django's own cursor does not do by default."""
    paramstyle: str
    """How the driver's own cursor marks them, "qmark" or "format"."""
    drives: Sequence[str] | None
    """An event loop may drive connections of its own, after these statements; None: it may not."""
    joins: bool
    """The server takes several statements at once, with semicolons between."""

    def at(self, version: int) -> Dialect:
        """Return the dialect for a server of this version, a number as libpq's; 0 where there is none."""

    def read(self, reads: Sequence[Read], scope: Scope) -> Plan[list[ReadReply]]:
        """Read what is live. A constant number of statements."""

    def write(
        self, writes: Sequence[Write], scope: Scope, *, wait: bool = False, free: bool = False
    ) -> Plan[list[WriteReply]]:
        """Apply patches to different keys; write the transitions. A constant number of statements.

        Rows are locked in the order of their keys. Without `wait`, a row that another transaction
        holds is left out and answered with `LOCKED`, where the database can tell; the statement waits
        a moment at the most. With `free`, none of the rows was found locked lately, and the writes may
        take a shorter way, which waits for a locked row for a moment and then fails.
        """

    def sweep(
        self, scope: Scope, limit: int, spared: Spared = NOTHING_SPARED, as_of: AsOf | None = None
    ) -> Plan[Sweep]:
        """Clear up to `limit` expired states, and data, and delete idle records, but for what is `spared`.

        With `as_of`, only what had expired by then, of records at a smaller version.
        """

    def claim(self, claims: Sequence[Claim], scope: Scope) -> Plan[list[int | None]]:
        """Take, renew and give back leases on different keys. A constant number of statements.

        A token is larger than any before it of the same key, also of leases that were given back and
        are in the table no more. Only the database's clock counts; it is read before any waiting.
        """

    def name(self, namings: Sequence[Naming]) -> Plan[list[bool | None]]:
        """Write the names that are new or have changed. One statement."""

    def sweep_leases(self, scope: Scope, limit: int) -> Plan[int]:
        """Delete up to `limit` leases that ran out; return how many."""

    def session(self, timeout: float) -> Sequence[str]:
        """Return statements for a new connection of a worker thread."""

    def lock_limits(self, timeout: float) -> tuple[Sequence[str], Sequence[str]]:
        """Return the statements before and after a transaction's work that let it wait so long for a row."""

    def is_lock_timeout(self, code: str | None, message: str) -> bool:
        """Say whether an error means that a row stayed locked."""

    def has_stale_plan(self, code: str | None) -> bool:
        """Say whether an error means that a migration has overtaken a prepared statement."""

    def is_pooled(self, code: str | None) -> bool:
        """Say whether an error means that a pooler swaps connections under prepared statements."""

    def is_transient(self, code: str | None, message: str) -> bool:
        """Say whether an error with this code and message may go away by itself."""

    def is_missing_table(self, code: str | None, message: str) -> bool:
        """Say whether an error means that the migrations were not run."""


_MODULES = {
    "sqlite": "fsm_storage.dialects.sqlite",
    "postgresql": "fsm_storage.dialects.postgresql",
    "mysql": "fsm_storage.dialects.mysql",  # which is what Django calls MariaDB too
}


def dialect_for(vendor: str) -> Dialect | None:
    """Return the dialect for Django's name of a database family, None if there is none."""
    module = _MODULES.get(vendor)
    if module is None:
        return None
    dialect: Dialect = import_module(module).dialect
    return dialect
