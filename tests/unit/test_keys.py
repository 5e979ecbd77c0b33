"""The text of a key: no two keys share one, and what cannot be kept is refused."""

from __future__ import annotations

from typing import Any

import pytest
from aiogram.fsm.storage.base import DEFAULT_DESTINY, DefaultKeyBuilder, StorageKey
from hypothesis import given
from hypothesis import strategies as st

from fsm_storage.exceptions import InvalidKey, InvalidKeyType
from fsm_storage.keys import MAX_KEY_LENGTH, RecordKeyBuilder, check_key, check_key_text, record_key

build = RecordKeyBuilder().build

ids = st.sampled_from([0, 1, -1, 12, 2**63 - 1, -(2**63)])
# Few characters, those that the text is made of, so that two keys come close to one another.
texts = st.text(":%253Ad", max_size=4) | st.sampled_from([DEFAULT_DESTINY, "é", "e\u0301"])
keys = st.builds(
    StorageKey,
    bot_id=ids,
    chat_id=ids,
    user_id=ids,
    thread_id=st.none() | ids,
    business_connection_id=st.none() | texts,
    destiny=texts,
)


def unescape(text: str) -> str | None:
    return None if not text else "" if text == "%" else text.replace("%3A", ":").replace("%25", "%")


def take_apart(text: str) -> StorageKey:
    """The way back, which only exists if no two keys share a text."""
    parts: list[Any] = [*text.split(":"), "", "", ""][:6]
    bot, chat, user, thread, business, destiny = parts
    return StorageKey(
        bot_id=int(bot),
        chat_id=int(chat),
        user_id=int(user),
        thread_id=int(thread) if thread else None,
        business_connection_id=unescape(business),
        destiny=DEFAULT_DESTINY if unescape(destiny) is None else unescape(destiny) or "",
    )


@given(keys)
def test_the_key_can_be_read_back_from_its_text(key: StorageKey) -> None:
    assert take_apart(build(key)) == key


@given(keys, keys)
def test_two_keys_never_share_a_text(one: StorageKey, other: StorageKey) -> None:
    assert (build(one) == build(other)) == (one == other)


@given(keys, keys)
def test_parts_are_apart_from_each_other_and_from_the_whole(one: StorageKey, other: StorageKey) -> None:
    made = [build(one, "state"), build(one, "data"), build(one, "lock"), build(one)]
    assert len(set(made)) == 4
    assert one == other or not set(made[:3]) & {
        build(other, "state"),
        build(other, "data"),
        build(other, "lock"),
    }


def test_the_text_is_short_and_plain_for_ordinary_chats() -> None:
    assert build(StorageKey(42, -100, 7)) == "42:-100:7"
    assert build(StorageKey(42, -100, 7, thread_id=5)) == "42:-100:7:5"
    assert build(StorageKey(42, -100, 7, business_connection_id="b")) == "42:-100:7::b"
    assert build(StorageKey(42, -100, 7, destiny="d:e")) == "42:-100:7:::d%3Ae"


@given(keys)
def test_ordinary_keys_are_accepted(key: StorageKey) -> None:
    check_key(key)
    check_key_text(build(key))


@pytest.mark.parametrize("part", ["bot_id", "chat_id", "user_id", "thread_id"])
@pytest.mark.parametrize("value", ["1", 1.0, True, b"1", [1]])
def test_an_id_is_an_int(part: str, value: Any) -> None:
    key = StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value})
    with pytest.raises(InvalidKeyType, match=part) as error:
        check_key(key)
    assert (error.value.part, error.value.value) == (part, value)


@pytest.mark.parametrize("part", ["bot_id", "chat_id", "user_id", "thread_id"])
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_an_id_has_64_bits(part: str, value: int) -> None:
    with pytest.raises(InvalidKey, match="64 bits"):
        check_key(StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value}))


@pytest.mark.parametrize("part", ["business_connection_id", "destiny"])
@pytest.mark.parametrize("value", ["\0", "a\ud800b", "x" * (MAX_KEY_LENGTH + 1)])
def test_a_text_can_be_kept(part: str, value: str) -> None:
    with pytest.raises(InvalidKey, match=part):
        check_key(StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value}))


@pytest.mark.parametrize(
    ("part", "value"), [("business_connection_id", 5), ("destiny", 5), ("destiny", None)]
)
def test_a_text_is_a_text(part: str, value: Any) -> None:
    with pytest.raises(InvalidKeyType, match=part):
        check_key(StorageKey(**{"bot_id": 1, "chat_id": 2, "user_id": 3, part: value}))


def test_a_key_that_a_builder_refuses_is_named() -> None:
    key = StorageKey(1, 2, 3, destiny="other")
    with pytest.raises(
        InvalidKey, match=r"text='1:2:3:::other' .* is refused by DefaultKeyBuilder: .*destiny"
    ):
        record_key(key, DefaultKeyBuilder())


def test_what_a_builder_made_has_a_limit() -> None:
    check_key_text("x" * MAX_KEY_LENGTH)
    with pytest.raises(InvalidKey, match=str(MAX_KEY_LENGTH)):
        check_key_text("x" * (MAX_KEY_LENGTH + 1))
