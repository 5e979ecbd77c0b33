"""Keys of aiogram's `DefaultKeyBuilder`, read back."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fsm_storage.sources.layout import KeyLayout

ids = st.integers(-(2**63), 2**63 - 1)
FLAGS = ("with_bot_id", "with_business_connection_id", "with_destiny")


def built(key: StorageKey, layout: KeyLayout) -> str:
    return DefaultKeyBuilder(
        prefix=layout.prefix,
        separator=layout.separator,
        with_bot_id=layout.with_bot_id,
        with_business_connection_id=layout.with_business_connection_id,
        with_destiny=layout.with_destiny,
    ).build(key)


@pytest.mark.parametrize("separator", [":", "-", "::", "."])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
@given(
    bot=st.integers(1, 2**53),
    chat=ids,
    user=st.integers(1, 2**53),
    thread=st.none() | st.integers(1, 2**40),
    business=st.none() | st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,20}", fullmatch=True),
    destiny=st.sampled_from(["default", "other", "5", "менее"]),
)
@settings(deadline=None)  # a machine may be busy
@example(bot=42, chat=-100, user=7, thread=None, business=None, destiny="default")
def test_every_layout_reads_what_aiogram_wrote(
    separator: str, flags: tuple[bool, bool, bool],
    bot: int, chat: int, user: int, thread: int | None, business: str | None, destiny: str,
) -> None:  # fmt: skip
    has_bot, has_business, has_destiny = flags
    assume(thread != user)
    layout = KeyLayout("fsm", separator, *flags, bot_id=None if has_bot else bot)
    key = StorageKey(
        bot, chat, user, thread, business if has_business else None, destiny if has_destiny else "default"
    )
    text = built(key, layout)
    if separator != "-":
        assert layout.parse(text) == key
    else:  # which is a minus too: where two keys are written alike, nobody knows which it was
        with contextlib.suppress(Ambiguous):
            assert built(parsed(layout, text), layout) == text


class Ambiguous(Exception):
    """Allowed where the separator is a minus."""


def parsed(layout: KeyLayout, text: str) -> StorageKey:
    try:
        return layout.parse(text)
    except ValueError as error:
        raise (Ambiguous if "two ways" in str(error) else AssertionError)(str(error)) from error


@pytest.mark.parametrize(
    ("layout", "text", "reason"),
    [
        (KeyLayout(bot_id=42), "other:1:1", "does not fit the layout fsm:<chat>:<topic?>:<user>"),
        (KeyLayout(bot_id=42), "fsm:1", "does not fit"),
        (KeyLayout(bot_id=42), "fsm:a:1", "does not fit"),
        (KeyLayout(bot_id=42), "fsm:1:0:1", "does not fit"),
        (KeyLayout(bot_id=42), "fsm:01:1", "does not fit"),
        (KeyLayout(bot_id=42), "fsm:1:2:3:4", "does not fit"),
        (KeyLayout(bot_id=42), "fsm:42:7:7", "--with-bot-id is missing"),
        (KeyLayout(bot_id=42), "fsm:42:-100:7", "does not fit"),
        (KeyLayout(with_bot_id=True), "fsm:100:7", "does not fit the layout fsm:<bot id>:<chat>"),
        (KeyLayout(with_bot_id=True), "fsm:-100:5:7", "does not fit"),
    ],
)
def test_what_it_cannot_have_written_is_refused_by_name(layout: KeyLayout, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        layout.parse(text)
    assert reason in str(caught.value)


def test_a_number_that_may_be_a_topic_or_a_business_connection_is_a_topic() -> None:
    layout = KeyLayout(with_business_connection_id=True, bot_id=1)
    assert layout.parse("fsm:5:6:7") == StorageKey(1, 5, 7, 6)
    assert layout.parse("fsm:b5:6:7") == StorageKey(1, 6, 7, None, "b5")


def test_a_destiny_may_hold_the_separator() -> None:
    layout = KeyLayout(with_destiny=True, bot_id=1)
    assert layout.parse("fsm:5:7:a:b") == StorageKey(1, 5, 7, destiny="a:b")


def test_the_part_comes_off_and_on() -> None:
    layout = KeyLayout(separator="::")
    assert layout.split("fsm::1::2::state") == ("fsm::1::2", "state")
    assert layout.join("fsm::1::2", "state") == "fsm::1::2::state"
    with pytest.raises(ValueError, match="ends in none of ::state"):
        layout.split("fsm::1::2:state")
