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
WIDTH, HEIGHT = 1280, 860
TALK_SECONDS = 25


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


def take(page: Page, name: str, *, whole: bool = False) -> None:
    page.screenshot(path=DOCS / "img" / f"{name}.png", full_page=whole)


def take_all(page: Page, admin: str) -> None:
    log_in(page, admin)
    page.goto(f"{admin}fsm_storage/fsmrecord/")
    page.click("#toggle-nav-sidebar")
    page.mouse.move(WIDTH - 1, HEIGHT - 1)
    take(page, "changelist")
    page.goto(f"{admin}fsm_storage/fsmrecord/?state=Order:phone&o=5")  # whose people left long ago
    page.click("#result_list tbody tr:first-child th a")
    take(page, "conversation", whole=True)
    take_conflict(page)
    page.goto(f"{admin}fsm_storage/fsmrecord/map/?group=Order")
    page.wait_for_selector(".fsm-map[data-layout]")
    take(page, "map", whole=True)
    page.goto(f"{admin}fsm_storage/fsmrecord/funnel/?group=Order")
    take(page, "funnel", whole=True)


def take_conflict(page: Page) -> None:
    """Save a form whose conversation another tab has changed meanwhile."""
    other = page.context.new_page()
    other.goto(page.url)
    other.select_option("#id_state", "=Order:payment")
    other.click("[name=_save]")
    other.close()
    page.select_option("#id_state", "=Order:confirmation")
    with page.expect_response(lambda response: response.request.method == "POST") as saved:
        page.click("[name=_save]")
    if saved.value.status != 409:
        raise SystemExit("the conversation did not change meanwhile; try again")
    page.wait_for_load_state()
    page.evaluate("scrollTo(0, 0)")
    take(page, "conflict")


def main() -> None:
    (DOCS / "img").mkdir(exist_ok=True)
    with demo() as admin, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        time.sleep(TALK_SECONDS)
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
        take_all(context.new_page(), admin)
        browser.close()


if __name__ == "__main__":
    main()
