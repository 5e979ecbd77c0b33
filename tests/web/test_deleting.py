"""Deleting: the history tells who did it, and it is all or nothing."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.contrib.admin.models import DELETION, LogEntry
from django.db import OperationalError

from fsm_storage import DjangoStorage, signals
from fsm_storage.admin import deleting
from fsm_storage.exceptions import StorageTimeout
from fsm_storage.models import FSMRecord, FSMTransition
from tests.rows import transitions
from tests.web.conftest import LIST, html_of, messages_of

HOUR = timedelta(hours=1)


@pytest.fixture
def client(as_user):
    return as_user("view_fsmrecord", "delete_fsmrecord")


@pytest.fixture
def name(client):
    return client.get("/admin/").context["user"].get_username()


def delete_one(client, record):
    return client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"}, follow=True)


def delete_many(client, *records, query="", **fields):
    asked = {"action": "delete_selected", "_selected_action": [r.pk for r in records], "post": "yes"}
    return client.post(LIST + query, {**asked, **fields}, follow=True)


WAYS = [delete_one, delete_many]


@pytest.mark.parametrize("way", WAYS)
def test_who_is_deleted_leaves_the_state_by_the_hand_of_the_staff(client, name, make_record, way):
    record = make_record(state="Order:item", data={"a": 1})
    response = way(client, record)
    assert "uccessfully" in messages_of(response)[0]
    assert not FSMRecord.objects.exists()
    assert transitions("default") == [("Order:item", None, "admin", name)]
    entry = LogEntry.objects.get()
    assert (entry.action_flag, entry.object_id, entry.object_repr) == (DELETION, str(record.pk), record.key)


def test_only_who_was_in_a_state_leaves_it(client, name, make_record):
    live, gone, idle = (
        make_record(state="a"),
        make_record(state="b", state_ttl=-HOUR),
        make_record(data={"n": 1}),
    )
    delete_many(client, live, gone, idle)
    assert not FSMRecord.objects.exists()
    assert sorted(transitions("default")) == [("a", None, "admin", name), ("b", None, "expiry", "")]
    assert LogEntry.objects.count() == 3


@pytest.mark.parametrize("way", WAYS)
def test_what_no_storage_can_change_is_deleted_all_the_same(
    client, make_record, way, monkeypatch, django_capture_on_commit_callbacks
):
    record, heard = make_record(state="a", alias="forgotten"), []
    monkeypatch.setattr(signals, "hints", [lambda alias, written: heard.append((alias, *written))])
    with django_capture_on_commit_callbacks(execute=True):
        way(client, record)
    assert not FSMRecord.objects.exists()
    assert transitions("default") == []
    assert heard == [("forgotten", (record.key, None))]


def test_all_that_match_a_filter_are_deleted_though_they_match_no_more(client, make_record, monkeypatch):
    monkeypatch.setattr(deleting, "BATCH", 2)
    records = [make_record(state="Order:item") for _ in range(5)]
    other = make_record(state="Order:size")
    delete_many(client, records[0], query="?state=Order:item", select_across=1)
    assert [record.pk for record in FSMRecord.objects.all()] == [other.pk]
    assert FSMTransition.objects.filter(from_state="Order:item", to_state=None).count() == 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [StorageTimeout(5, "<b>stuck</b>"), OperationalError("<b>locked</b>")])
def test_what_fails_is_a_message_and_nothing_is_deleted(client, make_record, monkeypatch, way, error):
    done, delete = [], DjangoStorage.delete

    def fail_at_the_second(self, records, **options):
        if done or way is delete_one:
            raise error
        done.append(records)
        delete(self, records, **options)

    monkeypatch.setattr(deleting, "BATCH", 1)
    monkeypatch.setattr(DjangoStorage, "delete", fail_at_the_second)
    records = [make_record(state="a"), make_record(state="b")]
    response = way(client, records[0]) if way is delete_one else way(client, *records)
    assert response.status_code == 200
    assert len(messages_of(response)) == 1
    assert "&lt;b&gt;" in html_of(response)
    assert set(FSMRecord.objects.values_list("state", flat=True)) == {"a", "b"}
    assert transitions("default") == []
    assert not LogEntry.objects.exists()


def test_signals_say_once_that_the_record_is_gone(
    client, name, make_record, django_capture_on_commit_callbacks
):
    record, heard = make_record(state="a", data={"n": 1}), []

    def listen(sender, signal, **told):
        heard.append((signal, sender, told["record_key"], told["version"], told["source"], told["actor"]))

    both = (signals.state_changed, signals.data_changed)
    for signal in both:
        signal.connect(listen)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            delete_one(client, record)
    finally:
        for signal in both:
            signal.disconnect(listen)
    assert heard == [(signal, DjangoStorage, record.key, None, "admin", name) for signal in both]
