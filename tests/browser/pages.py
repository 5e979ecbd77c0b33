"""What the tests of pages have in common."""

from __future__ import annotations

LIST = "/admin/fsm_storage/fsmrecord/"
XSS = "<script>alert(1)</script>"
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


def page_of(record):
    return f"{LIST}{record.pk}/change/"


def follow(page, what):
    """Click, and wait for the page that it leads to: until that is there, assertions meet the old one."""
    with page.expect_navigation() as answer:
        page.click(what) if isinstance(what, str) else what.click()
    return answer.value


def enter(page, selector=None):
    """Press Enter in an element, or where the focus is, and wait for the page that it leads to."""
    with page.expect_navigation():
        page.press(selector, "Enter") if selector else page.keyboard.press("Enter")


def overflow(page):
    page.wait_for_load_state("load")
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def colours(page, selector):
    return page.locator(selector).first.evaluate(
        "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    )


def brightness(colour):
    return sum(int(part) for part in colour.strip("rgba()").split(",")[:3])
