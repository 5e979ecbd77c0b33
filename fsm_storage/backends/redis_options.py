"""What the options of `RedisStorage` may be: the client that they name, and the system checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder, StorageKey
from django.core import checks
from django.core.checks import CheckMessage, Error
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster

from fsm_storage.backends.options import check_database, check_names_and_values, loaded
from fsm_storage.conf import storages
from fsm_storage.exceptions import InvalidStorageError


def client(
    redis: Redis | RedisCluster | str | None,
    url: str | None,
    connection_kwargs: Mapping[str, Any] | None,
    *,
    mirror: bool,
) -> Redis | RedisCluster:
    """Return the client that the options name, not connected yet. Raises `InvalidStorageError`."""
    if (redis is None) == (url is None):
        raise InvalidStorageError("give either 'redis', a client, or 'url'")
    found: Any = loaded(redis) if redis is not None else _from_url(url, connection_kwargs)
    if callable(found):
        found = found()
    if not isinstance(found, Redis | RedisCluster):
        raise InvalidStorageError(f"'redis' must be a client of redis.asyncio, not {found!r}")
    if mirror and isinstance(found, RedisCluster):
        raise InvalidStorageError(
            "a Redis Cluster cannot write a key and the outbox in one transaction, because they are on "
            "different nodes; set 'mirror' to False, or use a Redis that is no Cluster"
        )
    return found


def _from_url(url: Any, connection_kwargs: Mapping[str, Any] | None) -> Redis:
    try:
        # redis-py's other pool raises at its limit where this one waits.
        return Redis(connection_pool=BlockingConnectionPool.from_url(url, **(connection_kwargs or {})))
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidStorageError(f"'url' must be one of redis://, rediss:// or unix://: {error}") from error


def check_redis_options(backend: type, alias: str, options: Mapping[str, Any]) -> list[CheckMessage]:
    """Return the system-check messages for the `OPTIONS` of one alias."""
    where = f"FSM_STORAGES[{alias!r}]"
    messages = check_names_and_values(backend, alias, options)
    if messages:
        return messages
    mirror = options.get("mirror", True)
    try:
        client(options.get("redis"), options.get("url"), options.get("connection_kwargs"), mirror=mirror)
    except (InvalidStorageError, ImportError) as error:
        hint = 'For example "url": "redis://localhost:6379/0".'
        return [Error(f"{where}: {error}.", hint=hint, id="fsm_storage.E031")]
    if mirror:
        messages += check_database(where, options.get("database", "default"))
    if mirror or _has_siblings(backend):
        builder: KeyBuilder = loaded(options.get("key_builder"), called=True) or DefaultKeyBuilder()
        messages += _check_key_builder(where, builder)
    return messages


def _has_siblings(backend: type) -> bool:
    """Say whether several aliases, most likely of several bots, are on Redis."""
    found = [storages.configured(alias)[0] for alias in storages.settings]
    return found.count(backend) > 1


_KEY = StorageKey(bot_id=1, chat_id=2, user_id=3, business_connection_id="a")
_OTHERS = {
    "the bot": (replace(_KEY, bot_id=9), "with_bot_id"),
    "the business connection": (replace(_KEY, business_connection_id="b"), "with_business_connection_id"),
}


def _check_key_builder(where: str, builder: KeyBuilder) -> Iterator[CheckMessage]:
    dropped = {
        part: option
        for part, (other, option) in _OTHERS.items()
        if builder.build(_KEY) == builder.build(other)
    }
    if dropped:
        arguments = ", ".join(f"{option}=True" for option in dropped.values())
        yield checks.Warning(
            f"{where}: its keys leave out {' and '.join(dropped)}, so conversations that differ only there "
            "share one state, and one record.",
            hint=f"For new bots, set 'key_builder' to a DefaultKeyBuilder({arguments}). It changes the keys: "
            "running conversations stay behind. For one bot without business connections all is well.",
            id="fsm_storage.W030",
        )
