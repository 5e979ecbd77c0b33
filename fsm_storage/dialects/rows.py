"""Patches rows in Python, for the databases that have no exact way to merge JSON: SQLite, MariaDB, MySQL.

A dialect reads and locks the rows, has them patched here, and writes what is collected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, cast

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.codec import is_json
from fsm_storage.dialects import LAST_VERSION, AsOf, Change, Lapse, Lapsed, Scope, Write, WriteReply, Written
from fsm_storage.exceptions import CorruptData, InvalidData, VersionConflict
from fsm_storage.patches import EMPTY, KEEP, Content, Seconds, apply, is_past


class Row(NamedTuple):
    now: str
    id: int | None
    version: int
    state: str | None
    data: str
    state_expires_at: str | None
    data_expires_at: str | None


class Clock:
    """The database's time, and the texts of instants. Most rows of a batch share theirs."""

    def __init__(self, now: str) -> None:
        self.text = now
        self.now = seconds(now)
        self.version = int(self.now * 1_000_000)
        self._texts = {self.now: now}

    def write(self, instant: Seconds | None) -> str | None:
        if instant is None:
            return None
        text = self._texts.get(instant)
        if text is None:
            text = instant_text(instant)
            self._texts[instant] = text
        return text


def instant_text(instant: Seconds) -> str:
    return datetime.fromtimestamp(instant, UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def seconds(text: str) -> Seconds:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


_NOTHING = Content()


class Work:
    """Collects the rows to write. `flaw` says why the server could not keep a content in place of another."""

    def __init__(
        self, scope: Scope, now: str, flaw: Callable[[Content, Content], str | None] | None = None
    ) -> None:
        self.scope, self.clock, self.flaw = scope, Clock(now), flaw
        self.inserts: list[tuple[Any, ...]] = []
        self.state_updates: list[tuple[Any, ...]] = []
        self.updates: list[tuple[Any, ...]] = []
        self.transitions: list[tuple[Any, ...]] = []
        # The write at hand, and what its merge made.
        self._write: Write
        self._merged: dict[str, Any] | None = None

    def add(self, write: Write, row: Row) -> WriteReply:
        """Note what `write` does to `row`, and return its reply."""
        if write.if_version is not None and (row.version or 0) != write.if_version:
            return VersionConflict(write.key, write.if_version, row.version if row.id else None)
        if write.as_of is not None and row.id is not None and row.version >= write.as_of.version:
            return VersionConflict(write.key, write.as_of.version, row.version)
        old = _content(row)
        self._write, self._merged = write, None
        try:
            new = apply(
                write.patch, old, self._now(write),
                fold=self._fold, state_ttl=write.state_ttl, data_ttl=write.data_ttl,
            )  # fmt: skip
        except (CorruptData, InvalidData) as error:
            return error
        merged = self._merged
        leaves_trace = write.as_of is not None and write.as_of.leaves_trace
        if row.id is None and new.state is None and new.data == EMPTY and not leaves_trace:
            return Written(None, merged=merged)
        flaw = self.flaw(old, new) if self.flaw is not None else None
        if flaw is not None:
            return InvalidData("", flaw, write.key)
        version = self._save(write, row, new)
        if self.scope.history == "states" and write.as_of is not None:
            self._note_steps(write, write.as_of, old, row.version or 0)
        elif self.scope.history != "off":
            self._note(write, old, new)
        change = self._change(write, old, new) if self.scope.tells else None
        return Written(version, None, merged, change)

    def _fold(self, base: str, over: tuple[str, ...]) -> str:
        text, self._merged = self.scope.codec.fold(self._write.key, base, over)
        return text

    def _save(self, write: Write, row: Row, new: Content) -> int:
        clock, as_of = self.clock, write.as_of
        at = clock.text if as_of is None else self._at(write)
        state_at, data_at = clock.write(new.state_expires_at), clock.write(new.data_expires_at)
        if row.id is None:
            parts = write.parts
            version = clock.version if as_of is None else as_of.version
            self.inserts.append(
                (
                    self.scope.alias, write.key, parts.bot_id, parts.chat_id, parts.user_id, parts.thread_id,
                    parts.business_connection_id, parts.destiny, new.state, new.data, state_at, data_at, version,
                    at, at,
                )
            )  # fmt: skip
            return version
        version = row.version + 1 if as_of is None else as_of.version
        if new.data is row.data:
            self.state_updates.append((new.state, state_at, data_at, version, at, row.id))
        else:
            self.updates.append((new.state, state_at, data_at, version, at, new.data, row.id))
        return version

    def _now(self, write: Write) -> Seconds:
        """Return when the write was made."""
        return self.clock.now if write.as_of is None else write.as_of.at

    def _at(self, write: Write) -> str | None:
        return self.clock.write(self._now(write))

    def _note_steps(self, write: Write, as_of: AsOf, old: Content, version: int) -> None:
        """Note the states that the write went through, after the expiry of the one that it met."""
        steps = [step for step in as_of.steps if step.version > version]
        if self._finds_state_expired(write, old):
            at = self.clock.write(old.state_expires_at)
            self._add_transition(write, old.state, None, at, ("expiry", ""), None, None)
        before = old.live_state(as_of.seen_at)
        for step in steps:
            if step.state != before:
                at = self.clock.write(step.at)
                self._add_transition(write, before, step.state, at, step.cause, None, None)
                before = step.state

    def _note(self, write: Write, old: Content, new: Content) -> None:
        """Note the transitions: of an expiry that nobody swept before it was overwritten, then the change."""
        now, full = self._now(write), self.scope.history == "full"
        if not full and not _touches_state(write):
            return
        before, after = old.live_state(now), new.live_state(now)
        kept_before = valid(old.live_data(now)) if full else None
        kept_after = valid(new.live_data(now)) if full else None
        if self._finds_state_expired(write, old):
            at = self.clock.write(old.state_expires_at)
            self._add_transition(write, old.state, None, at, ("expiry", ""), kept_before, kept_before)
        if full and self._finds_data_expired(write, old):
            at = self.clock.write(old.data_expires_at)
            self._add_transition(write, before, before, at, ("expiry", ""), valid(old.data), EMPTY)
        if before != after or (full and differ(old.live_data(now), new.live_data(now))):
            self._add_transition(
                write, before, after, self._at(write), self.scope.cause, kept_before, kept_after
            )

    def _finds_state_expired(self, write: Write, old: Content) -> bool:
        now = self.clock.now if write.as_of is None else write.as_of.seen_at
        return _touches_state(write) and old.state is not None and old.live_state(now) is None

    def _finds_data_expired(self, write: Write, old: Content) -> bool:
        touches_data = write.patch.touches_data or write.data_ttl.renew
        return touches_data and old.data != EMPTY and is_past(old.data_expires_at, self._now(write))

    def _change(self, write: Write, old: Content, new: Content) -> Change:
        now, lapses = self._now(write), []
        if self._finds_state_expired(write, old):
            lapses.append(Lapse("state", old.state, _instant(old.state_expires_at)))
        if self._finds_data_expired(write, old):
            lapses.append(Lapse("data", old.state, _instant(old.data_expires_at)))
        has_other_data = differ(old.live_data(now), new.live_data(now))
        return Change(old.live_state(now), new.live_state(now), has_other_data, tuple(lapses))

    def _add_transition(
        self, write: Write, before: str | None, after: str | None, at: str | None,
        cause: tuple[str, str], data_before: str | None, data_after: str | None,
    ) -> None:  # fmt: skip
        parts = write.parts
        self.transitions.append(
            (
                self.scope.alias, write.key, parts.bot_id, parts.chat_id, parts.user_id, before, after, at,
                *cause, data_before, data_after,
            )
        )  # fmt: skip


def _touches_state(write: Write) -> bool:
    return write.patch.state is not KEEP or write.state_ttl.renew


def _content(row: Row) -> Content:
    if row.id is None:
        return _NOTHING
    state_at, data_at = row.state_expires_at, row.data_expires_at
    return Content(
        row.state,
        row.data,
        None if state_at is None else seconds(state_at),
        None if data_at is None else seconds(data_at),
    )


def valid(text: str) -> str | None:
    """Return `text`, or None if it is no JSON, which the history's column does not take."""
    return text if is_json(text) else None


def differ(one: str, other: str) -> bool:
    """Say whether two texts of data differ by more than the order of keys or the way a number is written."""
    return one != other and not (is_json(one) and is_json(other) and json.loads(one) == json.loads(other))


class Expired(NamedTuple):
    """A row of which the sweep clears a part. `at` is when the part expired."""

    id: int
    key: str
    bot_id: int
    chat_id: int
    user_id: int
    thread_id: int | None
    business_connection_id: str | None
    destiny: str
    version: int
    state: str | None
    data: str
    at: str

    def lapsed(self, part: Literal["state", "data"], version: int | None) -> Lapsed:
        parts = StorageKey(
            self.bot_id, self.chat_id, self.user_id, self.thread_id, self.business_connection_id, self.destiny
        )
        return Lapsed(self.key, parts, version, Lapse(part, self.state, _instant(seconds(self.at))))

    def transition(self, part: Literal["state", "data"], scope: Scope) -> tuple[Any, ...]:
        """Return the row that notes the expiry."""
        full = scope.history == "full"
        before = valid(self.data) if full else None
        to_state, after = (None, before) if part == "state" else (self.state, EMPTY)
        return (
            scope.alias, self.key, self.bot_id, self.chat_id, self.user_id, self.state, to_state, self.at,
            "expiry", "", before, after,
        )  # fmt: skip


def due_until(scope: Scope, as_of: AsOf | None) -> tuple[str | None, str, int]:
    """Return what the statements that look for expired rows want: until when, whose, and below which version."""
    if as_of is None:
        return None, scope.alias, LAST_VERSION
    return instant_text(as_of.at), scope.alias, as_of.version


def lapsed_of(states: Sequence[Expired], data: Sequence[Expired], deleted: Collection[int]) -> list[Lapsed]:
    """Return what a sweep says of the rows whose states, and data, it cleared; `deleted` are ids."""
    cleared: list[tuple[Literal["state", "data"], Sequence[Expired]]] = [("state", states), ("data", data)]
    return [
        row.lapsed(part, None if row.id in deleted else row.version + 1)
        for part, rows in cleared
        for row in rows
    ]


def _instant(at: Seconds | None) -> datetime:
    return datetime.fromtimestamp(cast(Seconds, at), UTC)
