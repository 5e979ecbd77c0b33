"""The funnel through the test client: rates, people, CSV, and what is refused."""

from __future__ import annotations

import csv
import re
from datetime import timedelta
from io import StringIO

import pytest
from django.utils import timezone

from fsm_storage.admin.funnels import as_cell, rows_of
from fsm_storage.figures import Scope, depth_of, funnel, median, window_start
from fsm_storage.models import FSMTransition
from fsm_storage.rollup import Roller, span_of
from tests.web.conftest import LIST, html_of

FUNNEL, PEOPLE, CSV = f"{LIST}funnel/", f"{LIST}funnel/people/", f"{LIST}funnel/csv/"
STEPS = "group=Order&step=Order:item&step=Order:size&step=Order:payment"


@pytest.fixture
def walk(db):
    """Let conversation `number` go through `states`, a minute for each step."""

    def walk(number, *states, minutes=50, bot=42):
        at, before = timezone.now() - timedelta(minutes=minutes), None
        for state in states:
            FSMTransition.objects.create(
                alias="default", key=f"{bot}:{number}:{number}", bot_id=bot, chat_id=number, user_id=number,
                from_state=before, to_state=state, at=at,
            )  # fmt: skip
            before, at = state, at + timedelta(minutes=1)

    return walk


@pytest.fixture
def five(walk):
    """Five begin; three come to the size, one pays; one of the five goes back and forth."""
    walk(1, "Order:item", "Order:size", "Order:payment", None)
    walk(2, "Order:item", "Order:size", "Order:item", "Order:size")
    walk(3, "Order:item", "Order:size", None)
    walk(4, "Order:item", None)
    walk(5, "Order:item")
    walk(6, "Support:topic")


def table(html):
    """Give the cells of the funnel, row by row."""
    rows = re.findall(r"<tr>\s*<th scope=\"row\">(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r'<td class="fsm-number"[^>]*>(?:<a[^>]*>)?([^<]*)', row) for row in rows]


def links(html):
    return [url.replace("&amp;", "&") for url in re.findall(r'href="(/[^"]*people/[^"]*)"', html)]


@pytest.mark.parametrize("batch", [0, 1, 4, 100])
def test_each_conversation_counts_once_and_the_rates_follow(agent, five, batch):
    """Before, amid and after a roll-up. A minute is in the class from 32 to 64 seconds."""
    if batch:
        next(Roller("default", batch).roll())
    assert table(html_of(agent.get(f"{FUNNEL}?{STEPS}"))) == [
        ["5", "–", "100.0%", "–", "2"],
        ["3", "60.0%", "60.0%", "45 s", "2"],
        ["1", "33.3%", "20.0%", "45 s", ""],
    ]


@pytest.mark.parametrize("is_rolled", [False, True])
def test_every_number_leads_to_as_many_people(agent, five, is_rolled):
    if is_rolled:
        list(Roller("default").roll())
    html = html_of(agent.get(f"{FUNNEL}?{STEPS}"))
    counts = [
        re.search(rf'href="{re.escape(url)}"[^>]*>([^<]*)<', html.replace("&amp;", "&"))[1]
        for url in links(html)
    ]
    assert counts == ["5", "2", "3", "2", "1"]
    for url, count in zip(links(html), counts, strict=True):
        people = re.findall(r'<th scope="row">(?:<a[^>]*>)?(\d+)', html_of(agent.get(url)))
        assert len(people) == int(count), url


def test_the_people_who_came_no_further_are_those(agent, five):
    html = html_of(agent.get(f"{PEOPLE}?{STEPS}&at=2&who=left"))
    assert re.findall(r'<th scope="row">(\d+)', html) == ["3", "2"]
    assert "Came to Order:size and no further" in html


def test_people_lead_to_their_conversation_while_there_is_one(agent, five, make_record):
    record = make_record(key="42:2:2", chat_id=2, state="Order:size")
    html = html_of(agent.get(f"{PEOPLE}?{STEPS}&at=2&who=left"))
    assert f'href="{LIST}{record.pk}/change/">2</a>' in html
    assert ">gone<" in html


def test_long_lists_of_people_go_on_where_they_ended(agent, walk, monkeypatch):
    monkeypatch.setattr("fsm_storage.admin.funnels.PEOPLE_PER_PAGE", 3)
    for number in range(7):
        walk(number, "Order:item", minutes=10 + number % 2)
    list(Roller("default").roll())
    walk(7, "Order:item", minutes=11)
    url, seen = f"{PEOPLE}?{STEPS}&at=1", []
    while url:
        html = html_of(agent.get(url))
        seen += re.findall(r'<th scope="row">(\d+)', html)
        more = re.search(r'rel="next" href="([^"]*)"', html)
        url = more and PEOPLE + more[1].replace("&amp;", "&")
    assert sorted(map(int, seen)) == list(range(8))


def test_who_starts_again_is_a_new_conversation(agent, walk):
    walk(1, "Order:item", "Order:size", None, "Order:item")
    assert [row[0] for row in table(html_of(agent.get(f"{FUNNEL}?{STEPS}")))] == ["2", "1", "0"]


def test_what_began_before_the_window_does_not_count(agent, walk):
    walk(1, "Order:item", "Order:size", minutes=60 * 26)
    walk(2, "Order:item", minutes=60 * 23)
    assert table(html_of(agent.get(f"{FUNNEL}?{STEPS}&window=24h")))[0][0] == "1"
    assert table(html_of(agent.get(f"{FUNNEL}?{STEPS}&window=7d")))[0][0] == "2"


def test_of_one_bot(agent, walk):
    walk(1, "Order:item")
    walk(2, "Order:item", bot=43)
    assert table(html_of(agent.get(f"{FUNNEL}?{STEPS}&bot=43")))[0][0] == "1"


def test_without_a_choice_the_first_groups_states_are_the_steps(agent, five):
    html = html_of(agent.get(FUNNEL))
    assert len(table(html)) > 1
    assert re.search(r'name="step">.*?selected', html, re.DOTALL)


def test_steps_of_another_group_than_the_chosen_one_give_way(agent, five):
    html = html_of(agent.get(f"{FUNNEL}?{STEPS.replace('group=Order', 'group=Support')}"))
    assert [row[0] for row in table(html)] == ["1", "0", "0"]


def test_the_csv_says_what_the_page_says(as_user, five):
    response = as_user("view_fsmrecord", "export_fsmrecord").get(f"{CSV}?{STEPS}")
    assert response["Content-Type"].startswith("text/csv")
    rows = list(csv.reader(StringIO(html_of(response))))
    assert rows[0] == [
        "step",
        "state",
        "reached",
        "left",
        "rate_of_step_before",
        "rate_of_first_step",
        "median_seconds",
    ]
    assert [row[:6] for row in rows[1:]] == [
        ["1", "Order:item", "5", "2", "", "1.0"],
        ["2", "Order:size", "3", "2", "0.6", "0.6"],
        ["3", "Order:payment", "1", "0", "0.3333", "0.2"],
    ]


def test_the_csv_needs_the_permission_to_export(as_user, five):
    assert as_user("view_fsmrecord").get(f"{CSV}?{STEPS}").status_code == 403
    assert as_user("export_fsmrecord").get(f"{CSV}?{STEPS}").status_code == 403
    assert "/csv/" not in html_of(as_user("view_fsmrecord").get(f"{FUNNEL}?{STEPS}"))
    assert "/csv/" in html_of(as_user("view_fsmrecord", "export_fsmrecord").get(f"{FUNNEL}?{STEPS}"))


@pytest.mark.parametrize("state", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_of_the_csv_is_a_formula(as_user, walk, state):
    walk(1, state)
    body = html_of(
        as_user("view_fsmrecord", "export_fsmrecord").get(CSV, {"step": state, "group": "~nogroup"})
    )
    row = next(csv.reader(StringIO(body.split("\r\n", 1)[1], newline="")))
    assert row[1:3] == [f"'{state}", "1"]
    assert as_cell("Order:item") == "Order:item"


@pytest.mark.parametrize(
    "query",
    [
        f"{STEPS}&at=0", f"{STEPS}&at=9", f"{STEPS}&at=x", STEPS, f"{STEPS}&at=1&before=x_y",
        f"{STEPS}&at=1&before=2026-99-01T00:00:00Z_1", f"{STEPS}&at=1&before=2026-01-01T00:00:00_1", "",
    ],
)  # fmt: skip
def test_what_means_nothing_is_no_error(agent, five, query):
    assert agent.get(f"{PEOPLE}?{query}").status_code == 200


def test_too_many_steps_and_steps_named_twice_are_told(agent, five):
    many = "&".join(f"step=Order:{number}" for number in range(20))
    assert "at most 12 steps" in html_of(agent.get(f"{FUNNEL}?group=Order&{many}"))
    assert "only once" in html_of(agent.get(f"{FUNNEL}?group=Order&step=Order:item&step=Order:item"))


@pytest.mark.parametrize(
    ("path", "steps", "depth"),
    [
        ("abc", "abc", 3),
        ("acb", "abc", 2),
        ("bac", "abc", 1),
        ("bc", "abc", 0),
        ("axbyc", "abc", 3),
        ("a", "", 0),
    ],
)
def test_how_far_a_path_comes(path, steps, depth):
    assert depth_of(path, steps) == depth


@pytest.mark.django_db
def test_a_funnel_without_anybody_has_no_rates():
    found = funnel(["A", "B"], Scope(window_start(timedelta(hours=1))))
    assert [row[1:] for row in rows_of(found)] == [(0, 0, None, None, None), (0, 0, None, None, None)]


@pytest.mark.parametrize("seconds", [0.2, 1, 7, 100, 5000, 10**7])
def test_the_median_is_within_the_class_of_the_times(seconds):
    time = timedelta(seconds=seconds)
    found = median({span_of(time): 9, span_of(time * 1000): 2})
    assert found is not None
    assert found / 2 <= max(time, timedelta(seconds=0.5)) <= found * 2


def test_the_median_of_nothing_is_none():
    assert median({}) is None
    assert median({-1: 5}) is None
