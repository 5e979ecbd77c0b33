"""`RedisStorage` in `FSM_STORAGES`: what the constructor refuses and what the system checks say."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder
from django.core.checks import run_checks
from django.test import override_settings
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster

import fsm_storage
from fsm_storage import RedisStorage, storages
from fsm_storage.exceptions import InvalidStorageError

URL = "redis://127.0.0.1:1/0"
CLIENT, FACTORY, CLUSTER = f"{__name__}.CLIENT_", f"{__name__}.factory", f"{__name__}.cluster"
CLIENT_ = Redis()


def factory() -> Redis:
    return Redis.from_url(URL)


def cluster() -> RedisCluster:
    return RedisCluster(host="127.0.0.1", port=1)


class WholeKeys(DefaultKeyBuilder):
    def __init__(self) -> None:
        super().__init__(with_bot_id=True, with_business_connection_id=True, with_destiny=True)


WHOLE = f"{__name__}.WholeKeys"


def messages(**options: Any) -> list[tuple[str, str, str]]:
    setting = {"default": {"BACKEND": "fsm_storage.RedisStorage", "OPTIONS": options}}
    with override_settings(FSM_STORAGES=setting):
        found = run_checks(tags=["fsm_storage"])
    return [(message.id or "", message.msg, message.hint or "") for message in found]


def ids(**options: Any) -> list[str]:
    return [message[0].removeprefix("fsm_storage.") for message in messages(**options)]


def test_good_settings_are_quiet() -> None:
    assert ids(url=URL, key_builder=WHOLE, state_ttl=60, connection_kwargs={"socket_timeout": 1}) == []
    assert ids(url=URL, mirror=False) == []
    assert ids(redis=CLIENT, key_builder=WHOLE) == []
    assert ids(redis=FACTORY, key_builder=WHOLE) == []
    assert ids(redis=CLUSTER, mirror=False) == []


@pytest.mark.parametrize(
    ("options", "check", "words"),
    [
        ({}, "E031", "either 'redis', a client, or 'url'"),
        ({"url": URL, "redis": CLIENT}, "E031", "either"),
        ({"url": "http://localhost"}, "E031", "redis://"),
        ({"url": 5}, "E031", "'url' must be"),
        ({"redis": "nowhere.client"}, "E031", "nowhere"),
        ({"redis": f"{__name__}.URL"}, "E031", "must be a client of redis.asyncio"),
        ({"redis": CLUSTER}, "E031", "Cluster cannot write a key and the outbox"),
        ({"url": URL, "mirror": 1}, "E007", "mirror must be True, False or 'apart'"),
        ({"url": URL, "outbox_bytes": 0}, "E007", "outbox_bytes must be a whole number above 0"),
        ({"url": URL, "state_ttl": 0}, "E004", "above 0"),
        ({"url": URL, "colour": "red"}, "E003", "does not take"),
        ({"url": URL, "database": "nowhere", "key_builder": WHOLE}, "E005", "not in DATABASES"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], check: str, words: str) -> None:
    ((found, text, hint),) = messages(**options)
    assert found == f"fsm_storage.{check}"
    assert "FSM_STORAGES['default']" in text
    assert words in text
    assert hint
    if "database" not in options:
        with pytest.raises((InvalidStorageError, TypeError)):
            RedisStorage(**options)


def test_the_constructor_names_the_alias() -> None:
    with pytest.raises(InvalidStorageError, match="storage 'bot': give either"):
        RedisStorage(alias="bot")
    with pytest.raises(InvalidStorageError, match="storage 'default': state_ttl must be above 0"):
        RedisStorage(Redis(), state_ttl=-1)


def test_keys_that_drop_a_part_are_flagged_for_the_mirror() -> None:
    ((check, text, hint),) = messages(url=URL)
    assert check == "fsm_storage.W030"
    assert "leave out the bot and the business connection" in text
    assert "DefaultKeyBuilder(with_bot_id=True, with_business_connection_id=True)" in hint


def test_keys_that_drop_a_part_are_flagged_where_several_storages_are() -> None:
    options = {"BACKEND": "fsm_storage.RedisStorage", "OPTIONS": {"url": URL, "mirror": False}}
    with override_settings(FSM_STORAGES={"one": options, "two": options}):
        found = run_checks(tags=["fsm_storage"])
    assert [message.id for message in found] == ["fsm_storage.W030"] * 2


@pytest.mark.parametrize(("module", "package"), [("redis", "redis-py"), ("hiredis", "hiredis")])
def test_without_a_package_a_check_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    ours = ("fsm_storage.backends.redis", "fsm_storage.backends.wire")
    for name in [name for name in sys.modules if name.split(".")[0] == module or name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "aiogram.fsm.storage.redis", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(fsm_storage.__dict__, "RedisStorage", raising=False)
    ((check, text, hint),) = messages(url=URL)
    assert (check, text) == ("fsm_storage.E030", f"FSM_STORAGES['default'] needs {package}.")
    assert "pip install" in hint


def test_the_pool_that_is_made_waits() -> None:
    setting = {"bot": {"BACKEND": "fsm_storage.RedisStorage", "OPTIONS": {"url": URL}}}
    with override_settings(FSM_STORAGES=setting):
        storage = storages["bot"]
    assert isinstance(storage, RedisStorage)
    assert isinstance(storage.redis.connection_pool, BlockingConnectionPool)
    assert storage.alias == "bot"
