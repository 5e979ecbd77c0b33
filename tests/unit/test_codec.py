"""Data to text and back: exact, or refused with the place."""

from __future__ import annotations

import functools
import json
import operator
from decimal import Decimal

import pytest
from aiogram.exceptions import DataNotDictLikeError
from hypothesis import given
from hypothesis import strategies as st

from fsm_storage.codec import MAX_DEPTH, MAX_LENGTH, Codec, _depth, outside_strings
from fsm_storage.dialects.postgresql import exact
from fsm_storage.exceptions import CorruptData, InvalidData, InvalidDataType
from fsm_storage.patches import EMPTY

CODEC = Codec()
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
data = st.dictionaries(texts, values, max_size=5)


def nested(levels: int) -> dict:
    root: dict = {}
    for _ in range(levels - 1):
        root = {"a": root}
    return root


@given(data)
def test_what_is_encoded_comes_back_equal(value):
    back = CODEC.decode(CODEC.encode(value, "key"), "key")
    assert back == value
    assert json.dumps(back, sort_keys=True) == json.dumps(value, sort_keys=True)


@given(st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=4))
def test_exponents_are_written_out_without_changing_a_float(value):
    text = exact(CODEC.encode(value, "key"))
    assert "e+" not in "".join(outside_strings(text)[::2])
    assert json.loads(text) == value
    assert all(isinstance(number, float) for number in json.loads(text).values())


@given(texts)
def test_exponents_in_texts_are_left_alone(value):
    text = CODEC.encode({"text": f'{value} 1e+23 \\ " 2E9'}, "key")
    assert exact(text) == text


@given(data, st.lists(data, min_size=1, max_size=3), st.sampled_from(["", " ", "\n"]))
def test_fold_is_dict_update(base, over, space):
    text = f"{space}{CODEC.encode(base, 'key')}{space}"
    text, value = CODEC.fold("key", text, tuple(CODEC.encode(one, "key") for one in over))
    expected = functools.reduce(operator.or_, over, base)
    assert json.loads(text) == value == expected
    assert (text == EMPTY) is (expected == {})
    assert len(json.loads(text, object_pairs_hook=list)) == len(expected)  # no key twice


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": float("nan")}, "a is nan"),
        ({"a": [1, {"b": float("inf")}]}, "a[1].b is inf"),
        ({"a": {"b": ["x", "y\0"]}}, "a.b[1] contains NUL"),
        ({"a": "\ud800"}, "a contains a lone surrogate"),
        ({"a": {"\0": 1}}, "a has a key that contains NUL"),
        ({"\ud800": 1}, "has a key that contains a lone surrogate"),
        ({1: "a", "1": "b"}, "has the keys 1 and '1'"),
        ({"a": {True: 1, "true": 2}}, "a has the keys True and 'true'"),
        ({"a": 10**5000}, "a Exceeds the limit"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (nested(5_000), "nested deeper"),
        (nested(100_000), "nested deeper"),
        ({"a": "x" * MAX_LENGTH}, "over the limit"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_path(value, path):
    with pytest.raises(InvalidData) as caught:
        CODEC.encode(value, "42:1:1")
    assert path in str(caught.value)
    assert "'42:1:1'" in str(caught.value)
    # Python 3.11 cannot take apart a dict of 100,000 levels by itself without a deep C stack.
    while value and isinstance(value.get("a"), dict):
        value = value.pop("a")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {1, 2}}, "a is a set"),
        ({"a": [b"x"]}, "a[0] is a bytes"),
        ({"a": Decimal(1)}, "a is a Decimal"),
        ({"a": {(1, 2): 3}}, "a has a key of type tuple"),
    ],
)
def test_a_type_that_json_does_not_have_is_refused_with_its_path(value, path):
    with pytest.raises(InvalidDataType) as caught:
        CODEC.encode(value, "key")
    assert path in str(caught.value)


def test_data_that_contains_itself_is_refused():
    value: dict = {"a": []}
    value["a"].append(value)
    with pytest.raises(InvalidData):
        CODEC.encode(value, "key")


def test_keys_of_several_types_are_kept_as_json_does_when_no_two_meet():
    assert CODEC.decode(CODEC.encode({1: "a", "b": 2, None: 3}, "key"), "key") == {
        "1": "a",
        "b": 2,
        "null": 3,
    }


@pytest.mark.parametrize("value", [[1], (), None, "text", {1}])
def test_what_is_no_dict_is_refused_as_aiogram_does(value):
    with pytest.raises(DataNotDictLikeError, match="data of '42:1:1' must be a dict, not"):
        CODEC.encode(value, "42:1:1")


@pytest.mark.parametrize("text", ["[]", "null", "1", '"a"', "{", "", "\ufeff{}", "[" * 100_000])
def test_stored_text_that_is_no_object_is_named(text):
    with pytest.raises(CorruptData, match="'42:1:1'"):
        CODEC.decode(text, "42:1:1")


def test_custom_functions_keep_their_types():
    def dumps(value):
        return json.dumps(value, default=lambda item: {"$decimal": str(item)})

    def loads(text):
        return json.loads(
            text, object_hook=lambda item: Decimal(item["$decimal"]) if "$decimal" in item else item
        )

    codec = Codec(loads, dumps)
    text = codec.encode({"price": Decimal("1.10")}, "key")
    assert codec.decode(codec.fold("key", text, (codec.encode({"n": 1}, "key"),))[0], "key") == {
        "price": Decimal("1.10"),
        "n": 1,
    }


@pytest.mark.parametrize(
    ("dumps", "reason"),
    [
        (json.dumps, "NaN is not JSON"),
        (lambda value: "pickled", "something else than JSON"),
        (lambda value: "[1]", "became a JSON list"),
        (lambda value: b'{"a": "\\u0000"}', "contains NUL"),
        (lambda value: '{"a": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_custom_dumps_cannot_smuggle_anything_in(dumps, reason):
    with pytest.raises(InvalidData, match=reason):
        Codec(dumps=dumps).encode({"a": float("nan")}, "key")


@given(values)
def test_depth_is_the_nesting(value):
    def slowly(item):
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        return 0 if children is None else 1 + max(map(slowly, children), default=0)

    assert _depth(json.dumps(value)) == slowly(value)
