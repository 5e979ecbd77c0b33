"""People with a session, and websockets of pages, in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.contrib.auth.models import Permission, User
from django.test import Client

from fsm_storage import signals
from fsm_storage.live.broadcasting import Broadcaster
from fsm_storage.live.routing import websocket


class Browser(ApplicationCommunicator):
    """The browser's end of a websocket. Channels has one too, but it needs Daphne to be installed."""

    def __init__(self, application: Any, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        scope = {
            "type": "websocket",
            "path": path,
            "query_string": b"",
            "headers": headers,
            "subprotocols": [],
        }
        self.error: Exception | None = None
        """What the server raises when something is sent to this page: it has gone, and that was not read yet."""

        async def served(scope: Any, receive: Any, send: Any) -> None:
            async def send_to_page(message: Any) -> None:
                if self.error:
                    raise self.error
                await send(message)

            await application(scope, receive, send_to_page)

        super().__init__(served, scope)

    async def connect(self) -> bool:
        await self.send_input({"type": "websocket.connect"})
        answer = await self.receive_output(timeout=10)
        return bool(answer["type"] == "websocket.accept")

    async def disconnect(self) -> None:
        await self.send_input({"type": "websocket.disconnect", "code": 1001})
        await self.wait(timeout=10)

    async def say(self, message: Any) -> None:
        await self.send_input({"type": "websocket.receive", "text": json.dumps(message)})

    async def heard(self, kind: str) -> dict[str, Any]:
        """Return the next message, which must be of this kind."""
        output = await self.receive_output(timeout=10)
        assert output["type"] == "websocket.send", output
        message: dict[str, Any] = json.loads(output["text"])
        assert message["type"] == kind, message
        return message


Connect = Callable[..., Awaitable[Browser]]


@pytest.fixture
def memory_layer(settings: Any) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}


@pytest.fixture
def broadcaster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broadcaster]:
    """A broadcaster of this process, hooked to every write path."""
    broadcaster = Broadcaster()
    monkeypatch.setattr("fsm_storage.live.consumer.broadcaster", broadcaster)
    signals.hints.append(broadcaster.hint)
    yield broadcaster
    signals.hints.remove(broadcaster.hint)
    broadcaster.home = None
    broadcaster.finish()


def make_user(name: str, *codenames: str, is_staff: bool = True) -> User:
    user = User.objects.create_user(name, password="secret", is_staff=is_staff)
    user.user_permissions.add(*Permission.objects.filter(codename__in=codenames))
    return user


def cookie_of(user: User | None) -> str:
    """Log in; return the cookie that the browser would send."""
    client = Client()
    if user is not None:
        client.force_login(user)
    return "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())


@pytest.fixture
async def dial(transactional_db: None, broadcaster: Broadcaster) -> AsyncIterator[Connect]:
    """Open a websocket as the browser of `user` would from `origin`; say whether it was accepted."""
    opened: list[Browser] = []

    async def dial(user: User | None, origin: str = "http://testserver") -> tuple[Browser, bool]:
        headers = [(b"origin", origin.encode())] if origin else []
        if cookie := await sync_to_async(cookie_of)(user):
            headers.append((b"cookie", cookie.encode()))
        browser = Browser(websocket(), "/ws/fsm_storage/", headers)
        accepted = await browser.connect()
        if accepted:
            opened.append(browser)
        return browser, accepted

    yield dial
    for browser in opened:
        with suppress(Exception):
            await browser.disconnect()


@pytest.fixture
async def connect(dial: Any) -> Connect:
    """Open a websocket of a viewer, who watches what is given."""

    async def connect(name: str = "ann", **watch: str) -> Browser:
        found = await User.objects.filter(username=name).afirst()
        user = found or await sync_to_async(make_user)(name, "view_fsmrecord")
        browser, accepted = await dial(user)
        assert accepted
        await browser.say({"type": "watch", **watch})
        return browser

    return connect
