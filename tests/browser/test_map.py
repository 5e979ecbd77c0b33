"""The map and the funnel as a support agent meets them, with and without scripts."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from fsm_storage.models import FSMTransition
from tests.browser.pages import LIST, PHONE, brightness, colours, enter, follow, overflow

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

MAP, FUNNEL = f"{LIST}map/", f"{LIST}funnel/?group=Order"
NO_SCRIPT = {"java_script_enabled": False}


@pytest.fixture
def people(make_record):
    """Four who order: two on the way, one cleared, one expired; and one who asks for help."""
    ways = {
        1001: ["Order:item", "Order:size", "Order:item"],
        1002: ["Order:item", "Order:size", "Order:payment"],
        1003: ["Order:item", "Order:size", None],
        1004: ["Order:item", None],
        1005: ["Support:topic"],
    }
    for number, states in ways.items():
        before, at = None, timezone.now() - timedelta(minutes=30)
        for state in states:
            FSMTransition.objects.create(
                alias="default", key=f"42:{number}:{number}", bot_id=42, chat_id=number, user_id=number,
                from_state=before, to_state=state, at=at, source="expiry" if number == 1004 and before else "bot",
            )  # fmt: skip
            before, at = state, at + timedelta(minutes=3)
    return {number: make_record(number, state=ways[number][-1]) for number in (1001, 1002, 1005)}


def boxes(page):
    """Where the nodes are, by their titles; in the SVG's own measure."""
    return page.eval_on_selector_all(
        ".fsm-map .fsm-node",
        """nodes => nodes.map(node => {
            const m = node.transform.baseVal.consolidate().matrix, r = node.querySelector("rect");
            return [node.querySelector("title").textContent, m.e, m.f, r.width.baseVal.value, r.height.baseVal.value];
        })""",
    )


def assert_laid_out(page):
    """No node lies upon another or beyond the border; each edge begins and ends at its nodes."""
    found = boxes(page)
    width, height = page.eval_on_selector(
        ".fsm-map", "s => [s.viewBox.baseVal.width, s.viewBox.baseVal.height]"
    )
    for place, (title, x, y, w, h) in enumerate(found):
        assert 0 <= x <= width - w, title
        assert 0 <= y <= height - h, title
        for other, x2, y2, _w, _h in found[place + 1 :]:
            assert abs(x - x2) >= w or abs(y - y2) >= h, f"{title} on {other}"
    ends = page.eval_on_selector_all(
        ".fsm-map .fsm-edge",
        """edges => edges.map(edge => {
            const path = edge.querySelector("path"), end = path.getPointAtLength(path.getTotalLength());
            const start = path.getPointAtLength(0);
            return [+edge.dataset.source, +edge.dataset.target, start.x, start.y, end.x, end.y];
        })""",
    )
    assert ends
    for source, target, x1, y1, x2, y2 in ends:
        for node, x, y in ((source, x1, y1), (target, x2, y2)):
            title, left, top, w, h = found[node]
            assert left - 3 <= x <= left + w + 3, title
            assert top - 3 <= y <= top + h + 3, title


def test_click_a_node_and_see_who_is_there(open_page, people):
    page = open_page(MAP)
    page.wait_for_selector(".fsm-map[data-layout=dagre]")
    assert_laid_out(page)
    follow(page, ".fsm-map a[aria-label^='Order:payment: 1 conversation now']")
    page.wait_for_selector("#result_list")
    assert "1002" in page.locator("#result_list tbody tr").inner_text()


def test_the_map_is_whole_without_scripts(open_page, people):
    page = open_page(MAP, **NO_SCRIPT)
    assert page.locator(".fsm-map[data-layout]").count() == 0
    assert page.locator(".fsm-map .fsm-node").count() == 18  # fifteen states, entry, cleared, expired
    follow(page, ".fsm-map a[aria-label^='Order:payment']")
    assert page.locator("#result_list tbody tr").count() == 1


def test_the_servers_layout_is_sound_too(open_page, people):
    """The same assertions, on what the page has before dagre comes."""
    page = open_page(MAP)
    page.route("**/vendor/dagre*", lambda route: route.fulfill(body="", content_type="text/javascript"))
    page.reload()
    page.wait_for_load_state("load")
    assert page.locator(".fsm-map[data-layout]").count() == 0
    assert_laid_out(page)


def test_the_keyboard_reaches_every_node_in_their_order(open_page, people):
    page = open_page(MAP)
    page.wait_for_selector(".fsm-map[data-layout=dagre]")
    page.locator(".fsm-map-frame").focus()
    seen = []
    for _ in range(4):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert [title.split(":")[0] for title in seen] == ["entry", "Order", "Order", "Order"]
    assert seen[1].startswith("Order:item: 1 conversation")
    page.locator(".fsm-map a[aria-label^='Order:payment']").focus()
    line = page.evaluate("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
    enter(page)
    page.wait_for_selector("#result_list")
    assert page.locator("#result_list tbody tr").count() == 1
    assert line == "3px"


@pytest.mark.parametrize("options", [{}, NO_SCRIPT], ids=["", "without scripts"])
def test_the_way_of_a_conversation_from_its_page(open_page, people, options):
    page = open_page(f"{LIST}{people[1001].pk}/change/", **options)
    follow(page, "text=On the map")
    assert "Step 3 of 3" in page.locator(".fsm-replay").inner_text()
    assert page.locator(".fsm-here title").text_content().startswith("Order:item:")
    follow(page, "a[rel=prev]")
    assert "Step 2 of 3" in page.locator(".fsm-replay").inner_text()
    assert page.locator(".fsm-here title").text_content().startswith("Order:size:")
    assert page.locator(".fsm-walked").count() == 2
    follow(page, "a[rel=next]")
    assert page.locator(".fsm-walked").count() == 3


@pytest.mark.parametrize("options", [{}, NO_SCRIPT], ids=["", "without scripts"])
def test_choose_steps_and_meet_the_people(open_page, people, options):
    page = open_page(FUNNEL, **options)
    steps = page.locator("select[name=step]")
    for place, state in enumerate(["Order:item", "Order:size", "Order:payment"]):
        steps.nth(place).select_option(state)
    for place in range(3, steps.count()):
        steps.nth(place).select_option("")
    follow(page, ".fsm-choose button")
    assert "step=Order%3Apayment" in page.url
    rows = page.locator(".fsm-funnel tbody tr")
    assert rows.count() == 3
    assert "75.0%" in rows.nth(1).inner_text()
    follow(page, rows.nth(1).locator("td a").last)
    chats = page.locator(".fsm-people tbody th").all_inner_texts()
    assert sorted(chats) == ["1001", "1003"]
    follow(page, "text='1001'")
    assert f"/{people[1001].pk}/change/" in page.url


@pytest.mark.parametrize("path", [MAP, FUNNEL, f"{LIST}funnel/people/?group=Order&step=Order:item&at=1"])
def test_a_phone_scrolls_in_one_direction_only(open_page, people, path):
    page = open_page(path, **PHONE)
    assert overflow(page) <= 0


def test_light_and_dark(open_page, people):
    fills = {}
    for scheme in ("light", "dark"):
        page = open_page(MAP, color_scheme=scheme)
        page.wait_for_selector(".fsm-map[data-layout=dagre]")
        fills[scheme] = page.eval_on_selector(
            ".fsm-stay-1", "e => [getComputedStyle(e.querySelector('rect')).fill,"
            " getComputedStyle(e.querySelector('text')).fill]"
        )  # fmt: skip
        background, _text = colours(page, "body")
        assert (brightness(background) > 380) == (scheme == "light")
    for scheme, (box, text) in fills.items():
        assert (brightness(box) > brightness(text)) == (scheme == "light")
        assert abs(brightness(box) - brightness(text)) > 400


def test_the_print_has_the_whole_map_and_no_buttons(open_page, people):
    page = open_page(MAP)
    page.emulate_media(media="print")
    frame = page.locator(".fsm-map-frame")
    assert frame.evaluate("e => e.scrollHeight - e.clientHeight") <= 0
    assert frame.evaluate("e => e.scrollWidth - e.clientWidth") <= 1
    assert not page.locator(".fsm-choose").is_visible()
