import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_storage.admin.jsontext import JSONTextError, compact, pretty, read_json, read_object

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


# A machine may stand still for a while.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(values)
def test_what_is_shown_reads_back_as_the_same(value):
    assert compact(read_json(pretty(value))) == compact(value)
    assert compact(read_json(pretty(value).replace("\n", "\r\n"))) == compact(value)


@unhurried
@given(st.dictionaries(st.text(), values, max_size=4), st.text(), values, values)
def test_a_key_that_is_there_twice_is_refused_wherever_it_is(around, key, one, other):
    twice = f"{{{json.dumps(key)}: {json.dumps(one)}, {json.dumps(key)} : {json.dumps(other)}}}"
    text = json.dumps({**around, "inner": [None]}).replace("[null]", f"[{twice}]")
    with pytest.raises(JSONTextError, match="twice") as caught:
        read_json(text)
    assert text.startswith(json.dumps(key), caught.value.column - 1)


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{\n  "a": 1,\n  "b": }', 3, 8, "value is missing"),
        ('{"a": 1 "b": 2}', 1, 9, "comma"),
        ('{"a" 1}', 1, 6, "colon"),
        ("{'a': 1}", 1, 2, "double quotes"),
        ('{"a": 1,}', 1, None, ""),
        ('{"a": "x}', 1, 7, "closing quote"),
        ('{"a": "x\ny"}', 1, 9, "line break"),
        ("{} x", 1, 4, "after the end"),
        ('{\n "a": NaN}', 2, 7, "NaN is not JSON"),
        ('{"NaN": [-Infinity]}', 1, 10, "-Infinity is not JSON"),
        ('{"a": 1,\n "b": {"c": 1,\n  "c": 2}}', 3, 3, "twice"),
        ('{"a": 1e999}', 1, 7, "too big"),
        ('{"a": ' + "9" * 5000 + "}", 1, 7, "4000 digits"),
        ("  [1]", 1, 3, "object"),
        ("null", 1, 1, "object"),
    ],
)
def test_an_error_names_line_and_column(text, line, column, words):
    with pytest.raises(JSONTextError) as caught:
        read_object(text)
    error = caught.value
    assert error.line == line
    assert column is None or error.column == column
    assert words in error.reason
    assert f"Line {line}, column {error.column}: {error.reason}" == str(error)


def test_the_caret_points_at_the_place_also_in_a_long_line():
    with pytest.raises(JSONTextError) as caught:
        read_object('{"long": "' + "x" * 500 + '", "bad": NaN, "more": "' + "y" * 500 + '"}')
    piece, caret = caught.value.excerpt.split("\n")
    assert piece[caret.index("^") :].startswith("NaN")
    assert len(piece) <= 60


@pytest.mark.parametrize("text", ["", "  \n", "[" * 100_000])
def test_what_has_no_place_is_refused_too(text):
    with pytest.raises(JSONTextError):
        read_object(text)


def test_one_and_true_and_one_point_nought_are_different():
    assert len({compact(value) for value in (1, 1.0, True)}) == 3
