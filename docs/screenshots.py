"""Takes the screenshots of the documentation anew: `python docs/screenshots.py`. Needs a Chromium on the PATH.

Starts the demo on a database of its own, lets its people talk for a while, and looks at the admin.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parent
PASSWORD = "only-for-a-screenshot"  # noqa: S105
WIDTH, HEIGHT = 1280, 780
PHONE = {"width": 390, "height": 844}
TALK_SECONDS = 45


@contextmanager
def demo() -> Iterator[str]:
    """Run the demo; yield the address of its admin."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(  # noqa: S603
            [
                sys.executable,
                "-m",
                "project.demo",
                "--people=120",
                "--pace=60",
                "--log",
                f"{folder}/demo.log",
            ],
            cwd=DOCS.parent,
            env={
                **os.environ,
                "PORT": os.environ.get("PORT", "8011"),
                "DEMO_PASSWORD": PASSWORD,
                "SQLITE_PATH": f"{folder}/demo.sqlite3",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield _address(process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def _address(process: subprocess.Popen[str]) -> str:
    for line in process.stdout or ():
        if found := re.search(r"http://\S+/admin/", line):
            return found[0]
    raise SystemExit("the demo did not start")


def log_in(page: Page, admin: str) -> None:
    page.goto(admin)
    page.fill("#id_username", "admin")
    page.fill("#id_password", PASSWORD)
    page.click("[type=submit]")


def take(page: Page, name: str, *, height: int | None = None) -> None:
    """Photograph the page from its top: what fits into the window, or `height` pixels of it."""
    page.evaluate("scrollTo(0, 0)")
    clip = height and {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
    page.screenshot(path=DOCS / "img" / f"{name}.png", full_page=bool(height), clip=clip or None)


def take_all(page: Page, admin: str) -> None:
    log_in(page, admin)
    page.wait_for_selector("#user-tools")
    conversations = f"{admin}fsm_storage/fsmrecord/"
    page.goto(conversations)
    page.click("#toggle-nav-sidebar")
    page.mouse.move(WIDTH - 1, HEIGHT - 1)
    take(page, "changelist")
    page.goto(f"{conversations}?state=Order:phone&o=5")  # whose people left long ago
    page.click("#result_list tbody tr:first-child th a")
    page.wait_for_selector(".fsm-countdown")
    take(page, "conversation", height=1150)
    take_preview(page)
    take_conflict(page)
    take_many(page, conversations)
    page.goto(f"{conversations}map/?group=Order")
    page.wait_for_selector(".fsm-map[data-layout]")
    take(page, "map", height=1000)
    page.goto(f"{conversations}funnel/?group=Order")
    take(page, "funnel", height=820)


def take_preview(page: Page) -> None:
    page.select_option("#id_state", "=Order:payment")
    page.fill("#id_state_ttl_for", "2h")
    page.click("[name=_preview]")
    page.wait_for_selector(".fsm-preview")
    take(page, "preview")
    page.go_back()


def take_many(page: Page, conversations: str) -> None:
    """Ask what would become of three conversations, and leave them as they are."""
    page.goto(f"{conversations}?state=Support:waiting")
    for box in page.locator("input.action-select").all()[:3]:
        box.check()
    page.select_option("select[name=action]", "move_state")
    page.click("button[name=index]")
    page.select_option("#id_state", "=Support:topic")
    page.click("[name=ask]")
    page.wait_for_selector("[name=run]")
    take(page, "many", height=520)


def take_other_looks(dark: Page, phone: Page, admin: str) -> None:
    """The same pages by night, and on a phone."""
    log_in(dark, admin)
    dark.goto(f"{admin}fsm_storage/fsmrecord/")
    dark.click("#toggle-nav-sidebar")
    dark.goto(f"{admin}fsm_storage/fsmrecord/map/?group=Support")
    dark.wait_for_selector(".fsm-map[data-layout]")
    take(dark, "map-dark", height=820)
    dark.goto(f"{admin}fsm_storage/fsmrecord/?state=Order:phone&o=5")
    dark.click("#result_list tbody tr:first-child th a")
    dark.wait_for_selector(".fsm-countdown")
    take(dark, "conversation-dark")
    log_in(phone, admin)
    phone.goto(f"{admin}fsm_storage/fsmrecord/")
    take(phone, "phone-changelist")
    phone.goto(dark.url)
    phone.wait_for_selector(".fsm-countdown")
    take(phone, "phone-conversation")


def take_conflict(page: Page) -> None:
    """Save a form whose conversation another tab has changed meanwhile."""
    other = page.context.new_page()
    other.goto(page.url)
    other.select_option("#id_state", "=Order:item")  # from where nobody comes by himself
    with other.expect_response(lambda response: response.request.method == "POST"):
        other.click("[name=_save]")
    other.wait_for_selector("#result_list")  # a page that is closed before may not have saved
    other.close()
    page.select_option("#id_state", "=Order:confirmation")
    with page.expect_response(lambda response: response.request.method == "POST") as saved:
        page.click("[name=_save]")
    if saved.value.status != 409:
        raise SystemExit("the conversation did not change meanwhile; try again")
    page.wait_for_load_state()
    take(page, "conflict")


def main() -> None:
    (DOCS / "img").mkdir(exist_ok=True)
    with demo() as admin, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        time.sleep(TALK_SECONDS)
        desk = {"width": WIDTH, "height": HEIGHT}
        take_all(browser.new_context(viewport=desk).new_page(), admin)
        take_other_looks(
            browser.new_context(viewport=desk, color_scheme="dark").new_page(),
            browser.new_context(
                viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=1.5
            ).new_page(),
            admin,
        )
        browser.close()


if __name__ == "__main__":
    main()
