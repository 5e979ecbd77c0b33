"""Every page of the app in the admin: a strict Content-Security-Policy, no other host (both are watched by
`open_page`), legible, and no wider than its screen."""

from __future__ import annotations

import pytest

from fsm_storage.models import FSMRecord
from tests.addresses import urls_of
from tests.browser.contrast import weak_texts
from tests.browser.pages import LIST, PHONE, overflow

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

SCREENS = [
    pytest.param({**size, "color_scheme": scheme}, id=f"{name}-{scheme}")
    for name, size in (("phone", PHONE), ("desk", {"viewport": {"width": 1280, "height": 800}}))
    for scheme in ("light", "dark")
]
NO_PAGES = ("/csv/", "/add/", "/delete/")
"""A file, and what nobody may do."""


@pytest.fixture
def everything(make_record) -> list[str]:
    """All addresses of the app, with something to see on each page."""
    record = make_record(1001, state="Order:item", data={"item": "pizza"})
    record.edit(state="Order:size", data={"item": "pizza", "size": 30}, state_ttl=600, source="bot")
    record.edit(state="Gone:away", source="bot")
    make_record(1002, chat_id=-1001234567890123, state="Support:topic", thread_id=7, destiny="lunch")
    make_record(1003)
    return [
        *(path for path in urls_of(record) if not path.endswith(NO_PAGES)),
        f"{LIST}map/?record={record.pk}",
        f"{LIST}funnel/?group=Order",
        f"{LIST}?q=nobody-has-this-name",
        f"{LIST}{record.pk}/change/?before=0",
        f"{LIST}{record.pk}/delete/",
        "/admin/fsm_storage/",
    ]


def test_the_policy_is_there(open_page, site_url, make_record):
    """Or the walk below would prove nothing: a page of this server says what it may load."""
    page = open_page(LIST)
    policy = page.goto(site_url + LIST).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("options", SCREENS)
def test_every_page_is_clean_legible_and_fits(open_page, site_url, everything, options):
    page = open_page(LIST, **options)
    troubles = []
    for path in everything:
        response = page.goto(site_url + path)
        if response.status != 200:
            troubles.append(f"{path}: {response.status}")
        if wider := overflow(page):
            troubles.append(f"{path}: {wider} px too wide")
        troubles += [f"{path}: {text}" for text in weak_texts(page)]
    assert troubles == []
    assert FSMRecord.objects.count() == 3
