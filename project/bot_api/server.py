"""The HTTP server: what people do comes in through Python, what the bot does through HTTP."""

import asyncio
import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from aiogram import methods
from aiogram.types import BotCommand, CallbackQuery, Chat, Message, Update, User
from aiohttp import web
from pydantic import ValidationError

from project.bot_api.updates import Updates
from project.bot_api.wire import (
    APIError,
    Method,
    bad_request,
    callback_data,
    checked_keyboard,
    checked_text,
    command_entities,
    decode,
    dump,
    flaw_of,
    without_quote,
)

KEPT_MESSAGES = 20_000


class BotAPI:
    """The server: `async with BotAPI(token) as api`, then give `api.url` to the bot.

    People act through `say` and `press`; what the bot sends them comes out of `listen`.
    """

    def __init__(self, token: str = "42:stand-in", name: str = "Pizza") -> None:
        self.token = token
        self.bot = User(
            id=int(token.split(":")[0]),
            is_bot=True,
            first_name=name,
            username=f"{name.lower()}_bot",
        )
        self.url = ""
        self.updates = Updates()
        self.calls: deque[Method] = deque(maxlen=1000)
        self.commands: list[BotCommand] = []
        self._chats: dict[int, Chat] = {}
        self._topics: set[tuple[int, int]] = set()
        self._messages: OrderedDict[tuple[int, int], Message] = OrderedDict()
        self._message_ids = itertools.count(1)
        self._query_ids = itertools.count(1)
        self._open_queries: dict[str, asyncio.Future[methods.AnswerCallbackQuery]] = {}
        self._inboxes: dict[int, list[asyncio.Queue[Message]]] = {}
        self._floods: dict[str, float] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/bot{token}/{method}", self._serve)
        # A poll whose bot has gone must stop waiting, else it takes updates to nobody.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    # What people do.

    def add_chat(self, chat: Chat) -> None:
        """Let the bot write to `chat`. A chat in which somebody says something is added by that."""
        self._chats.setdefault(chat.id, chat)

    async def say(
        self,
        user: User,
        chat: Chat,
        text: str,
        *,
        thread_id: int | None = None,
        reply_to: Message | None = None,
    ) -> Message:
        """Send `text` as `user`, in the topic `thread_id` of a forum.

        The bot's privacy mode is on: in a group it gets commands and replies to it, no more.
        """
        self.add_chat(chat)
        if thread_id is not None:
            self._topics.add((chat.id, thread_id))
        message = self._message(
            chat,
            user,
            text,
            thread_id,
            reply_to_message=reply_to and without_quote(reply_to),
            entities=command_entities(text),
        )
        if chat.type == "private" or self._is_for_bot(message):
            self.updates.add(message=message)
        return message

    async def press(
        self, user: User, message: Message, button: str
    ) -> "asyncio.Future[methods.AnswerCallbackQuery]":
        """Press the inline button with the text `button` under `message`, as `user`.

        Return a future of the bot's answer. `LookupError` if there is no such button (any more).
        """
        current = self._messages[message.chat.id, message.message_id]
        query = CallbackQuery(
            id=str(next(self._query_ids)),
            from_user=user,
            chat_instance=str(message.chat.id),
            message=current,
            data=callback_data(current, button),
        )
        answer = self._open_queries[query.id] = asyncio.get_running_loop().create_future()
        self.updates.add(callback_query=query)
        return answer

    @contextmanager
    def listen(self, chat_id: int) -> Iterator[asyncio.Queue[Message]]:
        """Give a queue of what the bot sends to the chat from now on; an edited message comes again."""
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inboxes.setdefault(chat_id, []).append(inbox)
        try:
            yield inbox
        finally:
            self._inboxes[chat_id].remove(inbox)
            if not self._inboxes[chat_id]:
                del self._inboxes[chat_id]

    def flood(self, method: str, retry_after: int) -> None:
        """Refuse `method` with 429 for `retry_after` seconds from now; 0 ends it."""
        self._floods[method.lower()] = time.monotonic() + retry_after

    # What the bot does.

    async def _serve(self, request: web.Request) -> web.Response:
        try:
            if request.match_info["token"] != self.token:
                raise APIError(401, "Unauthorized")
            call, answer = await self._read(request)
            self._check_flood(call)
            self.calls.append(call)
            result = await answer(self, call)
        except APIError as refusal:
            return refusal.response()
        return web.json_response({"ok": True, "result": dump(result)})

    async def _read(self, request: web.Request) -> tuple[Method, "Answer"]:
        name = request.match_info["method"].lower()
        if name not in ANSWERS:
            raise APIError(404, "Not Found")
        kind, answer = ANSWERS[name]
        form = {**request.query, **await request.post()}
        try:
            return kind.model_validate({key: decode(kind, key, value) for key, value in form.items()}), answer
        except ValidationError as error:
            raise bad_request(flaw_of(error)) from error

    def _check_flood(self, call: Method) -> None:
        left = self._floods.get(call.__api_method__.lower(), 0.0) - time.monotonic()
        if left > 0:
            seconds = math.ceil(left)
            raise APIError(429, f"Too Many Requests: retry after {seconds}", retry_after=seconds)

    async def _get_me(self, call: methods.GetMe) -> User:
        rights = {
            "can_join_groups": True,
            "can_read_all_group_messages": False,
            "supports_inline_queries": False,
        }
        return self.bot.model_copy(update=rights)

    async def _get_updates(self, call: methods.GetUpdates) -> list[Update]:
        return await self.updates.poll(call)

    async def _send_message(self, call: methods.SendMessage) -> Message:
        chat = self._chat(call.chat_id)
        thread_id = call.message_thread_id
        if thread_id is not None and (chat.id, thread_id) not in self._topics:
            raise bad_request("message thread not found")
        message = self._message(
            chat,
            self.bot,
            checked_text(call.text),
            thread_id,
            entities=call.entities,
            reply_markup=checked_keyboard(call.reply_markup),
        )
        self._deliver(message)
        return message

    async def _edit_message_text(self, call: methods.EditMessageText) -> Message:
        chat = self._chat(call.chat_id)
        old = self._messages.get((chat.id, call.message_id or 0))
        if old is None:
            raise bad_request("message to edit not found")
        if not self._is_own(old):
            raise bad_request("message can't be edited")
        text, keyboard = checked_text(call.text), checked_keyboard(call.reply_markup)
        if (text, keyboard) == (old.text, old.reply_markup):
            raise bad_request(
                "message is not modified: specified new message content and reply markup are exactly "
                "the same as a current content and reply markup of the message"
            )
        changes = {
            "text": text,
            "entities": call.entities,
            "reply_markup": keyboard,
            "edit_date": int(time.time()),
        }
        message = self._keep(old.model_copy(update=changes))
        self._deliver(message)
        return message

    async def _answer_callback_query(self, call: methods.AnswerCallbackQuery) -> bool:
        answer = self._open_queries.pop(call.callback_query_id, None)
        if answer is None:
            raise bad_request("query is too old and response timeout expired or query ID is invalid")
        if not answer.done():
            answer.set_result(call)
        return True

    async def _send_chat_action(self, call: methods.SendChatAction) -> bool:
        self._chat(call.chat_id)
        return True

    async def _set_my_commands(self, call: methods.SetMyCommands) -> bool:
        self.commands = call.commands
        return True

    async def _get_my_commands(self, call: methods.GetMyCommands) -> list[BotCommand]:
        return self.commands

    async def _delete_webhook(self, call: methods.DeleteWebhook) -> bool:
        if call.drop_pending_updates:
            self.updates.drop()
        return True

    # What is known of chats and messages.

    def _chat(self, chat_id: int | str | None) -> Chat:
        if not isinstance(chat_id, int) or chat_id not in self._chats:
            raise bad_request("chat not found")
        return self._chats[chat_id]

    def _message(self, chat: Chat, sender: User, text: str, thread_id: int | None, **fields: Any) -> Message:
        return self._keep(
            Message(
                message_id=next(self._message_ids),
                date=datetime.now(UTC),
                chat=chat,
                from_user=sender,
                text=text,
                message_thread_id=thread_id,
                is_topic_message=True if thread_id is not None else None,
                **fields,
            )
        )

    def _is_for_bot(self, message: Message) -> bool:
        quoted = message.reply_to_message
        return bool(message.entities) or (quoted is not None and self._is_own(quoted))

    def _is_own(self, message: Message) -> bool:
        return message.from_user is not None and message.from_user.id == self.bot.id

    def _keep(self, message: Message) -> Message:
        self._messages[message.chat.id, message.message_id] = message
        if len(self._messages) > KEPT_MESSAGES:
            self._messages.popitem(last=False)
        return message

    def _deliver(self, message: Message) -> None:
        for inbox in self._inboxes.get(message.chat.id, ()):
            inbox.put_nowait(message)


Answer = Callable[[BotAPI, Any], Awaitable[Any]]
ANSWERS: dict[str, tuple[type[Method], Answer]] = {
    kind.__api_method__.lower(): (kind, answer)
    for kind, answer in (
        (methods.GetMe, BotAPI._get_me),
        (methods.GetUpdates, BotAPI._get_updates),
        (methods.SendMessage, BotAPI._send_message),
        (methods.EditMessageText, BotAPI._edit_message_text),
        (methods.AnswerCallbackQuery, BotAPI._answer_callback_query),
        (methods.SendChatAction, BotAPI._send_chat_action),
        (methods.SetMyCommands, BotAPI._set_my_commands),
        (methods.GetMyCommands, BotAPI._get_my_commands),
        (methods.DeleteWebhook, BotAPI._delete_webhook),
    )
}
