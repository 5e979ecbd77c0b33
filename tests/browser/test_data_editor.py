"""The tree editor over the text of the data: what nobody touched stays exactly as it is."""

from __future__ import annotations

import pytest

from fsm_storage.models import FSMRecord
from tests.browser.pages import XSS, brightness, colours, follow, page_of

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

EXACT = {"big": 2**53 + 1, "huge": 10**400, "neg": -(2**63) - 1, "float": 0.1 + 0.2, "whole": 1.0}


def open_tree(page):
    page.click(".fsm-tree")
    page.wait_for_selector(".fsm-editor .jse-tree-mode")


def type_over(page, old, new):
    """Type over a value in the tree."""
    page.locator(".fsm-editor .jse-value").get_by_text(old, exact=True).dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type(new)
    page.keyboard.press("Enter")


def test_only_the_edited_key_changes(open_page, make_record):
    record = make_record(data={**EXACT, "name": "Anna", "nested": {"n": 2**53 + 1, "x": "old"}})
    page = open_page(page_of(record))
    open_tree(page)
    type_over(page, "Anna", "Boris")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.click("input[name=_continue]")
    assert "Boris" in sent.value.post_data
    page.wait_for_selector(".messagelist .success")
    after = FSMRecord.objects.get(pk=record.pk).data
    assert after == {**EXACT, "name": "Boris", "nested": {"n": 2**53 + 1, "x": "old"}}
    assert isinstance(after["whole"], float)


def test_a_big_number_is_typed_exactly(open_page, make_record):
    record = make_record(data={"n": 5, "big": 2**53 + 1})
    page = open_page(page_of(record))
    open_tree(page)
    type_over(page, "5", str(2**64 + 1))
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".messagelist .success")
    assert FSMRecord.objects.get(pk=record.pk).data == {"n": 2**64 + 1, "big": 2**53 + 1}


def test_a_number_too_big_to_be_kept_is_refused(open_page, make_record):
    record = make_record(data={"n": 5})
    page = open_page(page_of(record))
    open_tree(page)
    type_over(page, "5", "1e400")
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".errornote")
    assert "The number 1e400 is too big to be kept exactly" in page.locator(".errorlist").first.inner_text()
    assert FSMRecord.objects.get(pk=record.pk).data == {"n": 5}
    assert "1e400" in page.input_value("#id_data_json")


def test_opening_and_closing_the_tree_changes_nothing(open_page, make_record):
    record = make_record(data={**EXACT, "1": "a", "text": f"{XSS} é\u2028"})
    page = open_page(page_of(record))
    before = page.input_value("#id_data_json")
    open_tree(page)
    assert XSS in page.locator(".fsm-editor").inner_text()
    page.click(".fsm-tree")
    assert page.input_value("#id_data_json") == before
    open_tree(page)
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".messagelist .info")
    assert FSMRecord.objects.get(pk=record.pk).version == record.version


def test_nothing_of_it_is_loaded_before_it_is_asked_for(open_page, make_record):
    page = open_page(page_of(make_record(data={"a": 1})))
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [name for name in names if "jsoneditor" in name or "lossless" in name]


def test_a_conflict_merges_what_the_tree_changed(open_page, make_record):
    record = make_record(data={"mine": "old", "theirs": 1, "big": 2**53 + 1})
    page = open_page(page_of(record))
    open_tree(page)
    type_over(page, "old", "new")
    record.edit(data={"mine": "old", "theirs": 2**70, "big": 2**53 + 1}, source="bot")
    follow(page, "input[name=_continue]")
    page.wait_for_selector(".messagelist .success")
    assert FSMRecord.objects.get(pk=record.pk).data == {"mine": "new", "theirs": 2**70, "big": 2**53 + 1}


def test_the_tree_has_its_looks_and_is_dark_in_the_dark(open_page, make_record):
    """The editor's own styles are there although the policy refuses the elements in which they come."""
    shades = []
    for scheme in ("light", "dark"):
        page = open_page(page_of(make_record(len(shades), data={"a": 1})), color_scheme=scheme)
        open_tree(page)
        page.wait_for_function(
            "getComputedStyle(document.querySelector('.fsm-editor .jse-main')).display === 'flex'"
        )
        shades.append(brightness(colours(page, ".fsm-editor .jse-tree-mode")[0]))
    assert shades[0] > shades[1]
