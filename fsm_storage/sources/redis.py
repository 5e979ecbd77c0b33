"""What aiogram's `RedisStorage` keeps in Redis: a key for the state and one for the data of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from fsm_storage.sources import broken
from fsm_storage.sources.layout import KeyLayout, Part
from fsm_storage.sources.values import data_of
from fsm_storage.transfer import Conversation, Found, Refused

BATCH = 200
"""Keys in one answer. Each may hold megabytes."""
SOON_MS = 600_000
"""A part that expires within this may be gone when the scan comes to its key."""


class _Value(NamedTuple):
    """A part as it is in Redis: None if it is not there. `expires_at` None: never."""

    content: Any
    expires_at: datetime | None


def read(url: str, layout: KeyLayout, clock: Callable[[], datetime]) -> Iterator[Found]:
    """Yield the conversations in Redis, as SCAN finds them; in batches, with a time limit for each answer.

    A conversation that has both keys is yielded with its data's, so nothing must be remembered. Keys
    that come or go while it runs may be missed, as SCAN says. One may come twice, when its data is about
    to expire, or SCAN names a key twice.
    """
    try:
        with Redis.from_url(url, socket_timeout=10, socket_connect_timeout=10) as client:
            found = client.scan_iter(match=_escaped(layout.beginning) + "*", count=BATCH)
            batch: list[bytes | str] = []
            for name in found:
                batch.append(name)
                if len(batch) == BATCH:
                    yield from _read_batch(client, batch, layout, clock)
                    batch = []
            yield from _read_batch(client, batch, layout, clock)
    except (RedisError, OSError, ValueError) as error:
        broken(url, error)


def _read_batch(
    client: Redis, names: Sequence[bytes | str], layout: KeyLayout, clock: Callable[[], datetime]
) -> Iterator[Found]:
    wanted: list[tuple[str, Part]] = []
    for raw in names:
        try:
            name = raw if isinstance(raw, str) else raw.decode()
            text, part = layout.split(name)
        except ValueError as error:
            yield Found(f"key {raw!r}", Refused(str(error)))
            continue
        if part != "lock":
            wanted.append((text, part))
    pipeline = client.pipeline(transaction=False)
    for text, _ in wanted:
        for key in (layout.join(text, "state"), layout.join(text, "data")):
            pipeline.pttl(key)
            pipeline.get(key)
    now = clock()
    replies = pipeline.execute(raise_on_error=False)
    for place, (text, part) in enumerate(wanted):
        pttl, state, data_pttl, data = replies[4 * place : 4 * place + 4]
        values = _value(pttl, state, now), _value(data_pttl, data, now)
        comes_with_data = data is not None and not 0 <= data_pttl < SOON_MS
        if part == "data" or not comes_with_data:
            yield from _conversation(text, *values, layout)


def _value(pttl: Any, content: Any, now: datetime) -> _Value:
    if isinstance(pttl, RedisError):
        raise pttl
    if isinstance(content, RedisError) and not isinstance(content, ResponseError):
        raise content  # of the connection, not of this key
    return _Value(content, now + timedelta(milliseconds=pttl) if pttl >= 0 else None)


def _conversation(text: str, state: _Value, data: _Value, layout: KeyLayout) -> Iterator[Found]:
    if state.content is None and data.content is None:
        return  # gone since the scan
    try:
        key = layout.parse(text)
    except ValueError as error:
        yield Found(f"key {text!r}", Refused(str(error)))
        return
    part: Part = "state"
    try:
        state_text = _state_of(state.content)
        part = "data"
        content = data_of(data.content)
    except (ValueError, TypeError, ResponseError) as error:
        yield Found(f"key {layout.join(text, part)!r}", Refused(str(error)))
        return
    yield Found(f"key {text!r}", Conversation(key, state_text, content, state.expires_at, data.expires_at))


def _state_of(content: Any) -> str | None:
    if isinstance(content, ResponseError):
        raise content
    return content.decode() if isinstance(content, bytes) else content


def _escaped(text: str) -> str:
    """Return `text` for a pattern of SCAN, in which it stands for itself."""
    return "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in text)
