import json
import re
from datetime import timedelta
from itertools import count

import pytest
from django.contrib.admin.models import LogEntry
from django.core import signing
from django.db import OperationalError, connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from fsm_storage import DjangoStorage, signals
from fsm_storage.admin import actions, bulkwork
from fsm_storage.admin.bulk import ACTIONS
from fsm_storage.models import FSMBulk, FSMBulkItem, FSMRecord, FSMTransition
from fsm_storage.rights import rights_of
from fsm_storage.transfer.lines import CONVERSATION
from tests.web.conftest import AGENT, LIST, XSS, fresh, html_of, messages_of, note

BULK = f"{LIST}bulk/"

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
    """Go the whole way: ask, see what would change, do it, see what became of it."""
    page = ask(
        client,
        action,
        records,
        query,
        **({"select_across": fields.pop("select_across")} if "select_across" in fields else {}),
    )
    assert page.status_code == 200
    if fields:
        page = client.post(BULK, {"token": page.context["token"], "ask": "1", **fields})
        assert page.context["is_ready"], page.context["form"].errors
    return client.post(BULK, {"token": page.context["token"], "run": "1"}, follow=True)


def outcomes(response):
    return {str(one): number for one, number in response.context["counts"]}


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
    assert outcomes(response) == {"changed": 2, "unchanged": 1}
    assert "2 conversations were changed." in html_of(response)


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


@pytest.mark.parametrize(
    ("action", "fields", "words"),
    [
        ("extend_ttl", {"duration": "soon"}, "is no duration"),
        ("move_state", {}, "Choose a state."),
        ("set_key", {"name": "a", "value": '{"x": oops}'}, "Line 1, column 7"),
        ("set_key", {"name": "", "value": "1"}, "This field is required."),
        ("unset_key", {"name": ""}, "This field is required."),
    ],
)
def test_wrong_arguments_are_asked_again(agent, make_record, action, fields, words):
    record = make_record(state="Order:item", state_ttl=HOUR)
    token = ask(agent, action, [record]).context["token"]
    response = agent.post(BULK, {"token": token, "ask": "1", **fields})
    assert response.status_code == 200
    assert words in html_of(response)
    # What was never shown cannot be done either.
    agent.post(BULK, {"token": response.context["token"], "run": "1", "ask": "1", **fields})
    assert fresh(record).version == record.version
    assert not FSMBulk.objects.exists()


def test_all_of_a_filter_and_only_those(agent, make_record):
    inside = [make_record(state="Order:item") for _ in range(5)]
    outside = make_record(state="Support:topic")
    response = ask(agent, "clear_state", inside[:1], "?group=Order", select_across=1)
    assert "5 conversations are selected." in html_of(response)
    confirm(agent, "clear_state", inside[:1], "?group=Order", select_across=1)
    assert all(fresh(record).state is None for record in inside)
    assert fresh(outside).state == "Support:topic"


def test_a_selection_that_changed_meanwhile_is_shown_again(agent, make_record):
    first = make_record(state="Order:item")
    page = ask(agent, "clear_state", [first], "?group=Order", select_across=1)
    second = make_record(state="Order:item")
    response = agent.post(BULK, {"token": page.context["token"], "run": "1"})
    assert response.status_code == 409
    assert "2 conversations are selected." in html_of(response)
    assert "1 conversations were selected, now it would be 2" in html_of(response)
    assert (fresh(first).state, fresh(second).state) == ("Order:item", "Order:item")
    agent.post(BULK, {"token": response.context["token"], "run": "1"})
    assert (fresh(first).state, fresh(second).state) == (None, None)


def test_too_many_are_refused(agent, make_record, monkeypatch):
    monkeypatch.setattr(bulkwork, "MOST", 3)
    records = [make_record(state="Order:item") for _ in range(4)]
    selected = {"action": "clear_state", "_selected_action": [records[0].pk], "index": 0, "select_across": 1}
    response = agent.post(LIST, selected, follow=True)
    assert messages_of(response) == ["More than 3 conversations are selected. Narrow the list with filters."]


def test_batches_take_few_queries(agent, make_record, monkeypatch):
    monkeypatch.setattr(bulkwork, "BATCH", 50)
    records = [make_record(state="Order:item") for _ in range(100)]
    with CaptureQueriesContext(connection) as queries:
        confirm(agent, "clear_state", records)
    assert all(fresh(record).state is None for record in records)
    assert len(queries) < 120


def test_a_storage_that_cannot_be_edited_is_told_for_its_records(agent, make_record):
    record, other = make_record(alias="elsewhere", state="Order:item"), make_record(state="Order:item")
    response = confirm(agent, "clear_state", [record, other])
    assert outcomes(response) == {"changed": 1, "failed": 1}
    assert "storage “elsewhere” cannot be changed here" in html_of(response)
    assert (fresh(record).state, fresh(other).state) == ("Order:item", None)
    assert LogEntry.objects.count() == 1


def test_people_are_moved_to_a_state(agent, make_record):
    record, there = make_record(state="Order:item", data={"a": 1}), make_record(state="Order:payment")
    page = ask(agent, "move_state", [record, there])
    page = agent.post(BULK, {"token": page.context["token"], "ask": "1", "state": "=Order:payment"})
    assert ["Order:payment" in row.get("new_state", "") for row in page.context["rows"]].count(True) == 1
    assert fresh(record).state == "Order:item"
    response = agent.post(BULK, {"token": page.context["token"], "run": "1"}, follow=True)
    assert outcomes(response) == {"changed": 1, "unchanged": 1}
    assert (fresh(record).state, fresh(record).data) == ("Order:payment", {"a": 1})


def test_one_key_is_set_exactly_and_the_others_stay(agent, make_record):
    record, odd = make_record(data={"a": 1, "keep": 2**70}), make_record(data=[1])
    response = confirm(agent, "set_key", [record, odd], name="a", value=f'{{"n": {2**64 + 1}}}')
    assert fresh(record).data == {"a": {"n": 2**64 + 1}, "keep": 2**70}
    assert outcomes(response) == {"changed": 1, "failed": 1}
    assert "The data is no object" in html_of(response)
    assert note(object_id=record.pk)["data"][0][0] == "a"


def test_one_key_is_removed(agent, make_record):
    record, without = make_record(data={"a": 1, "b": 2}), make_record(data={"b": 2})
    assert outcomes(confirm(agent, "unset_key", [record, without], name="a")) == {
        "changed": 1,
        "unchanged": 1,
    }
    assert fresh(record).data == {"b": 2}


@pytest.fixture
def bot_is_quicker(monkeypatch):
    """Let the bot change a record each time between the admin's reading and its writing, while it has changes."""

    def arrange(record, changes, before="_change"):
        method = getattr(bulkwork.Worker, before)

        def late(self, tasks):
            if any(task.record.pk == record.pk for task in tasks) and (change := next(changes, None)):
                FSMRecord.objects.get(pk=record.pk).edit(**change, source="bot")
            method(self, tasks)

        monkeypatch.setattr(bulkwork.Worker, before, late)

    return arrange


def test_what_the_bot_writes_meanwhile_is_kept(agent, make_record, bot_is_quicker):
    records = [make_record(state="Order:item", data={"n": 0}) for _ in range(3)]
    bot_is_quicker(records[1], iter([{"data": {"n": 1}}, {"data": {"n": 2, "bot": True}}]))
    response = confirm(agent, "set_key", records, name="new", value="1")
    assert outcomes(response) == {"changed": 3}
    assert fresh(records[1]).data == {"n": 2, "bot": True, "new": 1}
    assert LogEntry.objects.count() == 3


def test_one_that_never_stands_still_is_left_alone(agent, make_record, bot_is_quicker):
    """Where no lock holds: here the bot's write is made to come in between in spite of it."""
    calm, busy = make_record(state="Order:item"), make_record(state="Order:item")
    bot_is_quicker(busy, ({"data": {"n": number}} for number in count(1)), before="_write")
    response = confirm(agent, "clear_state", [calm, busy])
    assert (fresh(calm).state, fresh(busy).state) == (None, "Order:item")
    assert outcomes(response) == {"changed": 1, "moved": 1}
    assert LogEntry.objects.count() == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token[:-1] + ("a" if token[-1] != "a" else "b"),
        lambda token: "",
        lambda token: "x" * 100,
        lambda token: signing.dumps(["x"], salt="another"),
    ],
)
def test_a_changed_selection_does_nothing(agent, make_record, spoil):
    record = make_record(state="Order:item")
    token = ask(agent, "clear_state", [record]).context["token"]
    response = agent.post(BULK, {"token": spoil(token), "run": "1"}, follow=True)
    assert "too old, or was changed" in messages_of(response)[0]
    assert fresh(record).state == "Order:item"


def test_an_old_selection_does_nothing(agent, make_record, monkeypatch):
    record = make_record(state="Order:item")
    token = ask(agent, "clear_state", [record]).context["token"]
    monkeypatch.setattr(actions, "VALID_SECONDS", -1)
    response = agent.post(BULK, {"token": token, "run": "1"}, follow=True)
    assert "too old, or was changed" in messages_of(response)[0]
    assert fresh(record).state == "Order:item"


def test_a_selection_of_somebody_else_does_nothing(agent, as_user, make_record):
    record = make_record(state="Order:item")
    token = ask(agent, "clear_state", [record]).context["token"]
    response = as_user(*AGENT).post(BULK, {"token": token, "run": "1"}, follow=True)
    assert "too old, or was changed" in messages_of(response)[0]
    assert fresh(record).state == "Order:item"


def test_a_filter_that_no_longer_parses_does_nothing(agent, make_record):
    record = make_record(state="Order:item")
    user = agent.get("/admin/").context["user"]
    selection = actions.Selection(user.pk, "clear_state", "expires=some+day", [], 1, {})
    response = agent.post(BULK, {"token": selection.signed(), "run": "1"}, follow=True)
    assert "The filter means nothing any more" in messages_of(response)[0]
    assert fresh(record).state == "Order:item"


def test_what_was_shown_is_done_and_not_what_is_sent_with_it(agent, make_record):
    record = make_record(data={"a": 1})
    token = ask(agent, "set_key", [record]).context["token"]
    page = agent.post(BULK, {"token": token, "ask": "1", "name": "a", "value": "2"})
    agent.post(BULK, {"token": page.context["token"], "run": "1", "name": "a", "value": "3"})
    assert fresh(record).data == {"a": 2}


def test_work_goes_on_over_requests_and_nothing_is_done_twice(agent, make_record, monkeypatch):
    monkeypatch.setattr(bulkwork, "BATCH", 2)
    monkeypatch.setattr(actions, "WORK_SECONDS", 0)
    records = [make_record(state="Order:item") for _ in range(5)]
    response = confirm(agent, "clear_state", records)
    url = response.redirect_chain[-1][0]
    for done in (2, 4):
        assert (response.context["done"], response.context["waiting"]) == (done, 5 - done)
        assert "Go on" in html_of(response)
        response = agent.post(url, follow=True)
    assert outcomes(response) == {"changed": 5}
    assert "Go on" not in html_of(response)
    agent.post(url)
    assert LogEntry.objects.count() == 5


def test_two_requests_at_a_time_share_no_item(agent, make_record, make_user):
    user, record = make_user(*AGENT), make_record(state="Order:item")
    bulk = bulkwork.start(ACTIONS["clear_state"], {}, [(record.pk, record.key)], user)
    (item,) = bulk.items.all()
    worker = bulkwork.Worker(bulk, {}, user, rights_of(user))
    worker.carry_out([item])
    record.refresh_from_db()
    record.edit(state="Order:item", source="bot")  # and now the slower one of the two
    worker.carry_out([item])
    assert fresh(record).state == "Order:item"
    assert LogEntry.objects.count() == 1


def test_an_undo_brings_everything_back_that_nobody_touched(agent, make_record):
    records = [
        make_record(state="Order:item", data={"a": n, "big": 2**70}, state_ttl=HOUR, data_ttl=2 * HOUR)
        for n in range(3)
    ]
    response = confirm(agent, "clear_all", records)
    fresh(records[1]).edit(state="Support:topic", source="bot")
    fresh(records[2]).delete()
    url = f"{response.redirect_chain[-1][0]}undo/"
    undone = agent.post(url, follow=True)
    assert outcomes(undone) == {"changed": 1, "moved": 1, "gone": 1}
    after = fresh(records[0])
    assert (after.state, after.data) == ("Order:item", {"a": 0, "big": 2**70})
    assert abs(left(records[0], "state") - 3600) < 20
    assert abs(left(records[0], "data") - 7200) < 20
    assert fresh(records[1]).state == "Support:topic"
    assert "This was undone" in html_of(agent.get(response.redirect_chain[-1][0]))


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("move_state", {"state": "none"}),
        ("move_state", {"other_state": "X:y"}),
        ("set_key", {"name": "a", "value": "5"}),
        ("unset_key", {"name": "a"}),
        ("extend_ttl", {"duration": "3d"}),
        ("clear_state", {}),
    ],
)
def test_every_action_can_be_undone_and_that_as_well(agent, make_record, action, fields):
    record = make_record(state="Order:item", data={"a": 1}, state_ttl=HOUR)
    was = fresh(record)
    response = confirm(agent, action, [record], **fields)
    then = fresh(record)
    assert then.version != was.version
    undone = agent.post(f"{response.redirect_chain[-1][0]}undo/", follow=True)
    after = fresh(record)
    assert (after.state, after.data, after.data_expires_at) == (was.state, was.data, was.data_expires_at)
    assert abs(left(record, "state") - 3600) < 20
    agent.post(f"{undone.redirect_chain[-1][0]}undo/")
    assert (fresh(record).state, fresh(record).data) == (then.state, then.data)


def test_what_expired_meanwhile_does_not_come_back(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1}, state_ttl=HOUR)
    response = confirm(agent, "clear_state", [record])
    FSMBulkItem.objects.update(
        before={"state": "Order:item", "state_expires_at": "2020-01-01T00:00:00+00:00"}
    )
    agent.post(f"{response.redirect_chain[-1][0]}undo/")
    assert fresh(record).state is None


def test_a_database_that_fails_stops_the_work_which_can_go_on(agent, make_record, monkeypatch):
    record = make_record(state="Order:item")
    edit = DjangoStorage.edit

    def fail(*args, **kwargs):
        raise OperationalError("database is <b>locked</b>")

    monkeypatch.setattr(DjangoStorage, "edit", fail)
    response = confirm(agent, "clear_state", [record])
    assert "database is <b>locked</b>" in messages_of(response)[0]
    assert "<b>locked" not in html_of(response)
    assert response.context["waiting"] == 1
    assert not LogEntry.objects.exists()
    monkeypatch.setattr(DjangoStorage, "edit", edit)
    assert outcomes(agent.post(response.redirect_chain[-1][0], follow=True)) == {"changed": 1}


def test_results_are_kept_for_a_while(agent, make_record):
    record = make_record(state="Order:item")
    confirm(agent, "clear_state", [record])
    FSMBulk.objects.update(created_at=Now() - timedelta(days=31))
    confirm(agent, "move_state", [record], state="=Order:size")
    assert FSMBulk.objects.get().action == "move_state"
    assert FSMBulkItem.objects.count() == 1


def test_results_are_listed_by_outcome_page_by_page(agent, make_record, monkeypatch):
    monkeypatch.setattr(actions, "RESULTS_PER_PAGE", 2)
    records = [make_record(state="Order:item", key=f"{n}{XSS}") for n in range(5)]
    response = confirm(agent, "clear_state", [*records, make_record()])
    url = response.redirect_chain[-1][0]
    assert "<script>alert" not in html_of(response)
    assert [item.outcome for item in agent.get(f"{url}?outcome=unchanged").context["page"]] == ["unchanged"]
    assert len(agent.get(f"{url}?outcome=changed&p=3").context["page"]) == 1
    assert agent.get(f"{url}?outcome=bogus&p=x").status_code == 200


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


def test_the_dry_run_names_the_chosen_state_as_people_do(agent, make_record):
    record = make_record(state="Order:item")
    html = html_of(agent.post(LIST, {"action": "move_state", "_selected_action": [record.pk], "index": "0"}))
    token = re.search(r'name="token" value="([^"]+)"', html)[1]
    asked = {"token": token, "state": "=Order:payment", "other_state": "", "ask": "1"}
    html = html_of(agent.post(f"{LIST}bulk/", asked))
    assert "=Order:payment" not in html
    assert html.count('title="Order:payment"') == 2


@pytest.mark.parametrize("how", ["selected", "page"])
def test_live_pages_hear_of_what_is_deleted(
    as_user, make_record, monkeypatch, how, django_capture_on_commit_callbacks
):
    client = as_user("view_fsmrecord", "delete_fsmrecord")
    record, heard = make_record(state="x"), []
    monkeypatch.setattr(signals, "hints", [lambda alias, written: heard.append((alias, *written))])
    with django_capture_on_commit_callbacks(execute=True):
        if how == "page":
            client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"})
        else:
            client.post(LIST, {"action": "delete_selected", "_selected_action": [record.pk], "post": "yes"})
    assert not FSMRecord.objects.exists()
    assert heard == [("default", (record.key, None))]
