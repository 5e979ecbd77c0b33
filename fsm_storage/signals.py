"""What is told when records have changed, after the commit. Every write path comes through here.

- `state_changed`: `old_state`, `new_state`
- `data_changed`: what the data is now, a receiver asks the storage
- `conversation_expired`: `part` ("state" or "data"), `state` (the record's, before), `expired_at`

All have `alias`, `key` (aiogram's), `record_key` (its text), `version` (None: the record is gone),
`source` and `actor`, as in `FSMTransition`. The sender is the storage's class.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from aiogram.fsm.storage.base import StorageKey
from django.dispatch import Signal

from fsm_storage.dialects import Cause, Change, Lapsed, Write, Written

logger = logging.getLogger("fsm_storage")

state_changed = Signal()
data_changed = Signal()
conversation_expired = Signal()

Hint = Callable[[str, Sequence[tuple[str, int | None]]], None]
hints: list[Hint] = []
"""Called with the alias, and the keys and versions (None: gone) of what a commit wrote.

Cheaper than the signals: once for a batch, without asking what has changed, and so also for a
write that changed nothing. In the thread that committed, which must not be held up.
"""

PATIENCE = 1.0
"""Seconds for which a write of the bot waits for slow receivers. They go on by themselves."""

_EXPIRY = Cause("expiry")
_at_work: set[asyncio.Task[None]] = set()


class News(NamedTuple):
    """A change that was committed."""

    alias: str
    key: StorageKey
    record_key: str
    version: int | None
    cause: Cause
    change: Change


def is_heard() -> bool:
    """Say whether anybody listens to a signal. Asked before each write, so it does no more than look."""
    return bool(state_changed.receivers or data_changed.receivers or conversation_expired.receivers)


def hint(alias: str, written: Sequence[tuple[str, int | None]]) -> None:
    """Call the hints. What one of them raises is logged, and stops there."""
    for callback in hints:
        try:
            callback(alias, written)
        except Exception:
            logger.exception("a hint of %d changes in storage %r failed", len(written), alias)


def tell(sender: type, news: News) -> None:
    """Send the signals from synchronous code. What a receiver raises is logged by Django."""
    for signal, arguments in _messages(news):
        signal.send_robust(sender, **arguments)


async def atell(sender: type, news: News) -> None:
    """Send the signals and wait for the receivers, for `PATIENCE` seconds. A cancelled caller only stops waiting."""
    task = asyncio.ensure_future(_send(sender, news))
    _at_work.add(task)
    task.add_done_callback(_at_work.discard)
    done, _ = await asyncio.wait([task], timeout=PATIENCE)
    if not done:
        logger.warning(
            "receivers of a change of %r are slow: the write goes on without them", news.record_key
        )


async def _send(sender: type, news: News) -> None:
    for signal, arguments in _messages(news):
        await signal.asend_robust(sender, **arguments)


def _messages(news: News) -> Iterator[tuple[Signal, dict[str, Any]]]:
    """Yield each signal and its arguments: what had expired first, as in the history."""
    change = news.change
    for lapse in change.lapses:
        about = _about(news, _EXPIRY)
        yield (
            conversation_expired,
            {**about, "part": lapse.part, "state": lapse.state, "expired_at": lapse.at},
        )
        if lapse.part == "state":
            yield state_changed, {**about, "old_state": lapse.state, "new_state": None}
        else:
            yield data_changed, about
    about = _about(news, news.cause)
    if change.old_state != change.new_state:
        yield state_changed, {**about, "old_state": change.old_state, "new_state": change.new_state}
    if change.data_changed:
        yield data_changed, about


def _about(news: News, cause: Cause) -> dict[str, Any]:
    return {
        "alias": news.alias,
        "key": news.key,
        "record_key": news.record_key,
        "version": news.version,
        "source": cause.source,
        "actor": cause.actor,
    }


def hint_of(alias: str, writes: Sequence[Write], replies: Sequence[Any]) -> None:
    """Hint at those of `writes` that left a record behind."""
    if hints:
        pairs = zip(writes, replies, strict=True)
        hint(
            alias, [(w.key, r.version) for w, r in pairs if isinstance(r, Written) and r.version is not None]
        )


def announce(sender: type, alias: str, writes: Sequence[Write], replies: Sequence[Any], cause: Cause) -> None:
    """Hint at and tell what synchronous code has written and committed."""
    hint_of(alias, writes, replies)
    for write, reply in zip(writes, replies, strict=True):
        if isinstance(reply, Written) and reply.change is not None:
            tell(sender, News(alias, write.parts, write.key, reply.version, cause, reply.change))


def announce_deleted(
    sender: type, alias: str, writes: Sequence[Write], replies: Sequence[Any], cause: Cause
) -> None:
    """Hint at records that were cleared and are gone, and tell what the clearing has changed."""
    hint(alias, [(write.key, None) for write in writes])
    for write, reply in zip(writes, replies, strict=True):
        if isinstance(reply, Written) and reply.change is not None:
            tell(sender, News(alias, write.parts, write.key, None, cause, reply.change))


def announce_lapsed(sender: type, alias: str, lapsed: Sequence[Lapsed]) -> None:
    """Hint at and tell what a sweep has cleared: nothing else has changed."""
    hint(alias, [(one.key, one.version) for one in lapsed])
    for one in lapsed:
        change = Change(None, None, False, (one.lapse,))
        tell(sender, News(alias, one.parts, one.key, one.version, _EXPIRY, change))
