import pytest
from django.contrib.admin.models import LogEntry

from fsm_storage.admin.comparing import data_differences
from fsm_storage.models import FSMRecord, FSMTransition
from tests.web.conftest import XSS, form_of, fresh, html_of, messages_of, page_of


@pytest.fixture
def opened(make_record):
    """A form of a conversation on which the bot moved on after it was opened."""
    record = make_record(state="Order:item", data={"a": 1, "b": 1, "c": 1})
    form = form_of(record, state="=Order:payment", data_json='{"a": 2, "b": 1, "c": 2}')
    record.edit(state="Order:size", data={"a": 3, "b": 3, "c": 1}, source="bot")
    return record, form


def test_nothing_is_written_over_a_newer_version(agent, opened):
    record, form = opened
    response = agent.post(page_of(record), form)
    assert response.status_code == 409
    after = fresh(record)
    assert (after.state, after.data) == ("Order:size", {"a": 3, "b": 3, "c": 1})
    assert not LogEntry.objects.exists()
    assert FSMTransition.objects.count() == 1


def test_the_page_shows_all_three_versions_and_keeps_the_input(agent, opened):
    record, form = opened
    response = agent.post(page_of(record), form)
    conflict = response.context["conflict"]
    assert [tuple(key) for key in conflict["keys"]] == [
        ("a", "1", "3", "2"),
        ("b", "1", "3", "1"),
        ("c", "1", "1", "2"),
    ]
    assert [key.clashes for key in conflict["keys"]] == [True, False, False]
    assert "Order:size" in conflict["their_state"]
    assert "Order:payment" in conflict["your_state"]
    assert "Order:item" in conflict["opened_state"]
    kept = response.context["form"]
    assert kept["data_json"].value() == form["data_json"]
    assert kept["state"].value() == "=Order:payment"
    html = html_of(response)
    assert f'name="version" value="{form["version"]}"' in html
    assert f'name="_overwrite" value="{record.version}"' in html
    assert "It was changed <time" in html


def test_saving_again_is_refused_again(agent, opened):
    record, form = opened
    assert agent.post(page_of(record), form).status_code == 409
    assert agent.post(page_of(record), form).status_code == 409


def test_overwriting_is_a_choice_and_replaces_what_the_user_changed(agent, opened):
    record, form = opened
    response = agent.post(page_of(record), {**form, "_overwrite": record.version})
    assert response.status_code == 302
    after = fresh(record)
    assert (after.state, after.data) == ("Order:payment", {"a": 2, "b": 1, "c": 2})
    assert LogEntry.objects.get().change_message.startswith(
        "State: Order:size → Order:payment. Data: a: 3 → 2"
    )


def test_overwriting_leaves_alone_what_the_user_did_not_change(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    form = form_of(record, state="=Order:payment")
    record.edit(data={"a": 2})
    agent.post(page_of(record), {**form, "_overwrite": record.version})
    assert (fresh(record).state, fresh(record).data) == ("Order:payment", {"a": 2})


@pytest.mark.parametrize("version", ["x", "-1", "9" * 30, "²"])
def test_a_made_up_version_overwrites_nothing(agent, opened, version):
    record, form = opened
    assert agent.post(page_of(record), {**form, "_overwrite": version}).status_code == 409


def test_a_version_that_moved_again_is_not_overwritten(agent, opened):
    record, form = opened
    shown = record.version
    record.edit(state="Order:amount")
    response = agent.post(page_of(record), {**form, "_overwrite": shown})
    assert response.status_code == 409
    assert fresh(record).state == "Order:amount"


def test_a_change_between_reading_and_writing_is_a_conflict(agent, make_record, monkeypatch):
    record = make_record(state="Order:item", data={"a": 1})
    edit = FSMRecord.edit

    def late(self, **changes):
        monkeypatch.setattr(FSMRecord, "edit", edit)
        FSMRecord.objects.get(pk=self.pk).edit(state="Order:size", source="bot")
        return edit(self, **changes)

    monkeypatch.setattr(FSMRecord, "edit", late)
    response = agent.post(page_of(record), form_of(record, state="=Order:payment"))
    assert response.status_code == 409
    assert "Order:size" in response.context["conflict"]["their_state"] or fresh(record).state == "Order:item"
    assert fresh(record).state != "Order:payment"
    assert not LogEntry.objects.exists()


def test_a_record_that_vanishes_between_reading_and_writing(agent, make_record, monkeypatch):
    record = make_record(state="Order:item")
    edit = FSMRecord.edit

    def late(self, **changes):
        FSMRecord.objects.filter(pk=self.pk).delete()
        return edit(self, **changes)

    monkeypatch.setattr(FSMRecord, "edit", late)
    monkeypatch.setattr("fsm_storage.admin.editing.EditingMixin._find", _find_then_nothing())
    response = agent.post(page_of(record), form_of(record, state="=Order:payment"), follow=True)
    assert "not in the database any more" in messages_of(response)[0]


def _find_then_nothing():
    """The savepoint of the view brings a deleted row back, which no other transaction would."""
    found = []

    def find(self, request, object_id):
        if not found:
            found.append(FSMRecord.objects.with_clock().get(pk=object_id))
            return found[0]
        return None

    return find


@pytest.mark.parametrize("theirs", [[1], None, "x", {XSS: XSS}])
def test_any_data_can_be_compared_and_is_escaped(agent, make_record, theirs):
    record = make_record(state=XSS, data={XSS: 1})
    form = form_of(record, data_json='{"</pre>": 2}')
    FSMRecord.objects.filter(pk=record.pk).update(
        data=theirs if theirs is not None else "", version=record.version + 1
    )
    response = agent.post(page_of(record), form)
    assert response.status_code == 409
    html = html_of(response)
    assert "<script>alert" not in html
    assert "</pre>&quot;" not in html


def test_differences_tell_numbers_apart():
    assert data_differences({"a": 1}, {"a": 1.0}, {"a": True})[0].clashes
    assert data_differences({"a": [1]}, {"a": [1]}, {"a": [1]}) == []
    assert data_differences([1], [1], [1]) == []
    assert data_differences([1], {"a": 1}, [1])[0].by_them
