"""Pages that follow what happens, without a channel layer: they ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.sessions.models import Session
from playwright.sync_api import Page, expect

from fsm_storage.models import FSMRecord

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
LIST = "/admin/fsm_storage/fsmrecord/"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsm_storage.admin.watching.POLL_SECONDS", 0.2)


def page_of(record: FSMRecord) -> str:
    return f"{LIST}{record.pk}/change/"


def test_the_list_follows(open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]) -> None:
    record = make_record(1000, state="Order:size")
    page = open_page(LIST)
    page.evaluate("window.isSame = true")
    record.edit(state="Order:payment")
    row = page.locator("#result_list tbody tr")
    expect(row.locator(".fsm-badge").first).to_contain_text("payment")
    make_record(2000, state="Order:size")
    expect(row).to_have_count(2)
    expect(page.locator(".fsm-count")).to_contain_text("2 ")
    page.locator("#action-toggle").check()  # knows the new row too
    expect(page.locator(".action-counter")).to_contain_text("2 of")
    assert page.locator("input.action-select:checked").count() == 2
    assert page.evaluate("window.isSame")


def test_a_list_in_which_something_is_ticked_stands_still(
    open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]
) -> None:
    first = make_record(1000, state="Order:size")
    page = open_page(LIST)
    page.locator("input.action-select").check()
    with page.expect_response(lambda response: "mark/" in response.url and response.status == 200):
        make_record(2000, state="Order:size")
    page.wait_for_timeout(700)
    assert page.locator("input.action-select").count() == 1
    assert page.locator("input.action-select:checked").get_attribute("value") == str(first.pk)
    page.locator("input.action-select").uncheck()
    expect(page.locator("input.action-select")).to_have_count(2)


def test_an_empty_list_fills(open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]) -> None:
    page = open_page(LIST)
    make_record(1000, state="Order:size")
    expect(page.locator("#result_list tbody tr")).to_have_count(1)


def test_a_conversation_follows_and_leaves_alone_what_is_typed(
    open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]
) -> None:
    record = make_record(state="Order:size", data={"n": 1})
    page = open_page(page_of(record))
    typed = page.locator("#id_data_json")
    typed.fill('{"n": 1, "typed": true}')
    expect(page.locator("#fsm-moved")).to_be_hidden()
    record.edit(state="Order:payment", data={"n": 2}, state_ttl=3600)
    expect(page.locator("#fsm-state-now .fsm-badge")).to_contain_text("payment")
    expect(page.locator("#timeline tbody tr").first).to_contain_text("payment")
    expect(page.locator("#fsm-moved")).to_be_visible()
    expect(page.locator(".fsm-countdown").first).to_contain_text("0:59")
    expect(typed).to_have_value('{"n": 1, "typed": true}')
    page.locator("[name=_continue]").click()
    expect(page.locator(".fsm-conflict, .messagelist")).to_be_visible()
    record.refresh_from_db()
    assert record.state == "Order:payment"


def test_a_conversation_that_ends_says_so(
    open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]
) -> None:
    record = make_record(state="Order:size")
    page = open_page(page_of(record))
    FSMRecord.objects.all().delete()
    expect(page.locator("#fsm-gone")).to_be_visible()
    expect(page.locator("#fsm-lost")).to_be_hidden()


def test_whoever_is_logged_out_is_told(
    open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]
) -> None:
    make_record(state="Order:size")
    page = open_page(LIST)
    Session.objects.all().delete()
    expect(page.locator("#fsm-lost")).to_be_visible()


def test_the_map_counts_on(open_page: Callable[..., Page], make_record: Callable[..., FSMRecord]) -> None:
    record = make_record(state="Order:size")
    page = open_page(f"{LIST}map/")
    page.locator(".fsm-tables summary").click()
    node = page.locator(".fsm-map [data-node]", has_text="payment").first
    before = node.text_content()
    record.edit(state="Order:payment")
    expect(node).not_to_have_text(before or "")
    assert page.locator(".fsm-map").get_attribute("data-layout") == "dagre"
    boxes: Any = page.locator(".fsm-map [data-node]").evaluate_all(
        "nodes => nodes.map(node => node.getAttribute('transform'))"
    )
    assert len(set(boxes)) == len(boxes)
