"""The stand-in answers as Telegram does: long polling, confirmation, refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiogram.exceptions import (
    TelegramBadRequest,
    TelegramConflictError,
    TelegramNotFound,
    TelegramRetryAfter,
    TelegramUnauthorizedError,
)
from aiogram.methods import GetStickerSet
from aiogram.types import InlineKeyboardButton, InlineKeyboardMarkup, Update

from project.bot import build_bot
from project.bot_api import BotAPI
from tests.project.conftest import ANNA, FORUM, PRIVATE, Call


def keyboard(data: str = "yes") -> InlineKeyboardMarkup:
    return InlineKeyboardMarkup(inline_keyboard=[[InlineKeyboardButton(text="Yes", callback_data=data)]])


def ids(reply: dict[str, Any]) -> list[int]:
    return [update["update_id"] for update in reply["result"]]


async def polling(api: BotAPI) -> None:
    """Wait until a poll waits."""
    while not api.updates.is_polled:
        await asyncio.sleep(0)


async def test_it_listens_on_loopback_only(api: BotAPI) -> None:
    assert api.url.startswith("http://127.0.0.1:")


async def test_an_update_has_the_shape_of_the_bot_api(api: BotAPI, call: Call) -> None:
    await api.say(ANNA, PRIVATE, "/order now")
    _, reply = await call("getUpdates")
    (update,) = reply["result"]
    message = update["message"]
    assert message["from"] == {
        "id": 501,
        "is_bot": False,
        "first_name": "Anna",
        "last_name": "Baker",
        "language_code": "en",
    }
    assert message["chat"] == {"id": 501, "type": "private", "first_name": "Anna"}
    assert message["entities"] == [{"type": "bot_command", "offset": 0, "length": 6}]
    assert type(message["date"]) is int
    assert None not in message.values()
    assert Update.model_validate(update).event_type == "message"


async def test_updates_come_again_until_a_higher_offset_confirms_them(api: BotAPI, call: Call) -> None:
    for text in ("one", "two", "three"):
        await api.say(ANNA, PRIVATE, text)
    _, first = await call("getUpdates", limit=2)
    _, again = await call("getUpdates", limit=2)
    assert ids(first) == ids(again) == [1, 2]
    _, rest = await call("GETUPDATES", offset=3)
    assert ids(rest) == [3]
    assert len(api.updates) == 1


async def test_a_negative_offset_counts_from_the_end(api: BotAPI, call: Call) -> None:
    for text in ("one", "two", "three"):
        await api.say(ANNA, PRIVATE, text)
    _, reply = await call("getUpdates", offset=-1)
    assert ids(reply) == [3]


async def test_a_poll_waits_for_the_next_update(api: BotAPI, call: Call) -> None:
    poll = asyncio.create_task(call("getUpdates", timeout=30))
    await polling(api)
    await api.say(ANNA, PRIVATE, "hello")
    _, reply = await poll
    assert ids(reply) == [1]


async def test_a_poll_ends_empty_after_its_timeout(call: Call) -> None:
    assert await call("getUpdates", timeout=1) == (200, {"ok": True, "result": []})


async def test_a_newer_poll_ends_the_older_with_409(api: BotAPI, call: Call) -> None:
    older = asyncio.create_task(call("getUpdates", timeout=30))
    await polling(api)
    newer = asyncio.create_task(call("getUpdates", timeout=30))
    status, reply = await older
    assert status == reply["error_code"] == 409
    assert reply["description"].startswith("Conflict: terminated by other getUpdates request")
    await polling(api)
    await api.say(ANNA, PRIVATE, "hello")
    assert ids((await newer)[1]) == [1]


async def test_a_poll_ends_when_its_client_goes(api: BotAPI, call: Call) -> None:
    poll = asyncio.create_task(call("getUpdates", timeout=30))
    await polling(api)
    poll.cancel()
    while api.updates.is_polled:
        await asyncio.sleep(0)


async def test_only_allowed_updates_are_kept_and_the_choice_is_remembered(api: BotAPI, call: Call) -> None:
    await call("getUpdates", allowed_updates=json.dumps(["callback_query"]))
    await call("getUpdates")
    await api.say(ANNA, PRIVATE, "not wanted")
    assert len(api.updates) == 0
    await call("getUpdates", allowed_updates="[]")
    await api.say(ANNA, PRIVATE, "wanted")
    assert len(api.updates) == 1


@pytest.mark.parametrize("with_replies", [False, True])
async def test_privacy_mode_hides_what_a_group_says(api: BotAPI, with_replies: bool) -> None:
    await api.say(ANNA, FORUM, "/lunch", thread_id=2)
    async with build_bot(api.token, api.url) as bot:
        question = await bot.send_message(FORUM.id, "Which?", message_thread_id=2)
    await api.say(ANNA, FORUM, "ramen", thread_id=2, reply_to=question if with_replies else None)
    assert len(api.updates) == 1 + with_replies


@pytest.mark.parametrize(
    ("method", "params", "status", "description"),
    [
        ("getStickerSet", {}, 404, "Not Found"),
        ("sendMessage", {"chat_id": 501}, 400, "Bad Request: message text is empty"),
        ("sendMessage", {"chat_id": 501, "text": " "}, 400, "Bad Request: message text is empty"),
        ("sendMessage", {"chat_id": 501, "text": "x" * 4097}, 400, "Bad Request: message is too long"),
        ("sendMessage", {"text": "x"}, 400, "Bad Request: chat_id is empty"),
        ("sendMessage", {"chat_id": 999, "text": "x"}, 400, "Bad Request: chat not found"),
        ("sendMessage", {"chat_id": "@anna", "text": "x"}, 400, "Bad Request: chat not found"),
        (
            "sendMessage",
            {"chat_id": 501, "text": "x", "message_thread_id": 9},
            400,
            "Bad Request: message thread not found",
        ),
        (
            "sendMessage",
            {
                "chat_id": 501,
                "text": "x",
                "reply_markup": keyboard("x" * 65).model_dump_json(exclude_none=True),
            },
            400,
            "Bad Request: BUTTON_DATA_INVALID",
        ),
        (
            "editMessageText",
            {"chat_id": 501, "message_id": 77, "text": "x"},
            400,
            "Bad Request: message to edit not found",
        ),
        (
            "editMessageText",
            {"chat_id": 501, "message_id": 1, "text": "x"},
            400,
            "Bad Request: message can't be edited",
        ),
        (
            "answerCallbackQuery",
            {"callback_query_id": "7"},
            400,
            "Bad Request: query is too old and response timeout expired or query ID is invalid",
        ),
    ],
)
async def test_refusals_have_the_words_of_telegram(
    api: BotAPI, call: Call, method: str, params: dict[str, Any], status: int, description: str
) -> None:
    await api.say(ANNA, PRIVATE, "hello")
    assert await call(method, **params) == (
        status,
        {"ok": False, "error_code": status, "description": description},
    )


async def test_an_ill_typed_parameter_is_named(call: Call) -> None:
    status, reply = await call("getUpdates", timeout="soon")
    assert status == 400
    assert reply["description"].startswith("Bad Request: timeout: ")


async def test_a_text_that_looks_like_json_stays_text(api: BotAPI, call: Call) -> None:
    await api.say(ANNA, PRIVATE, "hello")
    _, reply = await call("sendMessage", chat_id=501, text="[1]")
    assert reply["result"]["text"] == "[1]"


async def test_aiogram_raises_its_own_errors(api: BotAPI) -> None:
    api.add_chat(PRIVATE)
    async with build_bot(api.token, api.url) as bot, build_bot("43:other", api.url) as stranger:
        with pytest.raises(TelegramUnauthorizedError):
            await stranger.get_me()
        with pytest.raises(TelegramNotFound):
            await bot(GetStickerSet(name="x"))
        poll = asyncio.create_task(bot.get_updates(timeout=30))
        await polling(api)
        await bot.get_updates()
        with pytest.raises(TelegramConflictError):
            await poll
        message = await bot.send_message(501, "hello", reply_markup=keyboard())
        with pytest.raises(TelegramBadRequest, match="message is not modified"):
            await message.edit_text("hello", reply_markup=keyboard())


async def test_a_flood_is_refused_with_retry_after_until_it_ends(api: BotAPI, call: Call) -> None:
    api.add_chat(PRIVATE)
    api.flood("sendMessage", 700)
    status, reply = await call("sendMessage", chat_id=501, text="x")
    seconds = reply["parameters"]["retry_after"]
    assert status == 429
    assert 650 < seconds <= 700
    assert reply["description"] == f"Too Many Requests: retry after {seconds}"
    assert (await call("getMe"))[0] == 200
    api.flood("sendMessage", 0)
    assert (await call("sendMessage", chat_id=501, text="x"))[0] == 200


async def test_a_flood_reaches_the_bot_as_retry_after(api: BotAPI) -> None:
    api.flood("getMe", 900)
    async with build_bot(api.token, api.url) as bot:
        bot.session.middleware.unregister(bot.session.middleware[0])
        with pytest.raises(TelegramRetryAfter) as flood:
            await bot.get_me()
    assert 850 < flood.value.retry_after <= 900


async def test_a_press_is_answered_once(api: BotAPI) -> None:
    api.add_chat(PRIVATE)
    async with build_bot(api.token, api.url) as bot:
        message = await bot.send_message(501, "Sure?", reply_markup=keyboard())
        pressed = await api.press(ANNA, message, "Yes")
        (update,) = await bot.get_updates()
        assert update.callback_query is not None
        assert update.callback_query.data == "yes"
        await update.callback_query.answer("Noted")
        assert (await pressed).text == "Noted"
        with pytest.raises(TelegramBadRequest, match="query is too old"):
            await update.callback_query.answer()
        with pytest.raises(LookupError, match="no button 'No'"):
            await api.press(ANNA, message, "No")


async def test_who_listens_gets_messages_and_edits(api: BotAPI) -> None:
    api.add_chat(PRIVATE)
    with api.listen(501) as inbox:
        async with build_bot(api.token, api.url) as bot:
            sent = await bot.send_message(501, "one")
            await sent.edit_text("two")
            await bot.send_chat_action(501, "typing")
    first, second = inbox.get_nowait(), inbox.get_nowait()
    assert (first.text, first.edit_date) == ("one", None)
    assert (second.text, second.message_id) == ("two", first.message_id)
    assert second.edit_date
    assert inbox.empty()


async def test_commands_are_kept(api: BotAPI, call: Call) -> None:
    commands = [{"command": "order", "description": "Order pizza"}]
    assert (await call("setMyCommands", commands=json.dumps(commands)))[1]["result"] is True
    assert (await call("getMyCommands"))[1]["result"] == commands


async def test_delete_webhook_can_drop_what_waits(api: BotAPI, call: Call) -> None:
    await api.say(ANNA, PRIVATE, "hello")
    await call("deleteWebhook", drop_pending_updates="true")
    assert (await call("getUpdates"))[1]["result"] == []
