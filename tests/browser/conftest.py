"""A real Chromium against a live server, watched: no script error, no request to another host, and nothing that
the strict policy of `tests.middleware` forbids."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.test import Client
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from fsm_storage.models import FSMRecord

expect.set_options(timeout=15_000)  # a page may ask every five seconds
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


# One for each module, not for the session: Playwright keeps an event loop running in this thread, in
# which no async test could run meanwhile, and Django's ORM needs to be told that this is meant.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()
    patch.undo()


@pytest.fixture
def site_url(live_server: Any) -> str:
    """The address of the server that the pages come from."""
    return str(live_server.url)


@pytest.fixture
def open_page(browser: Browser, site_url: str) -> Iterator[Callable[..., Page]]:
    """Open a page as a logged-in superuser; fail the test afterwards if anything in it went wrong."""
    user = User.objects.create_superuser("agent", password="secret")
    client = Client()
    client.force_login(user)
    session = client.cookies[django_settings.SESSION_COOKIE_NAME].value
    contexts: list[BrowserContext] = []
    troubles: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: troubles.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on("console", lambda message: _note(message, troubles))
        page.on("request", lambda request: _check_host(request.url, site_url, troubles))

    def open_page(path: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        name = django_settings.SESSION_COOKIE_NAME
        context.add_cookies([{"name": name, "value": session, "url": site_url}])
        page = context.new_page()
        watch(page)
        page.goto(site_url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def _note(message: Any, troubles: list[str]) -> None:
    expected = "409 (Conflict)" in message.text or "favicon" in str(message.location)
    if message.type == "error" and not expected:
        troubles.append(f"console: {message.text}")


def _check_host(url: str, own: str, troubles: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme != "data" and parts.netloc != urlsplit(own).netloc:
        troubles.append(f"request to {url}")


@pytest.fixture
def make_record(transactional_db: None) -> Callable[..., FSMRecord]:
    def make(number: int = 1000, **fields: Any) -> FSMRecord:
        known = {"alias": "default", "key": f"42:{number}:{number}", "bot_id": 42, "chat_id": number}
        return FSMRecord.objects.create(
            **{**known, "user_id": number, "version": 1, "destiny": "default", "data": {}, **fields}
        )

    return make
