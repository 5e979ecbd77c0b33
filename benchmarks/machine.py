"""Where and with what the measurements were made. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import subprocess
from importlib.metadata import version
from pathlib import Path

import psycopg

from benchmarks.contenders import Places
from benchmarks.servers import redis_binary

_PACKAGES = [
    "Django",
    "aiogram",
    "pydantic",
    "psycopg",
    "redis",
    "hiredis",
    "aiogram-sqlite-storage",
    "aiogram-sqlalchemy-storage",
    "SQLAlchemy",
    "aiosqlite",
    "asyncpg",
]


def is_busy() -> bool:
    """Say whether others keep the machine busy, so that the numbers of a run will be noisy."""
    return os.getloadavg()[0] > 0.5 * len(os.sched_getaffinity(0))


def machine() -> list[tuple[str, str]]:
    """Return what the machine is, as names and values."""
    return [
        ("Processor", _field("/proc/cpuinfo", "model name") or platform.machine()),
        ("Cores", str(len(os.sched_getaffinity(0)))),
        ("Memory", _memory()),
        ("System", f"{_system()}, Linux {platform.release().split('-')[0]}"),
        ("Priority", f"nice {os.nice(0)}, all contenders alike"),
        ("Load at the start", f"{os.getloadavg()[0]:.1f} (one-minute average)"),
    ]


def versions(where: Places) -> list[tuple[str, str]]:
    """Return the versions of all that took part."""
    with psycopg.connect(where.postgres_dsn) as connection:
        postgres = str(connection.info.parameter_status("server_version"))
    redis = subprocess.run([redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=([\d.]+)", redis)
    return [
        ("Python", platform.python_version()),
        ("SQLite", sqlite3.sqlite_version),
        ("PostgreSQL", postgres.split()[0]),
        ("Redis", found[1] if found else "unknown"),
        *((package, version(package)) for package in _PACKAGES),
    ]


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def _memory() -> str:
    kibibytes = int(_field("/proc/meminfo", "MemTotal").split()[0])
    return f"{kibibytes / 2**20:.0f} GiB"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
