"""Two people in two tabs, on a site in a process of its own with a Redis between all: told over the websocket."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.test import Client
from playwright.sync_api import Page, expect

from fsm_storage.models import FSMRecord
from tests.servers import RedisServer, Site, finish_child, start_child

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
LIST = "/admin/fsm_storage/fsmrecord/"
SOON = 15_000
"""Milliseconds: sooner than any page asks by itself, which is every 30 s here."""


@pytest.fixture
def layer(transactional_db: None) -> Iterator[RedisServer]:
    server = RedisServer(django_settings.TEST_DIR / f"redis-{uuid.uuid4().hex[:8]}")
    yield server
    server.remove()


@pytest.fixture
def site_url(layer: RedisServer) -> Iterator[str]:
    site = Site(layer.url)
    yield site.url
    site.stop()


def log_in(page: Page, url: str, name: str) -> None:
    client = Client()
    client.force_login(User.objects.create_superuser(name, password="secret"))
    cookie = client.cookies[django_settings.SESSION_COOKIE_NAME].value
    page.context.add_cookies([{"name": django_settings.SESSION_COOKIE_NAME, "value": cookie, "url": url}])


def test_one_edits_and_the_other_sees_it(
    open_page: Callable[..., Page],
    make_record: Callable[..., FSMRecord],
    site_url: str,
    layer: RedisServer,
) -> None:
    record = make_record(7, key="42:7:7", state="Order:size", data={"n": 1})
    address = f"{LIST}{record.pk}/change/"
    ann, bob, crowd = open_page(address), open_page("/admin/"), open_page(LIST)
    log_in(bob, site_url, "bob")
    bob.goto(site_url + address)
    expect(ann.locator("#fsm-present b")).to_have_text("bob", timeout=SOON)
    expect(bob.locator("#fsm-present b")).to_have_text("agent", timeout=SOON)

    ann.locator("#id_data_json").fill('{"n": 1, "mine": true}')
    bob.locator("#id_other_state").fill("Order:payment")
    bob.locator("[name=_continue]").click()
    expect(ann.locator("#fsm-state-now .fsm-badge")).to_contain_text("payment", timeout=SOON)
    expect(ann.locator("#fsm-moved")).to_be_visible()
    expect(ann.locator("#timeline")).to_contain_text("bob")
    expect(ann.locator("#id_data_json")).to_have_value('{"n": 1, "mine": true}')
    expect(crowd.locator("#result_list tbody")).to_contain_text("payment", timeout=SOON)

    finish_child(start_child("tests.live.bot", "Order:confirm", env={"FSM_TEST_LAYER": layer.url}))
    for page in (ann.locator("#fsm-state-now"), bob.locator("#fsm-state-now"), crowd.locator("#result_list")):
        expect(page).to_contain_text("confirm", timeout=SOON)
    bob.close()
    expect(ann.locator("#fsm-present")).to_be_hidden(timeout=SOON)
