import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import fsm_storage
from fsm_storage.admin.presentation import COLOURS, badge, colour_of, expiry
from tests.web.conftest import XSS

CSS = (Path(fsm_storage.__file__).parent / "static/fsm_storage/admin.css").read_text()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_badge_is_readable_in_light_and_in_dark():
    both = r"light-dark\((#\w{6}), (#\w{6})\);"
    found = re.findall(rf"--fsm-bg-(\d+): {both} --fsm-fg-\1: {both}", CSS)
    assert len(found) == COLOURS
    pairs = [pair for _, *colours in found for pair in (colours[::2], colours[1::2])]  # light; dark
    for background, text in pairs:
        low, high = sorted([luminance(background), luminance(text)])
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert all(f".fsm-c{number} {{" in CSS for number in range(COLOURS))


def test_a_group_keeps_its_colour():
    assert [colour_of(group) for group in ("Order", "Support", "Feedback", "Lunch")] == [4, 9, 10, 11]


def test_the_style_sheet_asks_no_other_host():
    assert "http" not in CSS
    assert "@import" not in CSS
    assert "url(" not in CSS


def test_a_declared_state_is_not_marked_and_another_one_is():
    assert "undeclared" not in badge("Order:item")
    assert "undeclared" in badge("Order:gone")
    assert "no state" in badge(None)
    assert "undeclared" in badge("")


@pytest.mark.parametrize("state", [XSS, f"{XSS}:x", f"x:{XSS}", '" onmouseover="x', "a'b\"c"])
def test_a_state_is_text(state):
    html = badge(state)
    assert "<script" not in html
    assert '" onmouseover' not in html


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (NOW + timedelta(hours=3), ">in 3 h<"),
        (NOW + timedelta(minutes=45), ">in 45 min<"),
        (NOW - timedelta(minutes=5), ">expired 5 min ago<"),
        (NOW, ">expired 0 s ago<"),
        (None, ">never<"),
    ],
)
def test_an_expiry_is_told_as_people_say_it_with_the_exact_time_behind(at, words):
    html = expiry(at, NOW)
    assert words in html
    if at is not None:
        assert f'datetime="{at.isoformat()}"' in html
        assert f'title="{at:%Y-%m-%d %H:%M:%S} UTC"' in html
