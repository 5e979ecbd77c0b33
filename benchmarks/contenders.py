"""Who takes part, by name: titles and facts for the tables. Imports nothing heavy; `peers` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Places:
    """Where a cell finds its databases."""

    sqlite: Path
    postgres: str
    """The directory of PostgreSQL's unix socket."""
    redis: str
    bot_api: str = ""

    @property
    def postgres_dsn(self) -> str:
        return f"host={self.postgres} user=postgres dbname=postgres"


@dataclass(frozen=True)
class Contender:
    name: str
    title: str
    note: str
    is_ours: bool = False
    synchronous: str = "NORMAL"
    """SQLite's `synchronous` on Django's connection."""
    mirror: bool | Literal["apart"] = False
    """As of `RedisStorage`. "apart": the runner starts one, as `manage.py fsm_mirror` would be."""


_WAL = "WAL, synchronous=NORMAL, immediate transactions, as in project/settings.py"
_SERVER = "fsync and synchronous_commit on, unix socket"

_REDIS = "hiredis, TCP on loopback, persistence off"

_ALL = [
    Contender("memory", "aiogram MemoryStorage", "in the process, nothing is kept"),
    Contender("redis", "aiogram RedisStorage", f"as `from_url` makes it, {_REDIS}"),
    Contender(
        "aiogram-sqlite",
        "aiogram-sqlite-storage",
        "as in its README: pickle, SQLite's default journal and synchronous=FULL, on the loop's thread",
    ),
    Contender(
        "sqlalchemy-sqlite",
        "aiogram-sqlalchemy-storage, SQLite",
        "aiosqlite, the engine's defaults, SQLite's default journal and synchronous=FULL",
    ),
    Contender(
        "sqlalchemy-postgres",
        "aiogram-sqlalchemy-storage, PostgreSQL",
        f"asyncpg, the engine's defaults (up to 15 connections), {_SERVER}",
    ),
    Contender("orm-sqlite", "plain Django ORM, SQLite", f"`aget` and `aupdate_or_create`; {_WAL}"),
    Contender("orm-postgres", "plain Django ORM, PostgreSQL", f"`aget` and `aupdate_or_create`; {_SERVER}"),
    Contender("ours-sqlite-off", "DjangoStorage, SQLite, history off", _WAL, is_ours=True),
    Contender("ours-sqlite-states", "DjangoStorage, SQLite, history states", _WAL, is_ours=True),
    Contender(
        "ours-sqlite-states-full",
        "DjangoStorage, SQLite, history states, synchronous=FULL",
        "WAL, synchronous=FULL: each commit is an fsync",
        is_ours=True,
        synchronous="FULL",
    ),
    Contender("ours-postgres-off", "DjangoStorage, PostgreSQL, history off", _SERVER, is_ours=True),
    Contender("ours-postgres-states", "DjangoStorage, PostgreSQL, history states", _SERVER, is_ours=True),
    Contender("ours-redis-alone", "RedisStorage, no mirror", _REDIS, is_ours=True),
    Contender(
        "ours-redis-apart",
        "RedisStorage, mirror in another process",
        f"each write with its outbox entry, which a process like `fsm_mirror` applies to SQLite meanwhile; {_REDIS}",
        is_ours=True,
        mirror="apart",
    ),
    Contender(
        "ours-redis-mirrored",
        "RedisStorage, mirror in the bot",
        f"each write with its outbox entry, which a thread of the bot applies to SQLite meanwhile; {_REDIS}",
        is_ours=True,
        mirror=True,
    ),
]

CONTENDERS = {contender.name: contender for contender in _ALL}
HANDLER_NAMES = list(CONTENDERS)
DISPATCHER_NAMES = [
    "redis",
    "orm-sqlite",
    "ours-sqlite-off",
    "ours-sqlite-states",
    "memory",
    "ours-postgres-states",
    "ours-postgres-off",
]
ANSWERING_NAMES = ["redis", "ours-sqlite-states", "memory", "ours-postgres-states"]
LOCK_NAMES = ["redis", "ours-redis-alone", "ours-sqlite-states", "ours-postgres-states"]
QUICK_NAMES = ["redis", "ours-sqlite-states", "ours-postgres-states"]
QUICK_DISPATCHER_NAMES = ["memory", "ours-sqlite-states"]
BASE = "redis"
