"""The bot and the demo as processes of their own: how they start, are stopped, and go on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import IO

import psutil
import pytest
import redis
from aiogram.exceptions import TelegramUnauthorizedError
from aiogram.methods import GetMe

from fsm_storage.models import FSMRecord
from project.bot import build_bot, main, run
from project.bot_api import BotAPI
from tests.conftest import SQLITE
from tests.project.conftest import MakePerson
from tests.rows import in_thread
from tests.servers import ROOT, child_env

PORT = 18_345  # or the next that is free


@asynccontextmanager
async def bot_process(api: BotAPI) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the bot; whoever has not ended it by then has it killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "project.bot"),
        env=child_env({"BOT_TOKEN": api.token, "BOT_API_URL": api.url}),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def stop(process: asyncio.subprocess.Process) -> str:
    """Stop the bot as a service manager does; return what it logged."""
    process.send_signal(signal.SIGTERM)
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    return log.decode()


@pytest.mark.parametrize("database", [SQLITE], indirect=True)
async def test_after_sigterm_a_new_process_goes_on_with_the_conversation(
    api: BotAPI, database: str, make_person: MakePerson
) -> None:
    anna = make_person()
    async with bot_process(api) as bot:
        question = await anna.say("/order")
        question = await anna.press(question, "Margherita")
        log = await stop(bot)
    assert "Unclosed" not in log
    assert "Traceback" not in log
    record = await in_thread(FSMRecord.objects.get)
    assert (record.state, record.data) == ("Order:size", {"item": "margherita"})
    async with bot_process(api) as bot:
        assert (await anna.press(question, "Small")).text == "Small. How many?"
        await stop(bot)
    record = await in_thread(FSMRecord.objects.get)
    assert (record.state, record.data) == ("Order:amount", {"item": "margherita", "size": "s"})


@pytest.mark.parametrize(
    ("token", "complaint"),
    [
        ("", "BOT_TOKEN is not set."),
        ("secret", "BOT_TOKEN is not a bot token"),
        ("43:unknown", "Telegram does not know this BOT_TOKEN."),
    ],
)
def test_a_bot_without_a_good_token_says_so_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, complaint: str
) -> None:
    async def refuse(token: str, api_url: str | None) -> None:
        build_bot(token)
        raise TelegramUnauthorizedError(GetMe(), "Unauthorized")

    monkeypatch.setenv("BOT_TOKEN", token)
    monkeypatch.setattr("project.bot.run", refuse)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(complaint)


async def test_an_unknown_token_ends_the_bot(api: BotAPI) -> None:
    with pytest.raises(TelegramUnauthorizedError):
        await run("43:unknown", api.url)


@pytest.fixture
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    options = ["--people=8", "--pace=50", "--seconds=60", f"--port={PORT}", f"--log={tmp_path / 'demo.log'}"]
    options += getattr(request, "param", [])
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "project.demo", *options],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "SQLITE_PATH": str(tmp_path / "demo.sqlite3"),
            "DEMO_PASSWORD": "for-the-test",
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    children: list[psutil.Process] = []
    with process:
        yield process
        if process.poll() is None:
            children = psutil.Process(process.pid).children()
            process.kill()
    for child in children:
        child.kill()


def test_the_demo_runs_the_bot_and_the_admin_and_ends_both(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert demo.stdout is not None
    words = dict(re.findall(r"^  (\w+) +(\S+)$", _read_until(demo.stdout, "people talk"), re.MULTILINE))
    assert words["Login"] == "admin"
    assert words["Password"] == "for-the-test"
    children = psutil.Process(demo.pid).children()
    assert len(children) == 2
    assert 'id="login-form"' in _log_in_page(words["Open"])
    _wait_for_a_conversation(tmp_path / "demo.sqlite3")
    demo.send_signal(signal.SIGINT)
    rest = demo.stdout.read()
    assert demo.wait() == 0, (tmp_path / "demo.log").read_text()
    assert rest.endswith("Stopped.\n")
    assert not any(child.is_running() for child in children)
    log = (tmp_path / "demo.log").read_text()
    assert "Traceback" not in log
    assert "Unclosed" not in log


@pytest.mark.parametrize("demo", [["--redis"]], indirect=True)
def test_the_demo_with_a_redis(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    assert demo.stdout is not None
    url = re.findall(r"keeps them in (\S+)\. ", _read_until(demo.stdout, "people talk"))[0]
    with redis.Redis.from_url(url) as client:
        deadline = time.monotonic() + 30
        while not client.keys("fsm:42:*:state"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    children = psutil.Process(demo.pid).children()
    assert len(children) == 3
    demo.send_signal(signal.SIGINT)
    assert demo.stdout.read().endswith("Stopped.\n")
    assert demo.wait() == 0
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in (tmp_path / "demo.log").read_text()


def _read_until(stream: IO[str], words: str) -> str:
    text = ""
    for line in stream:
        text += line
        if words in line:
            return text
    raise AssertionError(f"ended with: {text}")


def _log_in_page(url: str) -> str:
    """Return the page, when its style sheets are served as well."""
    with urllib.request.urlopen(url) as page:
        html: str = page.read().decode()
    for path in re.findall(r'<link rel="stylesheet" href="([^"]+)"', html):
        with urllib.request.urlopen(urllib.parse.urljoin(url, path)) as sheet:
            assert sheet.status == 200
    return html


def _wait_for_a_conversation(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        query = f"SELECT 1 FROM {FSMRecord._meta.db_table} WHERE state IS NOT NULL"
        while not connection.execute(query).fetchone():
            time.sleep(0.02)
