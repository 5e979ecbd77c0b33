"""The map through the test client: figures, links, texts from outside, permissions."""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from django.contrib.staticfiles import finders
from django.core.management import call_command
from django.utils import timezone

from fsm_storage.models import FSMTransition
from fsm_storage.rollup import Roller
from tests.web.conftest import LIST, XSS, html_of

MAP = f"{LIST}map/"


@pytest.fixture
def note(db):
    """Write a transition of conversation `number`, some minutes ago."""

    def note(number, before, after, minutes=10, **fields):
        return FSMTransition.objects.create(
            **{
                "alias": "default",
                "key": f"42:{number}:{number}",
                "bot_id": 42,
                "chat_id": number,
                "user_id": number,
            }
            | {
                "from_state": before,
                "to_state": after,
                "at": timezone.now() - timedelta(minutes=minutes),
                **fields,
            }
        )

    return note


@pytest.fixture
def walked(note, make_record):
    """Three people order: one finishes, one lets it expire, one is on the way."""
    for number in (1, 2, 3):
        note(number, None, "Order:item", 30)
        note(number, "Order:item", "Order:size", 28)
    note(1, "Order:size", None, 5)
    note(2, "Order:size", None, 4, source="expiry")
    return make_record(key="42:3:3", chat_id=3, user_id=3, state="Order:size")


def nodes(html):
    """Give the nodes of the SVG: their titles and where they lead."""
    found = re.findall(r'<a href="([^"]*)" aria-label="([^"]*)"><g class="fsm-node', html)
    return {title: url.replace("&amp;", "&") for url, title in found}


def ways(html):
    return set(re.findall(r"<title>([^<]* → [^<]*)</title>", html))


def test_the_map_shows_who_is_where_and_how_they_moved(agent, walked):
    html = html_of(agent.get(MAP))
    assert re.search("Order:size: 1 conversation now, stay about 2. min", " ".join(nodes(html)))
    assert ways(html) == {
        "entry → Order:item: 3",
        "Order:item → Order:size: 3",
        "Order:size → cleared: 1",
        "Order:size → expired: 1",
    }
    assert "entry" in nodes(html)
    assert "fsm-stay-1" in html  # two minutes in `item`


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_map_is_the_same_before_amid_and_after_a_roll_up(agent, walked, batch):
    before = ways(html_of(agent.get(MAP)))
    roller = Roller("default", batch)
    next(roller.roll())
    assert ways(html_of(agent.get(MAP))) == before
    list(roller.roll())
    assert ways(html_of(agent.get(MAP))) == before


def test_a_node_leads_to_the_list_of_who_is_there(agent, walked):
    urls = nodes(html_of(agent.get(MAP)))
    url = next(url for title, url in urls.items() if title.startswith("Order:size:"))
    assert "1 conversation" in html_of(agent.get(url))
    assert urls["cleared"].endswith("?state=~none")
    for url in urls.values():
        assert agent.get(url).status_code == 200


def test_the_window_begins_at_a_full_hour_and_leaves_out_what_was_before(agent, note):
    note(1, None, "Order:item", 60 * 26)
    note(2, None, "Order:item", 60 * 23)
    assert "entry → Order:item: 1" in ways(html_of(agent.get(f"{MAP}?window=24h")))
    assert "entry → Order:item: 2" in ways(html_of(agent.get(f"{MAP}?window=7d")))


def test_the_map_of_one_bot(agent, note, make_record):
    note(1, None, "Order:item")
    note(2, None, "Order:item", bot_id=43)
    make_record(state="Order:item", bot_id=43)
    make_record(state="Order:item", bot_id=42)
    html = html_of(agent.get(f"{MAP}?bot=43"))
    assert ways(html) == {"entry → Order:item: 1"}
    title, url = next((title, url) for title, url in nodes(html).items() if title.startswith("Order:item"))
    assert "1 conversation now" in title
    assert url.endswith("bot=43")


def test_the_map_of_one_group_has_its_states_and_their_neighbours(agent, note):
    note(1, None, "Order:item")
    note(1, "Order:item", "Support:topic")
    note(2, None, "Feedback:rating")
    html = html_of(agent.get(f"{MAP}?group=Order"))
    assert ways(html) == {"entry → Order:item: 1", "Order:item → Support:topic: 1"}
    assert any(title.startswith("Support:topic:") for title in nodes(html))
    assert not any(title.startswith("Feedback:rating:") for title in nodes(html))


def test_a_state_that_is_only_in_the_data_is_marked(agent, note, make_record):
    make_record(state="Old:gone")
    note(1, None, "Older:moved")
    html = html_of(agent.get(MAP))
    assert "Old:gone: 1 conversation now, undeclared" in nodes(html)
    assert "Older:moved: 0 conversations now, undeclared" in nodes(html)
    assert html.count("fsm-node fsm-state fsm-unknown") == 2


def test_an_expired_state_does_not_count(agent, make_record):
    make_record(state="Order:item", state_ttl=timedelta(minutes=-1))
    assert "Order:item: 0 conversations now" in nodes(html_of(agent.get(MAP)))


def test_no_more_records_are_counted_than_the_limit(agent, make_record, monkeypatch):
    monkeypatch.setattr("fsm_storage.statemap.LIVE_LIMIT", 2)
    for _ in range(4):
        make_record(state="Order:item")
    found = next(title for title in nodes(html_of(agent.get(MAP))) if title.startswith("Order:item"))
    assert "+" in found


def test_texts_from_outside_stay_texts(agent, note, make_record):
    state = f"{XSS}:</svg><script>"
    record = make_record(state=state, key=XSS)
    note(1, None, state, key=XSS)
    for url in (MAP, f"{MAP}?record={record.pk}", f"{LIST}funnel/?step={state}", f"{MAP}?group={XSS}"):
        html = html_of(agent.get(url))
        assert "<script>alert" not in html
        assert "</svg><script>" not in html
    assert "&lt;script&gt;" in html_of(agent.get(MAP))


def test_there_is_no_inline_script_or_style(agent, walked):
    for page in (MAP, f"{MAP}?record={walked.pk}", f"{LIST}funnel/?group=Order"):
        own = html_of(agent.get(page)).split('id="content-main"')[1]
        assert re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", own) is None


@pytest.mark.parametrize(
    ("query", "message"),
    [("window=2h", "“2h” is no time"), ("bot=x", "“x” is no bot"), (f"bot={2**63}", "is no bot")],
)
def test_what_cannot_be_read_is_named(agent, query, message):
    response = agent.get(f"{MAP}?{query}")
    assert response.status_code == 200
    assert message in html_of(response)


def test_the_way_of_a_conversation_is_walked_step_by_step(agent, walked):
    html = html_of(agent.get(f"{MAP}?record={walked.pk}"))
    assert "Step 2 of 2" in html
    assert html.count("fsm-edge fsm-walked") == 2
    assert re.search(r'fsm-here"[^>]*><title>Order:size', html)
    back = re.search(r'rel="prev" href="([^"]*)"', html)[1].replace("&amp;", "&")
    html = html_of(agent.get(MAP + back))
    assert "Step 1 of 2" in html
    assert html.count("fsm-edge fsm-walked") == 1
    assert re.search(r'fsm-here"[^>]*><title>Order:item', html)
    assert 'rel="prev"' not in html


def test_a_way_that_nobody_took_lately_is_on_the_map_all_the_same(agent, note, make_record):
    record = make_record(key="42:3:3", state="Order:size")
    note(3, None, "Lost:state", 60 * 24 * 60)
    html = html_of(agent.get(f"{MAP}?record={record.pk}&group=Order"))
    assert "entry → Lost:state: 0" in ways(html)


@pytest.mark.parametrize("query", ["record=999999", "record=x", "record="])
def test_a_conversation_that_is_gone_is_told(agent, query):
    response = agent.get(f"{MAP}?{query}")
    assert response.status_code == 200
    assert "not in the database any more" in html_of(response)


@pytest.mark.parametrize("step", ["0", "-5", "99", "x", "9" * 30])
def test_a_step_that_there_is_not_is_no_error(agent, walked, step):
    assert agent.get(f"{MAP}?record={walked.pk}&step={step}").status_code == 200


def test_an_empty_table_says_what_to_do(agent):
    html = html_of(agent.get(MAP))
    assert "Nobody moved in this time" in html


def test_the_page_of_a_conversation_and_the_list_lead_to_the_map(agent, walked):
    assert f"map/?record={walked.pk}" in html_of(agent.get(f"{LIST}{walked.pk}/change/"))
    assert "/map/" in html_of(agent.get(LIST))


def test_who_may_not_see_conversations_sees_no_map(as_user, client):
    for page in (MAP, f"{LIST}funnel/", f"{LIST}funnel/people/"):
        assert as_user("view_fsmtransition").get(page).status_code == 403
        assert as_user("view_fsmrecord").get(page).status_code == 200
        assert client.get(page).status_code == 302


def test_when_too_much_waits_for_the_sweep_the_page_says_so(agent, walked, monkeypatch):
    Roller("default")
    monkeypatch.setattr("fsm_storage.figures.TAIL_LIMIT", 2)
    assert "The sweep does it" in html_of(agent.get(MAP))
    list(Roller("default").roll())
    html = html_of(agent.get(MAP))
    assert "The sweep does it" not in html
    assert "entry → Order:item: 3" in ways(html)


def test_the_map_as_a_file_of_its_own(walked, note):
    note(9, None, XSS)
    out = StringIO()
    call_command("fsm_graph", format="svg", stdout=out)
    root = ElementTree.fromstring(out.getvalue())
    texts = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert "Order:size: 1 conversation now" in texts
    assert "Order:size → expired: 1" in texts
    assert f"{XSS}: 0 conversations now, undeclared" in texts
    assert {element.tag.split("}")[1] for element in root.iter()} <= {
        "svg", "style", "defs", "marker", "path", "g", "title", "rect", "text",
    }  # fmt: skip


VENDOR = Path(finders.find("fsm_storage/vendor/README.md")).parent


@pytest.mark.parametrize(
    "path", [path for path in VENDOR.iterdir() if path.suffix in (".js", ".css")], ids=lambda path: path.name
)
def test_a_file_from_others_is_the_one_that_was_taken(path):
    row = next(line for line in (VENDOR / "README.md").read_text().splitlines() if f"| {path.name} |" in line)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in row
    assert (VENDOR / row.split(", ")[-1].split(" ")[0]).exists()
