"""The admin under django-unfold, which a project switches on in its settings and needs no code for."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from playwright.sync_api import expect

from fsm_storage.models import FSMRecord
from tests.browser.contrast import weak_texts
from tests.browser.pages import LIST, PHONE, brightness, colours, follow, overflow, page_of
from tests.browser.test_every_page import SCREENS, everything, test_every_page_is_clean_legible_and_fits
from tests.servers import ROOT, child_env, free_port

__all__ = ["everything", "test_every_page_is_clean_legible_and_fits"]

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


@pytest.fixture(scope="module")
def unfold_server(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own: which admin there is is settled when Django starts."""
    port, log = free_port(), tmp_path_factory.mktemp("unfold") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--noreload", "--insecure", f"127.0.0.1:{port}"],
            cwd=ROOT,
            env=child_env({"DJANGO_SETTINGS_MODULE": "tests.unfold_settings"}),
            stdout=file,
            stderr=file,
        )
    try:
        _wait_for(port, server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()}")


@pytest.fixture
def site_url(unfold_server: str) -> str:
    return unfold_server


def test_it_is_unfold(open_page, make_record):
    make_record(1001, state="Order:item")
    page = open_page(LIST)
    assert page.locator("link[href*='unfold/css/styles.css']").count() == 1
    assert page.locator("link[href*='fsm_storage/unfold.css']").count() == 1
    assert page.locator("link[href*='admin/css/base.css']").count() == 0
    assert page.locator("[class*='material-symbols']").count()


@pytest.mark.parametrize("options", SCREENS)
def test_mend_with_a_preview_and_a_conflict(open_page, make_record, options):
    record = make_record(1001, state="Order:item", data={"a": 1})
    page = open_page(page_of(record), **options)
    page.select_option("#id_state", label="Order:payment")
    page.fill("#id_data_json", '{"a": 2}')
    follow(page, "button[name=_preview]:visible")
    assert "Order:payment" in page.locator(".fsm-preview").inner_text()
    assert FSMRecord.objects.get(pk=record.pk).state == "Order:item"
    assert (weak_texts(page), overflow(page)) == ([], 0)
    record.edit(state="Support:waiting", data={"a": 1, "b": 1}, source="bot")
    follow(page, "button[name=_save]:visible")
    page.wait_for_selector(".fsm-conflict")
    assert (weak_texts(page), overflow(page)) == ([], 0)
    page.check("input[name=choice-state][value=yours]")
    follow(page, "button[name=_save_merged]")
    page.wait_for_selector("#result_list")
    after = FSMRecord.objects.get(pk=record.pk)
    assert (after.state, after.data) == ("Order:payment", {"a": 2, "b": 1})


@pytest.mark.parametrize("options", SCREENS)
def test_change_many(open_page, make_record, options):
    first, second = (make_record(number, state="Order:item") for number in (1001, 1002))
    page = open_page(LIST, **options)
    for box in page.locator("input.action-select").all():
        box.check()
    page.select_option("select[name=action]", "clear_state")
    follow(page, "button[name=index]")
    page.wait_for_selector("button[name=run]")
    assert (weak_texts(page), overflow(page)) == ([], 0)
    follow(page, "button[name=run]")
    page.wait_for_selector(".fsm-outcomes")
    assert (weak_texts(page), overflow(page)) == ([], 0)
    assert [FSMRecord.objects.get(pk=record.pk).state for record in (first, second)] == [None, None]


def test_from_the_list_to_the_map(open_page, make_record):
    make_record(1001, state="Order:item").edit(state="Order:size", source="bot")
    page = open_page(LIST, **PHONE)
    follow(page, "text=Map")
    page.wait_for_selector(".fsm-map[data-layout=dagre]")
    assert page.locator("h1.fsm-title").inner_text() == "Map"


def test_dark_is_what_unfold_says(open_page, make_record):
    """Its switch goes before what the system prefers."""
    record = make_record(1001, state="Order:item", data={"a": 1})
    page = open_page(page_of(record), color_scheme="dark")
    badge = ".fsm-badge.fsm-c4"
    page.wait_for_selector("html.dark")
    dark = colours(page, badge)
    assert brightness(dark[0]) < brightness(dark[1])
    page.evaluate("localStorage.setItem('adminTheme', '\"light\"')")
    page.reload()
    page.wait_for_selector("html:not(.dark)")
    light = colours(page, badge)
    assert brightness(light[0]) > brightness(light[1])


INLINE = re.compile(
    r"<script(?![^>]*\bsrc=)(?![^>]*application/json)[^>]*>.*?</script>|<style.*?</style>|\s(?:style|on\w+)=\"[^\"]*\"",
    re.DOTALL,
)


def test_nothing_inline_is_ours(open_page, site_url, everything):
    """Unfold itself needs a policy that allows inline scripts; whoever narrows it to hashes of Unfold's keeps ours."""
    page, user = open_page("/admin/"), User.objects.get(username="agent")
    users = "/admin/auth/user/"
    unfolds = [
        users,
        f"{users}{user.pk}/change/",
        f"{users}{user.pk}/history/",
        f"{users}?q=nobody",
        "/admin/auth/",
    ]

    def inline(path: str) -> set[str]:
        return {
            re.sub(r"\s+", " ", text) for text in INLINE.findall(page.request.get(site_url + path).text())
        }

    known = set().union(*map(inline, unfolds))
    assert known
    # One transition alone is a page of Unfold's making: it colours JSON with styles of its own.
    ours = [path for path in everything if not re.search(r"/fsmtransition/\d", path)]
    assert {path: found for path in ours if (found := inline(path) - known)} == {}


def test_the_list_follows(open_page, make_record):
    record = make_record(1001, state="Order:size")
    page = open_page(LIST)
    page.evaluate("window.isSame = true")
    record.edit(state="Order:payment")
    expect(page.locator("#result_list .fsm-badge").first).to_contain_text("payment")
    make_record(1002, state="Order:item")
    expect(page.locator("#result_list input.action-select")).to_have_count(2)
    assert page.evaluate("window.isSame")
    page.locator("#result_list input.action-select").first.check()
    page.select_option("select[name=action]", "clear_state")  # what came is as usable as what was there
    follow(page, "button[name=index]")
    page.wait_for_selector("button[name=run]")


def test_a_conversation_follows_and_leaves_alone_what_is_typed(open_page, make_record):
    record = make_record(1001, state="Order:size", data={"n": 1})
    page = open_page(page_of(record))
    page.fill("#id_data_json", '{"n": 1, "typed": true}')
    record.edit(state="Order:payment", state_ttl=3600)
    expect(page.locator("#fsm-state-now .fsm-badge")).to_contain_text("payment")
    expect(page.locator("#timeline tbody tr").first).to_contain_text("payment")
    expect(page.locator("#fsm-moved")).to_be_visible()
    expect(page.locator("#id_data_json")).to_have_value('{"n": 1, "typed": true}')


def test_the_map_follows(open_page, make_record):
    record = make_record(1001, state="Order:size")
    page = open_page(f"{LIST}map/")
    node = page.locator(".fsm-map [data-node]", has_text="payment").first
    before = node.text_content()
    record.edit(state="Order:payment")
    expect(node).not_to_have_text(before or "", timeout=15_000)
