import json
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test.utils import CaptureQueriesContext

from fsm_storage.admin import actions
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.transfer.lines import CONVERSATION
from tests.web.conftest import LIST, XSS, fresh, html_of, messages_of, note

HOUR = timedelta(hours=1)


def ask(client, action, records, query="", **fields):
    data = {
        "action": action,
        "_selected_action": [r.pk for r in records],
        "index": 0,
        "select_across": 0,
        **fields,
    }
    return client.post(LIST + query, data)


def confirm(client, action, records, query="", **fields):
    page = ask(client, action, records, query, **fields)
    assert page.status_code == 200
    hidden = {"post": "yes", "expected": page.context["count"]}
    data = {"action": action, "_selected_action": [r.pk for r in records], **hidden, **fields}
    return client.post(LIST + query, data, follow=True)


def test_clearing_asks_first(agent, make_record):
    record = make_record(state=XSS, data={"a": 1})
    response = ask(agent, "clear_state", [record])
    html = html_of(response)
    assert "1 conversation is selected." in html
    assert record.key in html
    assert "<script>alert" not in html
    assert fresh(record).version == record.version


def test_the_state_is_cleared_through_the_storage(agent, make_record):
    one = make_record(state="Order:item", data={"a": 1}, data_ttl=HOUR)
    two = make_record(state="Support:topic")
    idle, other = make_record(data={"a": 1}), make_record(state="Order:item")
    response = confirm(agent, "clear_state", [one, two, idle])
    assert [fresh(r).state for r in (one, two, idle)] == [None, None, None]
    assert fresh(other).state == "Order:item"
    assert fresh(one).data == {"a": 1}
    assert fresh(one).data_expires_at == one.data_expires_at
    assert fresh(idle).version == idle.version
    user = response.context["user"]
    found = FSMTransition.objects.order_by("key").values_list(
        "key", "from_state", "to_state", "source", "actor"
    )
    name = user.get_username()
    assert sorted(found) == sorted(
        [(one.key, "Order:item", None, "admin", name), (two.key, "Support:topic", None, "admin", name)]
    )
    assert [note(object_id=r.pk)["state"] for r in (one, two)] == [
        ["Order:item", None],
        ["Support:topic", None],
    ]
    assert LogEntry.objects.count() == 2
    assert messages_of(response) == ["2 conversations were changed.", "1 had nothing to change."]


def test_everything_is_cleared(agent, make_record):
    both = make_record(state="Order:item", data={"a": 1})
    data = make_record(data={"b": XSS})
    odd = make_record(state="Order:size", data=[1, 2])
    confirm(agent, "clear_all", [both, data, odd])
    assert [(fresh(r).state, fresh(r).data) for r in (both, data, odd)] == [(None, {})] * 3
    assert note(object_id=both.pk)["data"] == [["a", "1", None]]
    assert note(object_id=odd.pk)["data"] == [["", "[\n  1,\n  2\n]", "{}"]]


def left(record, part):
    at = getattr(fresh(record), f"{part}_expires_at")
    return None if at is None else (at - fresh(record).read_at).total_seconds()


def test_extending_lengthens_and_never_shortens_or_revives(agent, make_record):
    soon = make_record(state="Order:item", data={"a": 1}, state_ttl=HOUR, data_ttl=2 * HOUR)
    mixed = make_record(state="Order:item", data={"a": 1}, state_ttl=HOUR, data_ttl=100 * HOUR)
    never = make_record(state="Order:item")
    expired = make_record(state="Order:item", state_ttl=-HOUR)
    confirm(agent, "extend_ttl", [soon, mixed, never, expired], duration="24h")
    day = 24 * 3600
    assert day - 10 < left(soon, "state") <= day
    assert day - 10 < left(soon, "data") <= day
    assert day - 10 < left(mixed, "state") <= day
    assert left(mixed, "data") > 99 * 3600
    assert left(never, "state") is None
    assert fresh(expired).version == expired.version
    assert fresh(soon).state == "Order:item"
    assert LogEntry.objects.count() == 2


def test_a_wrong_duration_is_asked_again(agent, make_record):
    record = make_record(state="Order:item", state_ttl=HOUR)
    data = {"action": "extend_ttl", "_selected_action": [record.pk], "post": "yes", "expected": 1}
    response = agent.post(LIST, {**data, "duration": "soon"})
    assert response.status_code == 200
    assert "is no duration" in html_of(response)
    assert fresh(record).version == record.version


def test_all_of_a_filter_and_only_those(agent, make_record):
    inside = [make_record(state="Order:item") for _ in range(5)]
    outside = make_record(state="Support:topic")
    response = ask(agent, "clear_state", inside[:1], "?group=Order", select_across=1)
    assert "5 conversations are selected." in html_of(response)
    confirm(agent, "clear_state", inside[:1], "?group=Order", select_across=1)
    assert all(fresh(record).state is None for record in inside)
    assert fresh(outside).state == "Support:topic"


def test_a_selection_that_grew_meanwhile_is_shown_again(agent, make_record):
    first = make_record(state="Order:item")
    data = {
        "action": "clear_state",
        "_selected_action": [first.pk],
        "post": "yes",
        "expected": 1,
        "select_across": 1,
    }
    second = make_record(state="Order:item")
    response = agent.post(LIST + "?group=Order", data)
    assert "2 conversations are selected." in html_of(response)
    assert "changed while you were looking" in html_of(response)
    assert (fresh(first).state, fresh(second).state) == ("Order:item", "Order:item")


def test_too_many_are_refused(agent, make_record, monkeypatch):
    monkeypatch.setattr(actions, "MOST", 3)
    records = [make_record(state="Order:item") for _ in range(4)]
    selected = {"action": "clear_state", "_selected_action": [records[0].pk], "index": 0, "select_across": 1}
    response = agent.post(LIST, selected, follow=True)
    assert messages_of(response) == ["More than 3 conversations are selected. Narrow the list with filters."]


def test_batches_take_few_queries(agent, make_record, monkeypatch):
    monkeypatch.setattr(actions, "BATCH", 50)
    records = [make_record(state="Order:item") for _ in range(100)]
    with CaptureQueriesContext(connection) as queries:
        confirm(agent, "clear_state", records)
    assert all(fresh(record).state is None for record in records)
    assert len(queries) < 70


def test_a_storage_that_cannot_be_edited_stops_the_action(agent, make_record):
    record = make_record(alias="elsewhere", state="Order:item")
    response = confirm(agent, "clear_state", [record])
    assert messages_of(response)[0].startswith("Stopped: records of storage 'elsewhere' cannot be edited")
    assert fresh(record).state == "Order:item"
    assert not LogEntry.objects.exists()


@pytest.fixture
def exporter(as_user):
    return as_user("view_fsmrecord", "view_data_fsmrecord", "export_fsmrecord")


def export(client, records, query="", **fields):
    response = ask(client, "export_jsonl", records, query, **fields)
    assert response["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in b"".join(response.streaming_content).decode().split("\n")[:-1]]


def test_the_export_is_exact(exporter, make_record):
    data = {"big": 2**70, "float": 0.1 + 0.2, "text": "a\nb\u2028 é", "deep": [{"x": None}]}
    record = make_record(state=XSS, data=data, thread_id=5, state_ttl=HOUR, chat_id=-100)
    odd = make_record(data=[1])
    lines = export(exporter, [record, odd])
    line = lines[0]
    assert list(line) == ["format", "type", "id", *CONVERSATION]
    assert (line["data"], line["state"], line["chat_id"], line["thread_id"]) == (data, XSS, -100, 5)
    assert line["state_expires_at"] == record.state_expires_at.isoformat()
    assert line["data_expires_at"] is None
    assert lines[1]["data"] == [1]


def test_the_export_streams_all_of_a_filter_in_batches(exporter, make_record, monkeypatch):
    monkeypatch.setattr("fsm_storage.transfer.lines.PAGE", 4)
    made = {make_record(state="Order:item").key for _ in range(11)}
    make_record(state="Support:topic")
    lines = export(exporter, [FSMRecord.objects.first()], "?group=Order", select_across=1)
    assert {line["key"] for line in lines} == made
    assert len(lines) == 11


def test_deleting_is_djangos_own(as_user, make_record):
    client = as_user("view_fsmrecord", "delete_fsmrecord")
    record = make_record(state=XSS, key=f"k{XSS}")
    page = ask(client, "delete_selected", [record])
    assert "<script>alert" not in html_of(page)
    client.post(LIST, {"action": "delete_selected", "_selected_action": [record.pk], "post": "yes"})
    assert not FSMRecord.objects.exists()
