from datetime import timedelta

import pytest

from fsm_storage.durations import in_words, parse_duration


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("2h", timedelta(hours=2)),
        (" 30 m ", timedelta(minutes=30)),
        ("3D", timedelta(days=3)),
        ("1w", timedelta(weeks=1)),
        ("1d 12h", timedelta(days=1, hours=12)),
        ("1.5h", timedelta(minutes=90)),
        ("45s", timedelta(seconds=45)),
        ("90min", timedelta(minutes=90)),
    ],
)
def test_a_duration_is_read(text, span):
    assert parse_duration(text) == span


@pytest.mark.parametrize(
    "text",
    ["", "2", "h", "-2h", "2x", "0s", "0.5s", "101w2y", "36501d", "²h", "2h;", "1e9d", "9" * 400 + "d"],
)
def test_nonsense_is_refused_with_what_to_type(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (timedelta(seconds=0), "0 s"),
        (timedelta(seconds=59), "59 s"),
        (timedelta(minutes=5, seconds=59), "5 min"),
        (timedelta(hours=1, minutes=20), "1 h 20 min"),
        (timedelta(hours=3, minutes=20), "3 h"),
        (timedelta(days=1, hours=4), "1 d 4 h"),
        (timedelta(days=12, hours=4), "12 d"),
        (-timedelta(minutes=5), "5 min"),
    ],
)
def test_a_span_is_told_as_people_say_it(span, words):
    assert in_words(span) == words
