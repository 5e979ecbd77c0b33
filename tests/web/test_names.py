"""Names of chats and people in the admin: shown, searched, and never a reason for a page to fail."""

from __future__ import annotations

import logging

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from fsm_storage.dialects import Naming
from fsm_storage.peers import FSMPeer, Name, names_of
from fsm_storage.rights import InvalidAdminError, check_options
from tests.web.conftest import LIST, html_of, messages_of

COLUMNS = ("peer_id", "title", "username", "title_key", "rest_key", "username_key")


def call(peer_id, title, username=""):
    FSMPeer.objects.create(**dict(zip(COLUMNS, Naming(peer_id, title, username).columns(), strict=True)))


@pytest.fixture
def people(make_record):
    call(7, "Анна Иванова", "Anna_I")
    call(8, "Ben King")
    call(-100, "Office, 3rd floor")
    return {
        "anna": make_record(chat_id=7, user_id=7),
        "anna in the office": make_record(chat_id=-100, user_id=7),
        "ben in the office": make_record(chat_id=-100, user_id=8),
        "nobody": make_record(chat_id=9, user_id=9),
    }


def page(record):
    return f"{LIST}{record.pk}/change/"


def found(client, query, people):
    made = {record.pk: name for name, record in people.items()}
    return {made[record.pk] for record in client.get(LIST, {"q": query}).context["cl"].result_list}


def test_the_list_names_chats_and_people(agent, people):
    html = html_of(agent.get(LIST))
    assert html.count("Анна Иванова") == 3
    assert html.count("@Anna_I") == 3
    assert html.count("Office, 3rd floor") == 2
    for number in (7, 8, -100, 9):  # the id is never hidden by a name
        assert f">{number}<" in html


def test_all_names_of_a_page_are_one_query(agent, make_record):
    for number in range(1, 41):
        call(number, f"n{number}")
        make_record(chat_id=number, user_id=41 - number)
    with CaptureQueriesContext(connection) as queries:
        html = html_of(agent.get(LIST))
    assert len([query for query in queries if "fsm_storage_peer" in query["sql"]]) == 1
    assert "n40" in html


def test_the_page_of_a_conversation_names_them_and_leads_to_them(agent, people):
    with CaptureQueriesContext(connection) as queries:
        html = html_of(agent.get(page(people["anna in the office"])))
    assert len([query for query in queries if "fsm_storage_peer" in query["sql"]]) == 1
    assert "<b>Анна Иванова</b>" in html
    assert "<b>Office, 3rd floor</b>" in html
    assert 'href="https://t.me/Anna_I"' in html
    assert 'href="tg://user?id=7"' in html
    assert "t.me" not in html_of(agent.get(page(people["ben in the office"])))
    assert (
        html_of(agent.get(page(people["anna"]))).count("https://t.me/Anna_I") == 1
    )  # her private chat is she


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("Анна", {"anna", "anna in the office"}),
        ("иванов", {"anna", "anna in the office"}),
        ("@anna", {"anna", "anna in the office"}),
        ("office", {"anna in the office", "ben in the office"}),
        ("office king", {"ben in the office"}),
        ("анна -100", {"anna in the office"}),
        ('"ben king"', {"ben in the office"}),
        ('"ben kong"', set()),
        ("office floor=3", set()),
        ('"a"="b c"', set()),
        ('"a=b"', set()),
    ],
)
def test_people_are_found_by_name(agent, people, query, names):
    assert found(agent, query, people) == names


def test_a_name_that_nobody_has_says_so(agent, people):
    response = agent.get(LIST, {"q": "Zoe"})
    (message,) = messages_of(response)
    assert str(message).startswith("No name that is known begins with “Zoe”")
    assert "is no beginning of a name" in html_of(agent.get(LIST, {"q": "@"}))


def test_a_beginning_that_too_many_share_asks_for_more(agent, people, monkeypatch):
    monkeypatch.setattr("fsm_storage.search.MAX_NAMED", 2)
    for number in range(20, 23):
        call(number, f"Kate {number}")
    response = agent.get(LIST, {"q": "kate"})
    assert "More than 2 people and chats" in html_of(response)


def test_names_are_text_and_no_html(agent, make_record):
    call(7, "<script>alert(1)</script>", '"><img src=x>')
    record = make_record(chat_id=7, user_id=7)
    for url in (LIST, page(record), LIST + "?q=%3Cscript"):
        html = html_of(agent.get(url))
        assert "<script>alert(1)" not in html
        assert "<img src=x>" not in html


# The project's own lookup


def lookup(ids):
    return {number: Name(f"customer {number}", "shop") if number == 7 else f"chat {number}" for number in ids}


def broken(ids):
    raise RuntimeError("the other system is away")


def test_the_project_can_look_names_up_itself(agent, people, settings):
    settings.FSM_ADMIN = {"NAMES": f"{__name__}.lookup"}
    html = html_of(agent.get(LIST))
    assert "customer 7" in html
    assert "chat -100" in html
    assert "Анна" not in html
    assert names_of([7]) == {7: Name("customer 7", "shop")}


def test_names_can_be_left_off(agent, people, settings):
    settings.FSM_ADMIN = {"NAMES": False}
    with CaptureQueriesContext(connection) as queries:
        html = html_of(agent.get(LIST))
    assert "Анна" not in html
    assert not [query for query in queries if "fsm_storage_peer" in query["sql"]]


def test_a_lookup_that_fails_leaves_the_ids(agent, people, settings, caplog):
    settings.FSM_ADMIN = {"NAMES": broken}
    with caplog.at_level(logging.ERROR):
        assert ">7<" in html_of(agent.get(LIST))
    assert "the other system is away" in caplog.text


@pytest.mark.parametrize("wrong", ["nowhere.lookup", 5, True, f"{__name__}.COLUMNS"])
def test_a_wrong_lookup_is_an_error_of_the_settings(settings, wrong):
    settings.FSM_ADMIN = {"NAMES": wrong}
    with pytest.raises(InvalidAdminError, match="NAMES"):
        check_options()
