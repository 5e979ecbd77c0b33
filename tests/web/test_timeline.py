"""The timeline of a conversation: one line of transitions and log entries, a page at a time; and going back."""

import re
from datetime import timedelta

import pytest
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from fsm_storage import storages
from fsm_storage.admin import timeline
from fsm_storage.admin.timeline import Cursor
from fsm_storage.models import FSMLease, FSMRecord, FSMTransition
from tests.web.conftest import XSS, form_of, fresh, html_of, messages_of, page_of

TRANSITIONS = "/admin/fsm_storage/fsmtransition/"


@pytest.fixture
def full_history(settings):
    settings.FSM_STORAGES = {
        "default": {
            "BACKEND": "fsm_storage.DjangoStorage",
            "OPTIONS": {"history": "full", "in_transaction": True},
        }
    }
    return storages["default"]


def save(client, record, **changes):
    record = fresh(record)
    return client.post(page_of(record), form_of(record, **changes), follow=True)


def steps_of(client, record, query=""):
    return client.get(page_of(record) + query).context["timeline"].steps


def all_steps(client, record):
    """Follow the link to older changes to the end."""
    url, found = page_of(record), []
    while url:
        response = client.get(url)
        found += response.context["timeline"].steps
        link = re.search(r'rel="next" href="([^"#]+)#timeline"', html_of(response))
        url = link and link[1]
    return found


def test_it_tells_how_a_conversation_got_here(agent, make_record):
    record = make_record(state="Order:item", data={})
    for state in ("=Order:size", "=Order:payment", "none"):
        save(agent, record, state=state)
    steps = steps_of(agent, record)
    assert [step.is_newest for step in steps] == [True, False, False]
    assert "Order:payment" in steps[0].change
    assert "no state" in steps[0].change
    assert steps[0].dwell.endswith("so far")
    assert steps[0].source == "admin"


def test_every_source_has_its_word(agent, make_record):
    record = make_record(state="Order:item")
    for source in FSMTransition.Source:
        record.edit(state=f"Order:{source}", source=source, by="someone")
    steps = steps_of(agent, record)
    words = ["mirror", "chat moved", "migration", "import", "expiry", "admin", "bot"]
    assert [(step.source, step.actor) for step in steps] == [(word, "someone") for word in words]


def test_a_change_of_data_alone_is_there_once_with_old_and_new(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    response = save(agent, record, data_json=f'{{"a": 2, "b": "{XSS}"}}')
    (step,) = steps_of(agent, record)
    assert [tuple(change) for change in step.changes] == [("a", "1", "2"), ("b", None, f'"{XSS}"')]
    assert step.actor == response.context["user"].get_username()
    assert "<script>alert" not in html_of(agent.get(page_of(record)))


def test_a_change_of_state_and_data_is_one_step_with_both(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, state="=Order:payment", data_json='{"a": 2}', data_ttl_for="2h")
    (step,) = steps_of(agent, record)
    assert "Order:payment" in step.change
    assert [tuple(change) for change in step.changes] == [("a", "1", "2")]
    assert step.told == ["Data expires: in 2 h"]


def test_full_history_tells_of_the_bots_data_too_and_nothing_twice(agent, make_record, full_history):
    record = make_record(state="Order:item", data={"a": 1})
    record.edit(data={"a": 1, "b": 2}, source="bot")
    save(agent, record, data_json='{"a": 3, "b": 2}')
    steps = steps_of(agent, record)
    assert [[tuple(change) for change in step.changes] for step in steps] == [
        [("a", "1", "3")],
        [("b", None, "2")],
    ]
    assert [step.source for step in steps] == ["admin", "bot"]


def test_a_change_that_a_mirror_writes_later_is_there_once(agent, make_record):
    """Its transition was not there yet when the log entry was made, so they are not linked."""
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, state="=Order:payment", data_json='{"a": 2}')
    save(agent, record, data_json='{"a": 3}')
    for entry in LogEntry.objects.all():
        entry.change_message = entry.change_message.replace('"transition"', '"was"')
        entry.save()
    steps = steps_of(agent, record)
    assert [[tuple(change) for change in step.changes] for step in steps] == [
        [("a", "2", "3")],
        [("a", "1", "2")],
    ]
    assert "Order:payment" in steps[1].change
    FSMTransition.objects.update(at=Now() - timedelta(hours=1))
    assert len(steps_of(agent, record)) == 3


def test_bulk_changes_are_there_once(agent, make_record):
    records = [make_record(state="Order:item", data={"a": 1}) for _ in range(3)]
    for record in records:
        record.edit(state="Order:size", source="bot")
    ids = {"action": "clear_all", "_selected_action": [r.pk for r in records]}
    page = agent.post("/admin/fsm_storage/fsmrecord/", ids)
    agent.post("/admin/fsm_storage/fsmrecord/bulk/", {"token": page.context["token"], "run": "1"})
    for record in records:
        steps = steps_of(agent, record)
        assert [step.source for step in steps] == ["admin", "bot"]
        assert [tuple(change) for change in steps[0].changes] == [("a", "1", None)]


def test_others_of_the_same_key_or_number_do_not_show(agent, make_record):
    record = make_record(state="Order:item", key="k")
    make_record(state="Order:item", key="k", alias="other").refresh_from_db()
    FSMTransition.objects.create(alias="other", key="k", bot_id=1, chat_id=1, user_id=1, to_state="x")
    user = agent.get("/admin/").context["user"]
    kind = ContentType.objects.get_for_model(FSMTransition)
    LogEntry.objects.create(user=user, content_type=kind, object_id=record.pk, action_flag=CHANGE)
    assert steps_of(agent, record) == []


def test_pages_follow_one_another_without_a_gap_or_a_double(agent, make_record, monkeypatch):
    monkeypatch.setattr(timeline, "PAGE", 4)
    record = make_record(state="Order:item", data={"n": 0})
    for number in range(1, 18):
        if number % 3:
            record.edit(state=f"Order:{number}", source="bot")
        else:
            save(agent, record, data_json=f'{{"n": {number}}}', **({"state": "none"} if number % 2 else {}))
            record.refresh_from_db()
    steps = all_steps(agent, record)
    assert len(steps) == 17
    told = [
        step.changes[0].new if step.changes else re.findall(r"Order:</span>(\d+)", step.change)[-1]
        for step in steps
    ]
    assert told == [str(number) for number in range(17, 0, -1)]
    assert [step.is_newest for step in steps] == [True] + [False] * 16


@pytest.mark.parametrize(
    "text", ["x", "1.2", "1.2.3.4", "-1.2.3", "9" * 30 + ".1.1", "²." * 2 + "1", f"1.1.{2**63}", XSS]
)
def test_a_made_up_place_is_the_newest_page(agent, make_record, text):
    record = make_record(state="Order:item")
    record.edit(state="Order:size")
    response = agent.get(page_of(record), {"before": text})
    assert response.status_code == 200
    assert len(response.context["timeline"].steps) in (0, 1)
    assert "<script>alert" not in html_of(response)


def test_the_stay_is_told_across_pages(agent, make_record, monkeypatch):
    monkeypatch.setattr(timeline, "PAGE", 1)
    record = make_record(state="Order:item")
    for hours in (5, 2):
        FSMTransition.objects.create(
            alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1, at=Now() - timedelta(hours=hours)
        )
    assert [step.dwell for step in all_steps(agent, record)] == ["2 h so far", "3 h"]


def test_a_long_timeline_costs_no_more_than_a_short_one(agent, make_record):
    record = make_record(state="Order:item", key='a&b=c"<')
    FSMTransition.objects.bulk_create(
        FSMTransition(alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1, to_state=f"Order:{i}")
        for i in range(5000)
    )
    with CaptureQueriesContext(connection) as queries:
        response = agent.get(page_of(record))
    assert len(response.context["timeline"].steps) == 50
    (query,) = [q["sql"] for q in queries if '"fsm_storage_transition"' in q["sql"]]
    assert "LIMIT 51" in query
    plan = FSMTransition.objects.of(record).filter(id__lt=4000)[:51].explain()
    assert "fsm_storage_transition_key" in plan
    assert "TEMP B-TREE" not in plan
    url = f"{TRANSITIONS}?alias=default&amp;key=a%26b%3Dc%22%3C"
    assert url in html_of(response)
    assert agent.get(url.replace("&amp;", "&")).context["cl"].result_count == 1001


def test_the_log_is_looked_through_only_so_far(agent, make_record, monkeypatch):
    """It grows with all that the staff does anywhere, and has no index on what an entry is about."""
    monkeypatch.setattr(timeline, "LOG_LIMIT", 3)
    record = make_record(state="Order:item", data={"a": 1})
    save(agent, record, state_ttl="after", state_ttl_for="2h")
    assert len(steps_of(agent, record)) == 1
    other = make_record(state="Order:item")
    save(agent, other, state="=Order:size")
    save(agent, other, state="=Order:payment")
    assert len(steps_of(agent, record)) == 1
    save(agent, other, state="=Order:item")
    assert steps_of(agent, record) == []
    save(agent, record, state="=Order:size")
    assert len(steps_of(agent, record)) == 1


def test_an_empty_list_of_transitions_says_what_to_do(agent, make_record):
    assert "No change is recorded" in html_of(agent.get(TRANSITIONS))
    save(agent, make_record(state="Order:item"), state="=Order:size")
    assert "No change is recorded" not in html_of(agent.get(TRANSITIONS))
    assert "Take filters away" in html_of(agent.get(f"{TRANSITIONS}?source__exact=expiry"))


def test_a_cursor_survives_its_address():
    cursor = Cursor.read("12.34.1700000000123456")
    assert (cursor.transition, cursor.entry, str(cursor)) == (12, 34, "12.34.1700000000123456")


# Going back


@pytest.fixture
def long_ago(make_record, full_history):
    """A conversation with a past: first `Order:item` with {"a": 1, "big": …}, then more."""
    record = make_record(state=None, data={})
    record.edit(state="Order:item", data={"a": 1, "big": 2**70}, source="bot")
    record.edit(state="Order:size", data={"a": 2, "b": 1}, source="bot")
    return record


def test_an_earlier_point_is_restored_as_a_new_change(agent, long_ago):
    record = long_ago
    html = html_of(agent.get(page_of(record)))
    (link,) = re.findall(r'href="([^"]+\?restore=\d+)"', html)
    response = agent.get(link)
    shown = response.context["preview"]
    assert [tuple(change) for change in shown["data"]] == [
        ("a", "2", "1"),
        ("b", "1", None),
        ("big", None, str(2**70)),
    ]
    assert fresh(record).version == record.version
    form = response.context["form"]
    filled = {name: form[name].value() for name in form.fields if form[name].value() is not None}
    agent.post(link, filled)
    after = fresh(record)
    assert (after.state, after.data) == ("Order:item", {"a": 1, "big": 2**70})
    assert [step.source for step in steps_of(agent, record)] == ["admin", "bot", "bot"]


def test_a_restore_does_not_step_on_the_bot(agent, long_ago):
    record = long_ago
    (link,) = re.findall(r'href="([^"]+\?restore=\d+)"', html_of(agent.get(page_of(record))))
    form = agent.get(link).context["form"]
    filled = {name: form[name].value() for name in form.fields if form[name].value() is not None}
    record.edit(state="Order:amount", data={"a": 5}, source="bot")
    assert agent.post(link, filled).status_code == 409
    assert fresh(record).state == "Order:amount"


@pytest.mark.parametrize("asked", ["0", "x", "9" * 30, "²", ""])
def test_a_point_that_is_not_there(agent, long_ago, asked):
    response = agent.get(page_of(long_ago), {"restore": asked})
    assert "This point cannot be restored" in html_of(response)
    assert "preview" not in response.context


def test_a_point_of_another_conversation_is_not_there(agent, long_ago, make_record):
    point = FSMTransition.objects.of(long_ago).last()
    response = agent.get(page_of(make_record(state="Order:item")), {"restore": point.pk})
    assert "This point cannot be restored" in html_of(response)


def test_without_full_history_the_page_says_what_it_needs(agent, make_record):
    record = make_record(state="Order:item")
    record.edit(state="Order:size")
    html = html_of(agent.get(page_of(record)))
    assert "?restore=" not in html
    assert "set its option history to" in html


def test_who_may_not_change_both_cannot_go_back(as_user, long_ago):
    for missing in ("change_state_fsmrecord", "change_data_fsmrecord", "view_data_fsmrecord"):
        allowed = {"view_fsmrecord", "view_data_fsmrecord", "change_state_fsmrecord", "change_data_fsmrecord"}
        client = as_user(*allowed - {missing})
        assert "?restore=" not in html_of(client.get(page_of(long_ago)))
        point = FSMTransition.objects.of(long_ago).last()
        response = client.get(page_of(long_ago), {"restore": point.pk})
        assert "preview" not in response.context
        assert str(2**70) not in html_of(response) or missing != "view_data_fsmrecord"


# A preview, and a handler at work


def test_a_preview_saves_nothing_and_keeps_the_input(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1, "keep": 2**70})
    changes = {
        "state": "=Order:payment",
        "data_json": f'{{"a": "{XSS}", "keep": {2**70}}}',
        "state_ttl_for": "2h",
    }
    response = agent.post(page_of(record), form_of(record, **changes, _preview="1"))
    shown = response.context["preview"]
    assert [tuple(change) for change in shown["data"]] == [("a", "1", f'"{XSS}"')]
    assert "Order:payment" in shown["state"][1]
    assert shown["ttls"] == ["State expires: in 2 h"]
    assert response.context["form"]["data_json"].value() == changes["data_json"]
    assert "<script>alert" not in html_of(response)
    assert fresh(record).version == record.version
    assert not LogEntry.objects.exists()


def test_a_preview_upon_a_newer_version_shows_the_merge(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    form = form_of(record, state="=Order:payment", _preview="1")
    record.edit(data={"a": 2}, source="bot")
    response = agent.post(page_of(record), form)
    assert "Kept from there: a." in response.context["preview"]["told"]
    assert fresh(record).state == "Order:item"


def test_a_handler_at_work_is_told(agent, make_record):
    record = make_record(state="Order:item")
    lease = FSMLease.objects.create(
        alias="default", key=record.key, owner="x", token=1, expires_at=Now() + timedelta(minutes=1)
    )
    assert "at work on this conversation" in html_of(agent.get(page_of(record)))
    FSMLease.objects.filter(pk=lease.pk).update(expires_at=Now() - timedelta(seconds=1))
    assert "at work on this conversation" not in html_of(agent.get(page_of(record)))


def test_a_patch_changes_the_keys_that_it_names_and_no_others(agent, make_record):
    record = make_record(data={"big": 2**53 + 1, "exact": 0.1 + 0.2, "a": 1, "drop": 1})
    patch = f'{{"set": {{"a": {2**64 + 1}, "new": [1.0]}}, "unset": ["drop", "absent"]}}'
    save(agent, record, data_patch=patch, data_json="what a browser has made of it")
    assert fresh(record).data == {"big": 2**53 + 1, "exact": 0.1 + 0.2, "a": 2**64 + 1, "new": [1.0]}


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("{", "A key in double quotes is missing"),
        ("[]", "Data must be an object"),
        ('{"set": 1, "unset": []}', "This page is incomplete"),
        ('{"set": {}}', "This page is incomplete"),
        ('{"set": {"a": NaN}, "unset": []}', "Line 2, column 6: NaN is not JSON."),
    ],
)
def test_a_wrong_patch_saves_nothing(agent, make_record, patch, words):
    record = make_record(data={"a": 1})
    response = save(
        agent, record, data_patch=patch, data_json='{"b": 1,\n"a": NaN}' if "NaN" in patch else '{"a": 2}'
    )
    assert words in html_of(response)
    assert fresh(record).version == record.version


def test_a_patch_that_changes_nothing_is_no_change(agent, make_record):
    record = make_record(data={"a": 1})
    response = save(agent, record, data_patch='{"set": {"a": 1}, "unset": ["b"]}', data_json='{"a": 2}')
    assert messages_of(response) == ["Nothing was changed."]
    assert FSMRecord.objects.get(pk=record.pk).version == record.version
