"""What pages that are open ask the server: marks, and the pages themselves in the background."""

from __future__ import annotations

import pytest
from django.contrib.messages import get_messages
from django.test import Client

from fsm_storage.admin.watching import BACKGROUND
from fsm_storage.models import FSMRecord
from tests.web.conftest import LIST, XSS, fresh, html_of, page_of

pytestmark = pytest.mark.django_db
MARK = LIST + "mark/"
BY_SCRIPT = {f"HTTP_{BACKGROUND.upper().replace('-', '_')}": "1"}


def live_of(response):
    return response.context["live"]


def test_a_mark_is_another_one_after_each_change(agent, make_record):
    assert agent.get(MARK).json() == {"mark": ""}
    record = make_record(state="Order:size")
    marks = [agent.get(MARK).json()["mark"]]
    for state in ("Order:payment", "Order:size"):
        record.edit(state=state)
        marks.append(agent.get(MARK).json()["mark"])
    assert len(set(marks)) == 3
    assert live_of(agent.get(LIST))["mark"] == marks[-1]
    assert live_of(agent.get(LIST + "map/"))["mark"] == marks[-1]


def test_the_mark_of_one_conversation_is_its_version(agent, make_record):
    record, other = make_record(), make_record()
    address = f"{MARK}?record={record.pk}"
    assert live_of(agent.get(page_of(record)))["mark_url"] == address
    before = agent.get(address).json()["mark"]
    assert before == live_of(agent.get(page_of(record)))["mark"] == str(record.version)
    other.edit(state="x")
    assert agent.get(address).json()["mark"] == before
    record.edit(state="x")
    assert agent.get(address).json()["mark"] == str(fresh(record).version) != before
    FSMRecord.objects.all().delete()
    assert agent.get(address).json() == {"mark": "gone"}


@pytest.mark.parametrize("record", ["5", "x", "", "-1", "9" * 30, "\0"])
def test_a_mark_of_what_is_not_there(agent, record):
    assert agent.get(MARK, {"record": record}).json() == {"mark": "gone"}


def test_an_unchanged_mark_costs_no_body(agent, make_record):
    make_record()
    first = agent.get(MARK)
    again = agent.get(MARK, HTTP_IF_NONE_MATCH=first["ETag"])
    assert (again.status_code, again.content) == (304, b"")
    assert agent.get(MARK, HTTP_IF_NONE_MATCH='"another"').status_code == 200
    assert agent.get(MARK, HTTP_IF_NONE_MATCH="rubbish").status_code == 200


def test_asking_for_a_mark_costs_one_query_of_ours(agent, make_record, django_assert_max_num_queries):
    make_record()
    agent.get(MARK)
    with django_assert_max_num_queries(5):  # session, user, permissions of both kinds, the mark
        agent.get(MARK)


def test_marks_need_the_right_to_view(as_user, make_record, client):
    record = make_record()
    for address in (MARK, f"{MARK}?record={record.pk}"):
        assert client.get(address).status_code == 302
        assert as_user("view_fsmtransition").get(address).status_code == 403
        assert as_user("view_fsmrecord").get(address).status_code == 200


def test_what_is_to_be_said_waits_for_a_person(agent: Client, make_record):
    record = make_record()
    saved = agent.get(page_of(record) + "?restore=5")
    assert saved.status_code == 200
    agent.get(f"{LIST}999999/change/")  # leaves a message: there is no such conversation
    for page in (LIST, page_of(record), LIST + "map/"):
        assert "There is no conversation" not in html_of(agent.get(page, **BY_SCRIPT))
    assert "There is no conversation" in html_of(agent.get(LIST))


def test_a_search_that_cannot_be_read_leaves_no_messages_behind(agent):
    for _ in range(3):
        response = agent.get(LIST, {"q": '"'}, **BY_SCRIPT)
        assert response.status_code == 200
    assert list(get_messages(agent.get(LIST).wsgi_request)) == []


def test_a_page_says_where_its_websocket_is_only_where_there_is_a_layer(agent, settings, make_record):
    record = make_record(key=XSS)
    settings.CHANNEL_LAYERS = {}
    assert live_of(agent.get(LIST))["socket"] is None
    assert "data-socket" not in html_of(agent.get(LIST))
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    page = html_of(agent.get(page_of(record)))
    assert 'data-socket="/ws/fsm_storage/"' in page
    assert "data-reaches-all" not in page
    assert XSS not in page
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels_redis.core.RedisChannelLayer"}}
    assert "data-reaches-all" in html_of(agent.get(LIST))
    settings.FSM_ADMIN = {"LIVE": "/elsewhere/"}
    assert 'data-socket="/elsewhere/"' in html_of(agent.get(LIST))


def test_pages_stand_still_when_told_so(agent, settings, make_record):
    settings.FSM_ADMIN = {"LIVE": False}
    record = make_record()
    for page in (LIST, page_of(record), LIST + "map/"):
        assert "live.js" not in html_of(agent.get(page))
