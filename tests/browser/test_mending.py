"""Mending as people do it: by mouse, by keyboard alone, without scripts; one conversation and many."""

from __future__ import annotations

import json

import pytest

from fsm_storage import storages
from fsm_storage.admin import actions, bulkwork
from fsm_storage.models import FSMRecord
from tests.browser.contrast import weak_texts
from tests.browser.pages import LIST, PHONE, XSS, enter, follow, overflow, page_of

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
SCRIPTS = pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])


@pytest.fixture
def full_history(settings):
    settings.FSM_STORAGES = {
        "default": {"BACKEND": "fsm_storage.DjangoStorage", "OPTIONS": {"history": "full"}},
    }
    storages.reset()


FRAMED = ("text", "textarea", "search")  # the stock admin gives these another border instead of an outline


def tab_to(page, selector, limit=150):
    """Press Tab until the element has the focus, as somebody without a mouse does."""
    for _ in range(limit):
        if page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
            look = page.evaluate(
                "[getComputedStyle(document.activeElement).outlineStyle, document.activeElement.type]"
            )
            assert look[0] != "none" or look[1] in FRAMED, f"{selector} does not show that it has the focus"
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {selector}")


@SCRIPTS
def test_what_came_from_where_and_back_again(open_page, make_record, full_history, scripts):
    record = make_record(1002, data={})
    record.edit(state="Order:item", data={"n": 2**53 + 1, "text": XSS}, source="bot")
    record.edit(state="Order:size", data={"n": 2}, source="bot")
    page = open_page(page_of(record), java_script_enabled=scripts)
    timeline = page.locator("#timeline")
    assert XSS in timeline.inner_text()
    assert timeline.locator("tbody tr").count() == 2
    follow(page, ".fsm-restore")
    page.wait_for_selector(".fsm-preview")
    assert str(2**53 + 1) in page.locator(".fsm-preview ins").first.inner_text()
    assert FSMRecord.objects.get(pk=record.pk).state == "Order:size"
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".messagelist .success")
    after = FSMRecord.objects.get(pk=record.pk)
    assert (after.state, after.data) == ("Order:item", {"n": 2**53 + 1, "text": XSS})
    assert page.locator("#timeline tbody tr").count() == 3


def test_older_changes_without_scripts(open_page, make_record):
    record = make_record(1002)
    for number in range(60):
        record.edit(state=f"Order:s{number}", source="bot")
    page = open_page(page_of(record), java_script_enabled=False)
    assert page.locator("#timeline tbody tr").count() == 50
    follow(page, "#timeline a[rel=next]")
    assert page.locator("#timeline tbody tr").count() == 10
    assert "This is where the record begins." in page.locator("#timeline").inner_text()


def test_an_edit_by_keyboard_alone(open_page, make_record):
    record = make_record(1002, state="Order:item", data={"a": 1})
    page = open_page(LIST)
    tab_to(page, "#result_list .field-chat a")
    enter(page)
    page.wait_for_selector("#id_state")
    tab_to(page, "#id_other_state")
    page.keyboard.type("Order:payment")
    tab_to(page, "#id_data_json")
    page.keyboard.press("Control+A")
    page.keyboard.type('{"a": 2}')
    tab_to(page, "button[name=_preview]")
    enter(page)
    page.wait_for_selector(".fsm-preview")
    assert FSMRecord.objects.get(pk=record.pk).state == "Order:item"
    record.edit(data={"a": 3}, source="bot")
    tab_to(page, "input[name=_save]")
    enter(page)
    page.wait_for_selector(".fsm-conflict")
    tab_to(page, ".fsm-choice input")
    page.keyboard.press("ArrowRight")
    assert page.locator(".fsm-choice input:checked").get_attribute("value") == "yours"
    tab_to(page, "button[name=_save_merged]")
    enter(page)
    page.wait_for_selector("#result_list")
    after = FSMRecord.objects.get(pk=record.pk)
    assert (after.state, after.data) == ("Order:payment", {"a": 2})


@SCRIPTS
def test_many_with_a_count_that_changes(open_page, make_record, scripts):
    records = [make_record(1000 + n, state="Order:item", data={"n": n}) for n in range(3)]
    page = open_page(f"{LIST}?group=Order", java_script_enabled=scripts)
    for box in page.locator("input.action-select").all():
        box.check()
    page.select_option("select[name=action]", "set_key")
    follow(page, "button[name=index]")
    page.fill("#id_name", "note")
    page.fill("#id_value", json.dumps(XSS))
    follow(page, "button[name=ask]")
    page.wait_for_selector("button[name=run]")
    assert page.locator(".fsm-selected ins").count() == 3
    FSMRecord.objects.filter(pk=records[0].pk).delete()
    assert follow(page, "button[name=run]").status == 409
    assert "3 conversations were selected, now it would be 2" in page.locator(".messagelist").inner_text()
    assert not FSMRecord.objects.filter(data__has_key="note").exists()
    page.fill("#id_name", "note")
    page.fill("#id_value", json.dumps(XSS))
    follow(page, "button[name=ask]")
    follow(page, "button[name=run]")
    page.wait_for_selector(".fsm-outcomes")
    assert "2 conversations were changed." in page.locator("#content-main").inner_text()
    assert FSMRecord.objects.get(pk=records[1].pk).data == {"n": 1, "note": XSS}
    follow(page, "text=Undo")
    page.wait_for_selector("text=What is undone")
    assert FSMRecord.objects.get(pk=records[1].pk).data == {"n": 1}


def test_the_work_goes_on_by_itself_with_scripts(open_page, make_record, monkeypatch):
    monkeypatch.setattr(actions, "WORK_SECONDS", 0)
    monkeypatch.setattr(bulkwork, "BATCH", 2)
    for number in range(5):
        make_record(1000 + number, state="Order:item")
    page = open_page(LIST)
    page.check("#action-toggle")
    page.select_option("select[name=action]", "clear_state")
    follow(page, "button[name=index]")
    page.click("button[name=run]")  # and its page goes on to the next one
    page.wait_for_selector("text=5 conversations were changed.")
    assert not FSMRecord.objects.filter(state__isnull=False).exists()


def test_the_work_goes_on_at_a_button_without(open_page, make_record, monkeypatch):
    monkeypatch.setattr(actions, "WORK_SECONDS", 0)
    monkeypatch.setattr(bulkwork, "BATCH", 2)
    for number in range(3):
        make_record(1000 + number, state="Order:item")
    page = open_page(LIST, java_script_enabled=False)
    for box in page.locator("input.action-select").all():
        box.check()
    page.select_option("select[name=action]", "clear_state")
    follow(page, "button[name=index]")
    follow(page, "button[name=run]")
    assert "2 of 3 are done." in page.locator("#content-main").inner_text()
    assert FSMRecord.objects.filter(state__isnull=False).count() == 1
    follow(page, "text=Go on")
    assert "3 conversations were changed." in page.locator("#content-main").inner_text()
    assert not FSMRecord.objects.filter(state__isnull=False).exists()


def test_expiry_counts_down(open_page, make_record):
    record = make_record(1002)
    record.edit(state="Order:item", state_ttl=3600, source="bot")
    page = open_page(page_of(record))
    face = page.locator(".fsm-countdown").first
    before = face.inner_text()
    assert before.startswith(("0:59:5", "1:00:00"))
    page.wait_for_function(
        "before => document.querySelector('.fsm-countdown').textContent < before", arg=before
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [PHONE, {}], ids=["phone", "desk"])
def test_texts_can_be_read(open_page, make_record, full_history, options, scheme):
    """WCAG AA: 4.5 to 1, for every text of ours, in the timeline, a preview, a conflict and a change of many."""
    record = make_record(1002, data={})
    record.edit(state="Order:item", data={"a": 1, "b": 1}, state_ttl=600, source="bot")
    page = open_page(page_of(record), color_scheme=scheme, **options)
    page.fill("#id_data_json", '{"a": 2}')
    follow(page, "button[name=_preview]")
    page.wait_for_selector(".fsm-preview")
    found = weak_texts(page)
    record.edit(state="Other:x", data={"a": 3, "b": 1}, source="bot")
    follow(page, "input[name=_save]")
    page.wait_for_selector(".fsm-conflict")
    found += weak_texts(page)
    assert overflow(page) == 0
    page.goto(page.url.replace(page_of(record), LIST))
    page.check("input.action-select")
    page.select_option("select[name=action]", "clear_all")
    follow(page, "button[name=index]")
    page.wait_for_selector("button[name=run]")
    found += weak_texts(page)
    assert overflow(page) == 0
    follow(page, "button[name=run]")
    page.wait_for_selector(".fsm-outcomes")
    found += weak_texts(page)
    assert found == []
