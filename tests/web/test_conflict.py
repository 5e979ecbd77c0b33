import pytest
from django.contrib.admin.models import LogEntry

from fsm_storage.admin import editing
from fsm_storage.admin.comparing import data_differences
from fsm_storage.admin.log import logged
from fsm_storage.models import FSMRecord, FSMTransition
from tests.web.conftest import XSS, form_of, fresh, html_of, messages_of, note, page_of


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
    assert [tuple(key) for key, _choice in conflict["merge"].rows] == [
        ("a", "1", "3", "2"),
        ("b", "1", "3", "1"),
        ("c", "1", "1", "2"),
    ]
    assert [key.clashes for key, _choice in conflict["merge"].rows] == [True, False, False]
    assert "Order:size" in conflict["their_state"]
    assert "Order:payment" in conflict["your_state"]
    assert "Order:item" in conflict["opened_state"]
    kept = response.context["form"]
    assert kept["data_json"].value() == form["data_json"]
    assert kept["state"].value() == "=Order:payment"
    html = html_of(response)
    assert f'name="version" value="{form["version"]}"' in html
    assert f'name="merging" value="{record.version}"' in html
    assert html.count('type="radio"') == 4
    assert 'name="choice:a"' in html
    assert "It was changed <time" in html


def test_saving_again_is_refused_again(agent, opened):
    record, form = opened
    assert agent.post(page_of(record), form).status_code == 409
    assert agent.post(page_of(record), form).status_code == 409


@pytest.mark.parametrize(
    ("state", "a", "left"),
    [
        ("yours", "yours", ("Order:payment", {"a": 2, "b": 3, "c": 2})),
        ("theirs", "theirs", ("Order:size", {"a": 3, "b": 3, "c": 2})),
        ("yours", "theirs", ("Order:payment", {"a": 3, "b": 3, "c": 2})),
    ],
)
def test_a_clash_ends_as_it_was_chosen_and_the_rest_is_merged(agent, opened, state, a, left):
    record, form = opened
    choices = {"merging": record.version, "choice-state": state, "choice:a": a}
    response = agent.post(page_of(record), {**form, **choices}, follow=True)
    after = fresh(record)
    assert (after.state, after.data) == left
    assert any("both changes were put together" in message for message in messages_of(response))
    assert ["c", "1", "2"] in note()["data"]
    assert not any(key == "b" for key, _old, _new in note()["data"])


@pytest.mark.parametrize("choices", [{"choice-state": "yours"}, {"choice:a": "yours"}, {"choice:a": "x"}])
def test_every_clash_needs_a_choice(agent, opened, choices):
    record, form = opened
    assert agent.post(page_of(record), {**form, "merging": record.version, **choices}).status_code == 409
    assert fresh(record).version == record.version


def test_what_does_not_overlap_merges_by_itself(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1, "b": 1})
    form = form_of(record, state="=Order:payment", data_json='{"a": 1, "b": 2, "mine": 5}')
    record.edit(data={"a": 9, "b": 1, "theirs": 2**70}, source="bot")
    response = agent.post(page_of(record), form, follow=True)
    assert (fresh(record).state, fresh(record).data) == (
        "Order:payment",
        {"a": 9, "b": 2, "mine": 5, "theirs": 2**70},
    )
    told = messages_of(response)[0]
    assert "Kept from there: a, theirs." in told
    assert "Yours: the state, b, mine." in told


def test_a_key_removed_on_one_side_and_changed_on_the_other_clashes(agent, make_record):
    record = make_record(data={"a": 1, "b": 1})
    form = form_of(record, data_json='{"b": 1}')
    record.edit(data={"a": 2, "b": 1}, source="bot")
    assert agent.post(page_of(record), form).status_code == 409
    agent.post(page_of(record), {**form, "merging": record.version, "choice:a": "yours"})
    assert fresh(record).data == {"b": 1}


def test_the_same_change_on_both_sides_is_no_clash(agent, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    form = form_of(record, state="=Order:payment", data_json='{"a": 2}')
    record.edit(state="Order:payment", data={"a": 2}, source="bot")
    response = agent.post(page_of(record), form, follow=True)
    assert messages_of(response) == ["The conversation is already as you want it."]
    assert fresh(record).version == record.version
    assert not LogEntry.objects.exists()


def test_data_that_is_no_object_is_merged_as_a_whole(agent, make_record):
    record = make_record(data=[1])
    form = form_of(record, data_json='{"mended": true}')
    FSMRecord.objects.filter(pk=record.pk).update(data=[2], version=8)
    assert agent.post(page_of(record), form).status_code == 409
    agent.post(page_of(record), {**form, "merging": 8, "choice:": "yours"})
    assert fresh(record).data == {"mended": True}


@pytest.mark.parametrize("version", ["x", "-1", "9" * 30, "²", ""])
def test_choices_for_a_made_up_version_count_for_nothing(agent, opened, version):
    record, form = opened
    choices = {"merging": version, "choice-state": "yours", "choice:a": "yours"}
    assert agent.post(page_of(record), {**form, **choices}).status_code == 409


def test_choices_for_a_version_that_moved_again_count_for_nothing(agent, opened):
    record, form = opened
    choices = {"merging": record.version, "choice-state": "yours", "choice:a": "yours"}
    record.edit(state="Order:amount")
    assert agent.post(page_of(record), {**form, **choices}).status_code == 409
    assert fresh(record).state == "Order:amount"


@pytest.fixture
def bot_is_quicker(monkeypatch):
    """Let the bot change a record between the admin's reading and its writing, as often as is said."""

    def arrange(record, *changes):
        waiting = list(changes)

        def late(user, notes):
            if waiting:
                FSMRecord.objects.get(pk=record.pk).edit(**waiting.pop(0), source="bot")
            return logged(user, notes)

        monkeypatch.setattr(editing, "logged", late)

    return arrange


def test_a_clashing_change_between_reading_and_writing_is_a_conflict(agent, make_record, bot_is_quicker):
    record = make_record(state="Order:item", data={"a": 1})
    bot_is_quicker(record, {"state": "Order:size"})
    response = agent.post(page_of(record), form_of(record, state="=Order:payment"))
    assert response.status_code == 409
    assert "Order:size" in response.context["conflict"]["their_state"]
    assert fresh(record).state == "Order:size"
    assert not LogEntry.objects.exists()


def test_other_changes_between_reading_and_writing_are_merged(agent, make_record, bot_is_quicker):
    record = make_record(state="Order:item", data={"a": 1})
    bot_is_quicker(record, {"data": {"a": 2}}, {"data": {"a": 3}})
    agent.post(page_of(record), form_of(record, state="=Order:payment"))
    assert (fresh(record).state, fresh(record).data) == ("Order:payment", {"a": 3})
    assert LogEntry.objects.count() == 1


def test_a_conversation_that_never_stands_still_is_shown_in_the_end(agent, make_record, bot_is_quicker):
    record = make_record(state="Order:item", data={"a": 1})
    bot_is_quicker(record, *({"data": {"a": number}} for number in range(2, 20)))
    assert agent.post(page_of(record), form_of(record, state="=Order:payment")).status_code == 409
    assert fresh(record).state == "Order:item"
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
