"""The websocket of the admin's pages. It says that something has changed, and who else looks; never what is there."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from typing import Any

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth import get_user
from django.http import HttpRequest
from django.utils.translation import gettext as _

from fsm_storage.live import EVERY, GROUP
from fsm_storage.live.broadcasting import broadcaster
from fsm_storage.rights import rights_of

RECHECK = 10.0
"""Seconds after which the person's rights are looked at again, and those who look at the same are greeted."""
MAX_MESSAGE = 4096
MAX_RECORDS = 100
FORBIDDEN = 4403
"""The code with which a connection is closed when the right to view is gone."""


_farewells: set[asyncio.Task[None]] = set()


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One page of the admin. Whoever may not view conversations is refused before the connection is accepted.

    It understands `{"type": "watch"}`: all conversations, and `{"type": "watch", "alias": …, "key": …}`:
    that one. It sends `changed`, at most every `EVERY` seconds, `present`, and `error`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watched: tuple[str, str] | None = None
        self._is_watching = False
        self._records: dict[tuple[str, str], int | None] = {}
        self._more = False
        self._sent_at = 0.0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._others: dict[str, tuple[Any, str, float]] = {}
        self._names: list[str] = []
        self._user_id = self._name = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a page until it is gone. However that ends, nothing of it goes on.

        Channels calls `disconnect` only when the page's farewell is the next thing that it reads: not when an
        answer to a page that has just gone raises, nor when the layer does.
        """
        try:
            await super().__call__(scope, receive, send)
        finally:
            for task in list(self._tasks.values()):
                task.cancel()
            if self._user_id:  # it had joined
                farewell = asyncio.create_task(self._say_farewell())
                _farewells.add(farewell)
                farewell.add_done_callback(_farewells.discard)

    async def connect(self) -> None:
        user = await self._viewer()
        if user is None or self.channel_layer is None:
            await self.close()
            return
        self._user_id, self._name = str(user.pk), user.get_full_name() or user.get_username()
        broadcaster.home = asyncio.get_running_loop()
        await self._join(GROUP)
        await self.accept()
        self._tasks["watch"] = asyncio.create_task(self._look_after())

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        try:
            alias, key = _watch_of(text_data)
        except ValueError as error:
            await self._say({"type": "error", "message": str(error)})
            return
        await self._leave()
        self._is_watching = True
        if alias is not None and key is not None:
            self._watched = alias, key
            await self._join(_room(alias, key))
            await self._greet(is_new=True)

    async def hint(self, event: dict[str, Any]) -> None:
        """Take a message of a `Broadcaster`."""
        for alias, key, version in event["records"]:
            if self._is_watching and self._watched in (None, (alias, key)):
                self._records[alias, key] = version
        self._more |= self._is_watching and event["more"]
        if len(self._records) > MAX_RECORDS:
            self._records.clear()
            self._more = True
        if (self._records or self._more) and "send" not in self._tasks:
            self._tasks["send"] = asyncio.create_task(self._send_when_due())

    async def greeting(self, event: dict[str, Any]) -> None:
        """Note who else looks at the same conversation, and answer those who are new."""
        if event["channel"] == self.channel_name or self._watched is None:
            return
        if event["leaves"]:
            self._others.pop(event["channel"], None)
        else:
            now = asyncio.get_running_loop().time()
            self._others[event["channel"]] = event["user_id"], event["name"], now
            if event["is_new"]:
                await self.channel_layer.send(event["channel"], self._greeting())
        await self._say_who_is_present()

    async def _send_when_due(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._records or self._more:
                await asyncio.sleep(self._sent_at + EVERY - loop.time())
                self._sent_at = loop.time()
                records = [[alias, key, version] for (alias, key), version in self._records.items()]
                message = {"type": "changed", "records": records, "more": self._more}
                self._records.clear()
                self._more = False
                await self._say(message)
        finally:
            del self._tasks["send"]

    async def _look_after(self) -> None:
        """Close when the right to view is gone, also when it cannot be found out."""
        code = 1011
        try:
            while True:
                await asyncio.sleep(RECHECK)
                if await self._viewer() is None:
                    code = FORBIDDEN
                    return
                await self._join(GROUP)  # again: a layer forgets, after a day or when its server was lost
                if self._watched is not None:
                    await self._join(_room(*self._watched))
                await self._greet()
                oldest = asyncio.get_running_loop().time() - 3 * RECHECK
                self._others = {name: other for name, other in self._others.items() if other[2] > oldest}
                await self._say_who_is_present()
        except asyncio.CancelledError:
            code = 0
            raise
        finally:
            if code:
                await self.close(code=code)

    async def _viewer(self) -> Any:
        return await database_sync_to_async(_viewer)(self.scope["session"].session_key)

    async def _join(self, group: str) -> None:
        await self.channel_layer.group_add(group, self.channel_name)

    async def _greet(self, *, is_new: bool = False, leaves: bool = False) -> None:
        if self._watched is not None:
            await self.channel_layer.group_send(_room(*self._watched), self._greeting(is_new, leaves))

    def _greeting(self, is_new: bool = False, leaves: bool = False) -> dict[str, Any]:
        return {
            "type": "greeting",
            "channel": self.channel_name,
            "user_id": self._user_id,
            "name": self._name,
            "is_new": is_new,
            "leaves": leaves,
        }

    async def _leave(self) -> None:
        if self._watched is not None:
            await self.channel_layer.group_discard(_room(*self._watched), self.channel_name)
            await self._greet(leaves=True)
        self._watched = None
        self._others.clear()

    async def _say_farewell(self) -> None:
        """Tell the others, when this consumer has ended: channels_redis loses what it fetches for one that ends."""
        with suppress(Exception):  # without it they forget this page a little later
            await self.channel_layer.group_discard(GROUP, self.channel_name)
            if self._watched is not None:
                await self.channel_layer.group_discard(_room(*self._watched), self.channel_name)
                await asyncio.sleep(EVERY)
                await self._greet(leaves=True)

    async def _say_who_is_present(self) -> None:
        names = sorted({name for user_id, name, _at in self._others.values() if user_id != self._user_id})
        if names != self._names:
            self._names = names
            await self._say({"type": "present", "names": names})

    async def _say(self, message: dict[str, Any]) -> None:
        with suppress(
            OSError
        ):  # what a server raises when the page has gone (ASGI 2.4); that it has, is read next
            await self.send(text_data=json.dumps(message))


class _Session(dict[str, Any]):
    """A session to read: over a websocket the browser would not learn of another key."""

    def flush(self) -> None: ...

    def cycle_key(self) -> None: ...


def _viewer(session_key: str | None) -> Any:
    """Return who is logged in, as the database has it now, if that person may view conversations."""
    request = HttpRequest()
    store = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
    request.session = _Session(store.items())  # type: ignore[assignment]
    user = get_user(request)
    may_enter = user.is_active and getattr(user, "is_staff", False)
    return user if may_enter and rights_of(user).view else None


def _watch_of(text: str | None) -> tuple[str, str] | tuple[None, None]:
    """Return the alias and the key that a page asks for. Raises `ValueError`, with what is wrong for people."""
    if text is None:
        raise ValueError(_("Messages are JSON in text, not bytes."))
    if len(text) > MAX_MESSAGE:
        raise ValueError(_("A message has %(most)d characters at the most.") % {"most": MAX_MESSAGE})
    try:
        message = json.loads(text)
    except json.JSONDecodeError as error:
        place = {"line": error.lineno, "column": error.colno}
        raise ValueError(_("This is no JSON: line %(line)d, column %(column)d.") % place) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(_("This is no JSON that can be read.")) from error
    if not isinstance(message, dict) or message.get("type") != "watch":
        raise ValueError(_("The type of a message is “watch”."))
    alias, key = message.get("alias"), message.get("key")
    if alias is None and key is None:
        return None, None
    if not isinstance(alias, str) or not isinstance(key, str):
        raise ValueError(_("A conversation is named by its alias and its key, both text."))
    return alias, key


def _room(alias: str, key: str) -> str:
    """Return the group of those who look at a conversation; names of groups are short and plain."""
    return f"{GROUP}.{sha256(json.dumps([alias, key]).encode()).hexdigest()[:32]}"
