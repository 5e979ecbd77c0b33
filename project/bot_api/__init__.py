"""A stand-in for Telegram's Bot API, on loopback: a bot runs against it with no account and no network.

It is made of aiogram's own types, so what a bot is sent has passed the same validation as the real
thing. It knows text messages, inline buttons and forum topics; `parse_mode` is not interpreted.
"""

from project.bot_api.server import BotAPI
from project.bot_api.wire import APIError

__all__ = ["APIError", "BotAPI"]
