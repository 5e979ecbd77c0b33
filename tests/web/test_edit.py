from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import OperationalError
from django.test import Client

from fsm_storage.exceptions import StorageTimeout
from fsm_storage.models import FSMRecord, FSMTransition
from tests.web.conftest import AGENT, LIST, XSS, form_of, fresh, html_of, messages_of, note, page_of

BIG = {
    "id": 2**63 + 1,
    "huge": 10**60 + 7,
    "float": 0.1 + 0.2,
    "whole": 1.0,
    "name": "Анна",
    "list": [1, None],
}
HOUR = timedelta(hours=1)


def save(client, record, **changes):
    return client.post(page_of(record), form_of(record, **changes), follow=True)


def test_the_page_shows_the_conversation(agent, make_record):
    record = make_record(state="Order:payment", data=BIG, state_ttl=3 * HOUR + timedelta(seconds=30))
    html = html_of(agent.get(page_of(record)))
    for text in (
        "Анна",
        str(2**63 + 1),
        str(10**60 + 7),
        "0.30000000000000004",
        "in 3 h",
        "Order:</span>payment",
    ):
        assert text in html
    assert '<optgroup label="Order">' in html
    assert '<option value="=Order:payment" selected>' in html
    assert "— no state —" in html


def test_saving_without_a_change_writes_nothing(agent, make_record):
    record = make_record(state="Order:payment", data=BIG, state_ttl=HOUR, data_ttl=HOUR)
    response = save(agent, record)
    assert messages_of(response) == ["Nothing was changed."]
    after = fresh(record)
    assert after.version == record.version
    assert (after.state_expires_at, after.data_expires_at) == (
        record.state_expires_at,
        record.data_expires_at,
    )
    assert not LogEntry.objects.exists()


def test_a_state_is_set_with_a_transition_and_a_log_entry(agent, make_record):
    record = make_record(state="Order:item", data=BIG, state_ttl=HOUR, data_ttl=2 * HOUR)
    response = save(agent, record, state="=Order:payment")
    after = fresh(record)
    assert (after.state, after.version) == ("Order:payment", record.version + 1)
    assert after.data == BIG
    assert (after.state_expires_at, after.data_expires_at) == (
        record.state_expires_at,
        record.data_expires_at,
    )
    transition = FSMTransition.objects.of(record).get()
    assert (transition.from_state, transition.to_state) == ("Order:item", "Order:payment")
    user = response.context["user"]
    assert (transition.source, transition.actor) == ("admin", user.get_username())
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_id) == (user, str(record.pk))
    assert note() == {"state": ["Order:item", "Order:payment"], "transition": transition.pk}
    assert entry.get_change_message() == "Changed State: Order:item → Order:payment."
    assert "was changed successfully" in html_of(response)
    history = html_of(agent.get(f"{LIST}{record.pk}/history/"))
    assert "State: Order:item → Order:payment." in history


def test_no_state_can_be_chosen(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, state="none")
    assert fresh(record).state is None
    assert note()["state"] == ["Order:item", None]


def test_a_free_state_goes_before_the_choice_and_is_flagged(agent, make_record):
    record = make_record(state="Order:item")
    response = save(agent, record, state="=Order:payment", other_state="Made:up")
    assert fresh(record).state == "Made:up"
    assert any("No app declares the state “Made:up”" in message for message in messages_of(response))
    html = html_of(response)
    assert "No app declares this state" in html
    assert '<option value="=Made:up" selected>' in html


def test_an_undeclared_state_stays_when_only_the_data_is_edited(agent, make_record):
    record = make_record(state="Old:one", data={"a": 1})
    response = save(agent, record, data_json='{"a": 2}')
    assert fresh(record).state == "Old:one"
    assert not any("No app declares the state" in message for message in messages_of(response))


@pytest.mark.parametrize("state", ["", " padded ", "none", "=x"])
def test_an_odd_state_is_left_alone(agent, make_record, state):
    record = make_record(state=state, data={"a": 1})
    save(agent, record, data_json="{}")
    assert fresh(record).state == state
    save(agent, fresh(record), state="none")
    assert fresh(record).state is None


def test_data_is_replaced_exactly_and_logged_key_by_key(agent, make_record):
    record = make_record(state="Order:item", data={"keep": 2**70, "drop": "x", "turn": 1}, data_ttl=HOUR)
    save(agent, record, data_json=f'{{"keep": {2**70}, "turn": 1.0, "new": [{2**80}]}}')
    after = fresh(record)
    assert after.data == {"keep": 2**70, "turn": 1.0, "new": [2**80]}
    assert isinstance(after.data["turn"], float)
    assert after.data_expires_at == record.data_expires_at
    assert note()["data"] == [
        ["drop", '"x"', None], ["turn", "1", "1.0"], ["new", None, f"[\n  {2**80}\n]"],
    ]  # fmt: skip
    assert LogEntry.objects.get().get_change_message() == "Changed Data: drop, turn, new."
    assert not FSMTransition.objects.exists()


def test_reformatting_is_no_change(agent, make_record):
    record = make_record(data={"a": [1, 2], "b": "é"})
    response = save(agent, record, data_json='{"b":"\\u00e9",\t"a":[1,2]}')
    assert messages_of(response) == ["Nothing was changed."]


@pytest.mark.parametrize("data", [[1, 2], None, "text", 5])
def test_data_that_is_no_object_can_stay_or_be_mended(agent, make_record, data):
    record = make_record(state="Order:item", data=data)
    save(agent, record, state="=Order:payment")
    assert fresh(record).state == "Order:payment"
    assert fresh(record).data == data
    save(agent, fresh(record), data_json='{"mended": true}')
    assert fresh(record).data == {"mended": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\r\n  "a": ,\r\n}', "Line 2, column 8"),
        ('{"a": 1, "a": 2}', "Line 1, column 10: The key a is there twice."),
        ('{"a": NaN}', "Line 1, column 7: NaN is not JSON."),
        ("[1]", "Line 1, column 1: Data must be an object"),
        ("", "The text is empty."),
        ('{"a": "\\u0000"}', "a contains a NUL character."),
        ('{"a": "\\ud800"}', "a contains half a character"),
        ('{"a":' * 600 + "1" + "}" * 600, "nested"),
        (f'{{"{XSS}": 1, "{XSS}": 2}}', "&lt;script&gt;"),
    ],
)
def test_wrong_data_is_a_form_error_and_nothing_is_saved(agent, make_record, text, words):
    record = make_record(state="Order:item", data={"a": 1})
    response = save(agent, record, state="=Order:payment", data_json=text)
    assert response.status_code == 200
    html = html_of(response)
    assert words in html
    assert "<script>alert" not in html
    assert fresh(record).version == record.version
    assert not LogEntry.objects.exists()
    assert not FSMTransition.objects.exists()
    assert response.context["form"]["data_json"].value() == text


def test_the_excerpt_points_at_the_place(agent, make_record):
    html = html_of(save(agent, make_record(data={}), data_json='{\n  "a": 1,\n  "b": oops\n}'))
    assert '<pre class="fsm-excerpt">  &quot;b&quot;: oops\n       ^</pre>' in html


def test_more_than_the_server_takes_is_a_message_on_the_page(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    response = save(agent, record, data_json='{"a": "' + "x" * 10_000_000 + '"}')
    assert response.status_code == 413
    assert "nothing was saved" in html_of(response)
    assert fresh(record).version == record.version


def test_more_than_the_storage_takes_is_a_form_error(agent, make_record, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = None
    record = make_record(state="Order:item", data={"a": 1})
    response = save(agent, record, data_json='{"a": "' + "x" * 10_000_000 + '"}')
    assert response.status_code == 200
    assert "and at most 1048576 fit" in html_of(response)
    assert fresh(record).version == record.version


@pytest.mark.parametrize(
    ("state", "words"),
    [("x" * 300, "255"), ("a\0b", "Null characters"), ("x" * 100_000, "and at most 255 fit")],
)
def test_a_state_that_cannot_be_kept_is_a_form_error(agent, make_record, state, words):
    record = make_record(state="Order:item")
    response = save(agent, record, other_state=state)
    assert response.status_code == 200
    assert words in html_of(response)
    assert fresh(record).version == record.version


def seconds_left(record, part):
    record = fresh(record)
    return (getattr(record, f"{part}_expires_at") - record.read_at).total_seconds()


def test_a_time_to_expiry_is_changed_without_touching_the_values(agent, make_record):
    record = make_record(state="Order:item", data=BIG, state_ttl=HOUR, data_ttl=HOUR)
    save(agent, record, state_ttl="after", state_ttl_for="2h", data_ttl="never")
    after = fresh(record)
    assert (after.state, after.data) == ("Order:item", BIG)
    assert 7190 < seconds_left(record, "state") <= 7200
    assert after.data_expires_at is None
    assert not FSMTransition.objects.exists()
    assert note() == {"state_ttl": 7200.0, "data_ttl": None}


def test_a_typed_duration_is_enough(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, data_ttl_for="1d 12h")
    assert 129_590 < seconds_left(record, "data") <= 129_600
    assert fresh(record).state_expires_at is None


def test_state_data_and_expiry_change_together(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, state="=Order:payment", data_json='{"a": 2}', state_ttl_for="30m", data_ttl_for="3d")
    after = fresh(record)
    assert (after.state, after.data, after.version) == ("Order:payment", {"a": 2}, record.version + 1)
    assert 1790 < seconds_left(record, "state") <= 1800


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_ttl_for": "soon"}, "is no duration"),
        ({"state_ttl": "after"}, "Type how long"),
        ({"state_ttl": "never", "state_ttl_for": "2h"}, "not both"),
        ({"state_ttl_for": "0s"}, "between 1 second and 100 years"),
        ({"state_ttl": "bogus"}, "Select a valid choice"),
        ({"state": "none", "state_ttl_for": "2h"}, "no state that could expire"),
        ({"data_json": "{}", "data_ttl_for": "2h"}, "no data that could expire"),
        ({"version": ""}, "This page is incomplete"),
        ({"opened_state": ""}, "This page is incomplete"),
        ({"opened_data": "{"}, "This page is incomplete"),
    ],
)
def test_a_wrong_form_is_shown_again_and_nothing_is_saved(agent, make_record, changes, words):
    record = make_record(state="Order:item", data={"a": 1})
    response = save(agent, record, **changes)
    assert response.status_code == 200
    assert words in html_of(response)
    assert fresh(record).version == record.version


def test_what_expired_while_the_page_was_open_is_not_written_back(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1}, state_ttl=HOUR, data_ttl=HOUR)
    form = form_of(record)
    FSMRecord.objects.filter(pk=record.pk).update(
        state_expires_at=record.read_at - HOUR, data_expires_at=record.read_at - HOUR
    )
    response = agent.post(page_of(record), form, follow=True)
    assert messages_of(response) == ["Nothing was changed."]
    assert fresh(record).current_data == {}
    response = agent.post(page_of(record), {**form, "state_ttl_for": "2h"})
    assert "no state that could expire" in html_of(response)


def test_expired_data_is_shown_as_the_bot_sees_it(agent, make_record):
    record = make_record(state="Order:item", data={"secret": 1}, state_ttl=-HOUR, data_ttl=-HOUR)
    html = html_of(agent.get(page_of(record)))
    assert "secret" not in html
    assert "expired 1 h ago" in html


def test_a_conversation_of_an_unknown_storage_cannot_be_saved(agent, make_record):
    record = make_record(alias="elsewhere", state="Order:item")
    response = save(agent, record, state="=Order:payment")
    assert "“elsewhere” cannot be changed here" in html_of(response)
    assert fresh(record).state == "Order:item"
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize(
    "error", [StorageTimeout(5, "<b>stuck</b>"), OperationalError("database is <b>locked</b>")]
)
def test_a_failing_database_is_a_message_and_nothing_is_saved(agent, make_record, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    record = make_record(state="Order:item")
    monkeypatch.setattr(FSMRecord, "edit", fail)
    response = save(agent, record, state="=Order:payment")
    assert response.status_code == 200
    assert "&lt;b&gt;" in html_of(response)
    assert not LogEntry.objects.exists()


def test_opening_a_page_takes_a_constant_number_of_queries(agent, make_record, django_assert_max_num_queries):
    record = make_record(state="Order:item")
    FSMTransition.objects.bulk_create(
        FSMTransition(alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1, to_state=f"Order:{i}")
        for i in range(200)
    )
    ContentType.objects.get_for_model(FSMRecord)  # a process asks for it once
    with django_assert_max_num_queries(10):
        agent.get(page_of(record))


def test_a_conversation_that_is_gone(agent, make_record):
    record = make_record(state="Order:item")
    form, url = form_of(record, state="none"), page_of(record)
    record.delete()
    response = agent.post(url, form, follow=True)
    assert response.redirect_chain == [(LIST, 302)]
    assert "not in the database any more" in messages_of(response)[0]
    assert "There is no conversation" in messages_of(agent.get(url, follow=True))[0]
    assert agent.get(f"{LIST}{XSS}/change/", follow=True).status_code == 200


def test_a_post_without_a_token_is_refused(make_user, make_record):
    client = Client(enforce_csrf_checks=True)
    client.force_login(make_user(*AGENT))
    record = make_record(state="Order:item", data={"a": 1})
    assert client.post(page_of(record), form_of(record, state="none")).status_code == 403
    assert (
        client.post(LIST, {"action": "clear_state", "_selected_action": record.pk, "post": "yes"}).status_code
        == 403
    )
    assert fresh(record).version == record.version
    page = html_of(client.get(page_of(record)))
    token = page.split('name="csrfmiddlewaretoken" value="')[-1].split('"')[0]
    response = client.post(page_of(record), form_of(record, state="none", csrfmiddlewaretoken=token))
    assert response.status_code == 302
    assert fresh(record).state is None
