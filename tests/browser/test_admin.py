"""The admin as a support agent meets it."""

from __future__ import annotations

import pytest

from fsm_storage.models import FSMRecord, FSMTransition
from tests.browser.pages import LIST, PHONE, XSS, brightness, colours, enter, follow, overflow, page_of

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_find_open_mend_and_see_it(open_page, make_record):
    make_record(1001, state="Support:topic")
    record = make_record(1002, state="Order:item", data={"big": 2**63 + 1, "name": "Анна"})
    page = open_page(LIST)
    assert page.locator("#result_list tbody tr").count() == 2
    page.fill("#searchbar", "name=Анна")
    enter(page, "#searchbar")
    follow(page, "#result_list .field-chat a")
    page.select_option("#id_state", label="Order:payment")
    text = page.input_value("#id_data_json")
    assert str(2**63 + 1) in text
    page.fill("#id_data_json", text.replace("Анна", "Анна Мария"))
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".messagelist .success")
    assert page.locator(".fsm-now .fsm-badge").first.inner_text() == "Order:payment"
    assert "agent" in page.locator(".fsm-timeline tbody tr").first.inner_text()
    after = FSMRecord.objects.get(pk=record.pk)
    assert (after.state, after.data) == ("Order:payment", {"big": 2**63 + 1, "name": "Анна Мария"})


def test_an_error_points_at_the_line(open_page, make_record):
    page = open_page(page_of(make_record(state="Order:item", data={"a": 1})))
    page.fill("#id_data_json", '{\n  "a": 1,\n  "b": oops\n}')
    follow(page, "input[name=_save]")
    assert "Line 3, column 8" in page.locator(".errorlist").inner_text()
    assert "^" in page.locator(".fsm-excerpt").inner_text()
    assert page.input_value("#id_data_json") == '{\n  "a": 1,\n  "b": oops\n}'


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_conflict_shows_both_and_each_clash_is_chosen(open_page, make_record, scripts):
    record = make_record(state="Order:item", data={"a": 1})
    page = open_page(page_of(record), java_script_enabled=scripts)
    page.select_option("#id_state", label="Order:payment")
    record.edit(state="Support:waiting", data={"a": 2}, source="bot")
    follow(page, "input[name=_save]")
    conflict = page.locator(".fsm-conflict")
    assert "Nothing was saved" in conflict.inner_text()
    assert "Support:waiting" in conflict.inner_text()
    assert page.locator("#id_state").input_value() == "=Order:payment"
    # Enter presses the form's first button. Without a choice it must not save.
    enter(page, "#id_other_state")
    page.wait_for_selector(".fsm-conflict")
    assert FSMRecord.objects.get(pk=record.pk).state == "Support:waiting"
    page.check("input[name=choice-state][value=yours]")
    follow(page, "button[name=_save_merged]")
    page.wait_for_selector("#result_list")
    after = FSMRecord.objects.get(pk=record.pk)
    assert (after.state, after.data) == ("Order:payment", {"a": 2})


def test_what_is_there_now_can_be_taken(open_page, make_record):
    record = make_record(state="Order:item")
    page = open_page(page_of(record))
    page.select_option("#id_state", label="Order:payment")
    record.edit(state="Support:waiting")
    follow(page, "input[name=_save]")
    follow(page, ".fsm-choices a")
    page.wait_for_selector(".fsm-conflict", state="detached")
    assert page.locator("#id_state").input_value() == "=Support:waiting"


def test_everything_works_without_scripts(open_page, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    page = open_page(LIST, java_script_enabled=False)
    follow(page, "#changelist-filter >> text=Order:item")
    page.check("input.action-select")
    page.select_option("select[name=action]", "clear_state")
    follow(page, "button[name=index]")
    follow(page, "text=No, take me back")
    assert FSMRecord.objects.get(pk=record.pk).state == "Order:item"
    page.check("input.action-select")
    page.select_option("select[name=action]", "clear_state")
    follow(page, "button[name=index]")
    follow(page, "button[name=run]")
    assert "1 conversation was changed." in page.locator("#content-main").inner_text()
    assert FSMRecord.objects.get(pk=record.pk).state is None
    follow(page, "text=Back to the conversations")
    follow(page, "#result_list .field-chat a")
    page.fill("#id_other_state", "Order:size")
    page.fill("#id_data_ttl_for", "2h")
    follow(page, "input[name=_save]")
    after = FSMRecord.objects.get(pk=record.pk)
    assert after.state == "Order:size"
    assert after.data_expires_at is not None


@pytest.mark.parametrize("options", [PHONE, {}], ids=["phone", "desk"])
def test_no_page_is_wider_than_the_screen(open_page, make_record, options):
    long = "Group" * 20 + ":" + "state" * 30
    record = make_record(1001, state=long, data={"k" * 300: "v" * 3000}, destiny="d" * 200, thread_id=2**60)
    make_record(1002, state="Order:item", chat_id=-1001234567890123)
    FSMTransition.objects.create(
        alias="default",
        key=record.key,
        bot_id=1,
        chat_id=1,
        user_id=1,
        from_state=long,
        to_state="Order:item",
    )
    page = open_page(LIST, **options)
    assert overflow(page) == 0
    assert page.locator("#result_list .fsm-badge").first.is_visible()
    page.goto(page.url.replace(LIST, "/admin/fsm_storage/fsmtransition/"))
    assert overflow(page) == 0
    page.goto(page.url.replace("/admin/fsm_storage/fsmtransition/", page_of(record)))
    assert overflow(page) == 0
    page.select_option("#id_state", label="Order:payment")
    record.edit(state="Order:size", data={"x" * 100: "y" * 1000})
    follow(page, "input[name=_save]")
    page.wait_for_selector(".fsm-conflict")
    assert overflow(page) == 0
    page.goto(page.url.replace(page_of(record), LIST))
    page.locator("input.action-select").first.check()
    page.select_option("select[name=action]", "extend_ttl")
    follow(page, "button[name=index]")
    page.wait_for_selector("#id_duration")
    assert overflow(page) == 0
    follow(page, "button[name=ask]")
    follow(page, "button[name=run]")
    page.wait_for_selector(".fsm-outcomes")
    assert overflow(page) == 0


def test_dark_mode_follows_the_system_and_the_switch(open_page, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    light, dark = (open_page(page_of(record), color_scheme=scheme) for scheme in ("light", "dark"))
    for selector in (".fsm-badge.fsm-c4", "textarea.fsm-json"):
        assert brightness(colours(light, selector)[0]) > brightness(colours(light, selector)[1])
        assert brightness(colours(dark, selector)[0]) < brightness(colours(dark, selector)[1])
    system = colours(dark, ".fsm-badge.fsm-c4")
    for page, theme, expected in (
        (light, "dark", system),
        (dark, "light", colours(light, ".fsm-badge.fsm-c4")),
    ):
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        assert colours(page, ".fsm-badge.fsm-c4") == expected


def test_what_is_stored_never_runs(open_page, make_record):
    record = make_record(
        state=XSS, data={XSS: f"</textarea>{XSS}"}, destiny=f'"><img src=x onerror=alert(1)>{XSS}'
    )
    record.edit(state=f"{XSS}:2")
    page = open_page(LIST)
    assert XSS in page.locator("#result_list").inner_text()
    follow(page, "#result_list .field-chat a")
    assert XSS in page.input_value("#id_data_json")
    page.fill("#id_other_state", XSS)
    record.edit(state="Order:item")
    follow(page, "input[name=_save]")
    page.wait_for_selector(".fsm-conflict")
    page.check("input[name=choice-state][value=yours]")
    follow(page, "button[name=_save_merged]")
    page.wait_for_selector("#result_list")
    page.goto(page.url.split("?")[0] + f"{record.pk}/history/")
    assert XSS in page.locator("#change-history").inner_text()
