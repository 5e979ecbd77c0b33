"""The outbox: what was encoded is decoded whole, ids become growing numbers, and rubbish is named."""

from __future__ import annotations

import json

import pytest
from aiogram.fsm.storage.base import StorageKey
from hypothesis import given
from hypothesis import strategies as st

from fsm_storage.exceptions import InvalidOutboxRecord
from fsm_storage.outbox import (
    Record,
    decode,
    decode_key,
    decode_record,
    encode,
    encode_key,
    expires_at_ms,
    missed_name,
    stream_name,
    version_of,
    written_at_ms,
)

KEY = StorageKey(bot_id=42, chat_id=-100, user_id=7)
ids = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
keys = st.builds(StorageKey, ids, ids, ids, st.none() | ids, st.none() | texts, st.just("default") | texts)
records = st.builds(
    Record,
    keys,
    st.sampled_from(["state", "data"]),
    texts,
    st.none() | st.integers(1, 2**52),
    texts,
    texts,
) | st.builds(Record, keys, st.sampled_from(["state", "data"]), st.none(), st.none(), texts, texts)


def as_dict(pairs: list[str]) -> dict[bytes, bytes]:
    """What redis-py makes of an entry."""
    return {field.encode(): value.encode() for field, value in zip(pairs[::2], pairs[1::2], strict=True)}


@given(st.lists(records, max_size=5))
def test_decode_undoes_encode_in_order_and_with_repeats(written: list[Record]) -> None:
    assert decode(as_dict(encode([*written, *written]))) == [*written, *written]


@given(keys)
def test_decode_key_undoes_encode_key(key: StorageKey) -> None:
    assert decode_key(encode_key(key).encode()) == key


def test_an_entry_reads_well_in_redis_cli() -> None:
    pairs = encode([Record(KEY, "state", "Form:name", 172_800_000), Record(KEY, "data", None)])
    assert pairs == ['[0,"state",172800000,42,-100,7]', "Form:name", '[1,"-data",null,42,-100,7]', ""]


@given(st.tuples(st.integers(0, 2**43 - 1), st.integers(0, 2**20 - 1)), st.data())
def test_versions_grow_as_ids_do(first: tuple[int, int], data: st.DataObject) -> None:
    second = data.draw(st.tuples(st.integers(0, 2**43 - 1), st.integers(0, 2**20 - 1)))
    one, other = version_of("{}-{}".format(*first)), version_of("{}-{}".format(*second).encode())
    assert (one < other) == (first < second)
    assert 0 <= one < 2**63


def test_more_entries_than_a_millisecond_holds_count_on() -> None:
    assert version_of(f"5-{2**20 - 1}") + 1 == version_of(f"5-{2**20}") == version_of("6-0")


def test_an_expiry_is_counted_from_the_id() -> None:
    assert written_at_ms(b"1700000000000-3") == 1_700_000_000_000
    assert expires_at_ms("1700000000000-3", Record(KEY, "state", "a", 1500)) == 1_700_000_001_500
    assert expires_at_ms("1700000000000-3", Record(KEY, "state", "a")) is None


@pytest.mark.parametrize(
    "header",
    [
        "", "{}", "[]", "[0]", "null", b"\xff", "[" * 100_000,
        '[0,"lock",null,42,-100,7]',
        '[0,5,null,42,-100,7]',
        '[0,"state",0,42,-100,7]',
        '[0,"state",1.5,42,-100,7]',
        '[0,"state",null,42,-100]',
        '[0,"state",null,42,-100,"7"]',
        '[0,"state",null,42,-100,9223372036854775808]',
        '[0,"state",null,42,-100,7,null,null,"default","","","more"]',
        '[0,"state",null,42,-100,7,null,null,"default",5,""]',
    ],
)  # fmt: skip
def test_what_is_no_record_is_named(header: str | bytes) -> None:
    with pytest.raises(InvalidOutboxRecord, match="is no record of the outbox"):
        decode_record(header, b"x")


def test_a_bad_record_leaves_the_others_of_its_entry() -> None:
    good = Record(KEY, "state", "a")
    first, bad, last = decode({**as_dict(encode([good])), b"what": b"ever", b'[1,"data",null,1,2,3]': b"{}"})
    assert first == good
    assert isinstance(bad, InvalidOutboxRecord)
    assert last == Record(StorageKey(1, 2, 3), "data", "{}")


def test_a_value_that_is_no_utf8_is_named() -> None:
    with pytest.raises(InvalidOutboxRecord):
        decode_record('[0,"state",null,1,2,3]', b"\xff")


@pytest.mark.parametrize("text", ["", "[1,2]", "[1,2,3,null,null,null]", json.dumps([1, 2, "3"])])
def test_what_is_no_key_is_named(text: str) -> None:
    with pytest.raises(InvalidOutboxRecord):
        decode_key(text)


@pytest.mark.parametrize("entry_id", ["", "5", "5-", "-5", "a-b", "1-2-3", f"{2**43}-0", "٣-١"])
def test_what_is_no_id_is_named(entry_id: str) -> None:
    with pytest.raises(InvalidOutboxRecord):
        version_of(entry_id)


def test_the_keys_of_an_alias_share_a_slot() -> None:
    assert stream_name("bots") == "fsm_storage:{bots}:outbox"
    assert missed_name("bots") == "fsm_storage:{bots}:missed"
