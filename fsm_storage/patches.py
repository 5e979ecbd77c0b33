"""What one write does to a record, and what comes of it. Pure: no Django, no asyncio, no clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeAlias


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP: Final = Keep.KEEP
"""Leave this part of the record as it is."""

EMPTY: Final = "{}"
"""The data of a record that has none."""

Seconds: TypeAlias = float
Fold: TypeAlias = Callable[[str, tuple[str, ...]], str]
"""Lays JSON objects over a JSON object, key by key; all of them are texts."""


MAX_TTL = timedelta(days=36525)
"""A hundred years: more is a mistake, and would not fit every database's calendar."""


def ttl_seconds(ttl: timedelta | float | None) -> Seconds | None:
    """Return a TTL in seconds; None, which is never, stays None.

    Raises `TypeError` for what is no TTL, `ValueError` for one that is not above 0 and at most 100 years.
    """
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float | timedelta):
        raise TypeError(f"must be seconds or a timedelta, not {type(ttl).__name__}")
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if not 0 < seconds <= MAX_TTL.total_seconds():  # no NaN is, either
        raise ValueError(f"must be above 0 and at most 100 years (None is for ever), not {ttl!r}")
    return float(seconds)


class Patch(NamedTuple):
    """Set the state, replace the data, lay objects over the data, in this order.

    Data are the texts of JSON objects: encoded once, by the caller, so that a value that cannot
    be stored fails before it meets a batch, and a change to it afterwards changes nothing.
    """

    state: str | Literal[Keep.KEEP] | None = KEEP
    data: str | Literal[Keep.KEEP] = KEEP
    merge: tuple[str, ...] = ()

    @property
    def touches_data(self) -> bool:
        return self.data is not KEEP or bool(self.merge)

    def then(self, later: Patch) -> Patch:
        """Return the patch that acts like this one followed by `later`."""
        state = self.state if later.state is KEEP else later.state
        if later.data is not KEEP:
            return Patch(state, later.data, later.merge)
        return Patch(state, self.data, self.merge + later.merge)


class Ttl(NamedTuple):
    """How a write treats the expiry of a part.

    `seconds` from now (None: never). With `keep`, a part that was live keeps the expiry it has.
    With `renew`, the expiry is set although the patch leaves the value alone.
    """

    seconds: Seconds | None = None
    keep: bool = False
    renew: bool = False


NEVER: Final = Ttl()


class Content(NamedTuple):
    """The changing part of a record. Instants are seconds since the epoch, None is never."""

    state: str | None = None
    data: str = EMPTY
    state_expires_at: Seconds | None = None
    data_expires_at: Seconds | None = None

    def live_state(self, now: Seconds) -> str | None:
        at = self.state_expires_at
        return self.state if at is None or at > now else None

    def live_data(self, now: Seconds) -> str:
        at = self.data_expires_at
        return self.data if at is None or at > now else EMPTY


def is_past(expires_at: Seconds | None, now: Seconds) -> bool:
    """Say whether a part has expired. A part is gone at its very instant, as in Redis."""
    return expires_at is not None and expires_at <= now


def apply(
    patch: Patch, old: Content, now: Seconds, *, fold: Fold, state_ttl: Ttl = NEVER, data_ttl: Ttl = NEVER
) -> Content:
    """Return the content that `patch` makes of `old` at `now`.

    A part that the write does not touch keeps its value and its expiry, also when it has
    expired already: it is the sweep's to clear. A part that ends up empty has nothing to expire,
    but for one case: where nothing is left at all, the data expires now, so that the sweep, which
    only walks along the expiries, finds the idle record.
    """
    state, data, state_expires_at, data_expires_at = old
    if patch.state is not KEEP or state_ttl.renew:
        before = None if is_past(state_expires_at, now) else state
        state = before if patch.state is KEEP else patch.state
        state_expires_at = _expiry(state is None, before is not None, state_expires_at, state_ttl, now)

    if patch.data is not KEEP or patch.merge or data_ttl.renew:
        before_data = EMPTY if is_past(data_expires_at, now) else data
        data = before_data if patch.data is KEEP else patch.data
        if patch.merge:
            data = fold(data, patch.merge)
        data_expires_at = _expiry(data == EMPTY, before_data != EMPTY, data_expires_at, data_ttl, now)

    if data == EMPTY:
        data_expires_at = now if state is None else None
    return Content(state, data, state_expires_at, data_expires_at)


def _expiry(is_empty: bool, was_live: bool, old: Seconds | None, ttl: Ttl, now: Seconds) -> Seconds | None:
    if is_empty:
        return None
    if ttl.keep and was_live:
        return old
    return None if ttl.seconds is None else now + ttl.seconds
