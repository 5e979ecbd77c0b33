"""Other ways to Redis: a Cluster, Sentinel, a unix socket, a client that decodes."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from aiogram.fsm.storage.base import StorageKey
from django.conf import settings
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel

from fsm_storage import RedisStorage
from fsm_storage.exceptions import CorruptData, InvalidStorageError, RedisUnavailable, StorageTimeout
from tests.redis.patience import in_time
from tests.redis.proxy import Proxy
from tests.redis.replay import replayed, stored
from tests.redis.writers import key_of
from tests.servers import RedisServer, free_port, redis_binary


async def exercise(storage: RedisStorage) -> None:
    await asyncio.gather(*(storage.set_state(key_of(n), f"s{n}") for n in range(30)))
    states = await asyncio.gather(*(storage.get_state(key_of(n)) for n in range(30)))
    assert states == [f"s{n}" for n in range(30)]
    await asyncio.gather(*(storage.update_data(key_of(n % 3), {f"k{n}": n}) for n in range(30)))
    assert len(await storage.get_data(key_of(0))) == 10
    await storage.set_data(key_of(0), {})
    assert await storage.get_data(key_of(0)) == {}


@pytest.fixture
def cluster() -> Iterator[RedisServer]:
    server = RedisServer(settings.TEST_DIR / f"redis-{uuid.uuid4().hex[:8]}", cluster_enabled="yes")
    with redis.Redis(port=server.port) as raw:
        raw.execute_command("CLUSTER ADDSLOTS", *range(16384))
        deadline = time.monotonic() + 40
        while raw.cluster("INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    yield server
    server.remove()


@pytest.mark.parametrize("decode", [False, True])
async def test_a_cluster_without_a_mirror(cluster: RedisServer, decode: bool) -> None:
    client = RedisCluster(host="127.0.0.1", port=cluster.port, decode_responses=decode)
    storage = RedisStorage(client, mirror=False)
    await exercise(storage)
    with redis.Redis(port=cluster.port) as raw:
        raw.rpush("fsm:7:7:data", "a list")
        raw.script_flush()
    with pytest.raises(CorruptData):
        await storage.update_data(key_of(7), {"a": 1})
    await storage.update_data(key_of(8), {"a": 1})
    await storage.close()


async def test_a_cluster_with_a_mirror_is_refused(cluster: RedisServer) -> None:
    client = RedisCluster(host="127.0.0.1", port=cluster.port)
    with pytest.raises(InvalidStorageError, match="Cluster cannot write a key and the outbox"):
        RedisStorage(client)
    await client.aclose()


async def test_sentinel(own_redis: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "sentinel.conf"
    file.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor bots 127.0.0.1 {own_redis.port} 1\n"
    )
    process = subprocess.Popen([redis_binary(), str(file), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        manager = Sentinel([("127.0.0.1", port)])
        storage = RedisStorage(
            manager.master_for("bots"), timeout=60, mirror="apart"
        )  # it may still be starting
        await exercise(storage)
        with redis.Redis(port=own_redis.port) as raw:
            assert replayed(raw) == stored(raw)
            assert len(stored(raw)) == 32
        await storage.close()
        for sentinel in manager.sentinels:
            await sentinel.aclose(close_connection_pool=True)
    finally:
        process.terminate()
        process.wait(40)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    path = settings.TEST_DIR / f"{uuid.uuid4().hex[:8]}.sock"
    server = RedisServer(settings.TEST_DIR / f"redis-{uuid.uuid4().hex[:8]}", unixsocket=str(path))
    yield path
    server.remove()


async def test_a_unix_socket(socket_path: Path) -> None:
    storage = RedisStorage.from_url(f"unix://{socket_path}?db=2", mirror="apart")
    await exercise(storage)
    with redis.Redis(unix_socket_path=str(socket_path), db=2) as raw:
        assert replayed(raw) == stored(raw)
    await storage.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1, and its key, in one file."""
    file, key = tmp_path / "server.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *names, "-keyout", key, "-out", file], check=True, capture_output=True)
    file.write_text(key.read_text() + file.read_text())
    return file


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate")
async def test_tls(own_redis: RedisServer, certificate: Path, key: StorageKey) -> None:
    """Also when the line is cut, and with a value that takes many of TLS's records."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with Proxy(own_redis.port, context) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificate}"
        storage = RedisStorage.from_url(url, mirror="apart")
        await exercise(storage)
        proxy.cut()
        await storage.set_data(key, {"large": "x" * 1_000_000})
        assert await storage.get_data(key) == {"large": "x" * 1_000_000}
        await storage.close()
        stranger = RedisStorage.from_url(f"rediss://127.0.0.1:{proxy.port}/0", mirror=False, timeout=0.5)
        with pytest.raises(RedisUnavailable, match="certificate"):
            await in_time(lambda: stranger.get_state(key), StorageTimeout)
        await stranger.close()


async def test_a_client_that_decodes(redis_url: str, key: StorageKey) -> None:
    storage = RedisStorage(Redis.from_url(redis_url, decode_responses=True), mirror="apart")
    await exercise(storage)
    await storage.set_state(key, "ü🙂")
    assert await storage.get_state(key) == "ü🙂"
    await storage.close()


async def test_protocol_3(redis_url: str, raw: redis.Redis) -> None:
    def greetings() -> int:
        return raw.info("commandstats").get("cmdstat_hello", {"calls": 0})["calls"]

    storage = RedisStorage.from_url(redis_url, {"protocol": 3}, mirror="apart")
    before = greetings()
    await exercise(storage)
    assert greetings() > before
    await storage.close()


async def test_a_line_that_died_while_idle_is_found_by_the_next_question(
    own_redis: RedisServer, key: StorageKey
) -> None:
    """At the client's `socket_timeout`, far within the storage's; there is no need of a `health_check_interval`."""
    async with Proxy(own_redis.port) as proxy:
        options = {"socket_timeout": 0.3, "health_check_interval": 1}
        storage = RedisStorage.from_url(proxy.url, options, mirror="apart", timeout=20)
        await storage.set_state(key, "a")
        await storage.get_state(key)
        proxy.cut()
        assert await storage.get_state(key) == "a"
        lines = proxy.lines
        proxy.hold()  # the line says nothing more, as when a router has forgotten it
        asking = asyncio.create_task(storage.get_state(key))
        while proxy.lines == lines:  # it has hung up, and asks on another one
            await asyncio.sleep(0.01)
        proxy.mend()
        assert await asking == "a"
        await storage.close()
