"""Bot, commands and site in processes of their own; what one writes, a page of the other hears. A real Redis."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import redis
from django.conf import settings
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fsm_storage.live.consumer import RECHECK
from fsm_storage.models import FSMRecord
from tests.live.conftest import cookie_of, make_user
from tests.servers import RedisServer, Site, finish_child, run_python, start_child

pytestmark = pytest.mark.django_db(transaction=True)
RECORD = {"type": "watch", "alias": "default", "key": "42:7:7"}


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    """A Redis that a test may kill."""
    server = RedisServer(settings.TEST_DIR / f"redis-{uuid.uuid4().hex[:8]}")
    yield server
    server.remove()


@pytest.fixture(scope="module")
def site(django_db_setup: None, own_redis: RedisServer) -> Iterator[Site]:
    site = Site(own_redis.url)
    yield site
    site.stop()


def _wait_for_the_consumers_end(server: RedisServer) -> None:
    """Until they have left their groups; or for a while, if they were lost with their server."""
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(server.url) as client, suppress(redis.ConnectionError):
        while client.keys("asgi:group:*") and time.monotonic() < deadline:
            time.sleep(0.02)


@pytest.fixture
def dial(
    transactional_db: None, site: Site, own_redis: RedisServer
) -> Iterator[Callable[..., ClientConnection]]:
    """Open a websocket as a page of `site` does; when it is returned, the server has understood what is watched."""
    cookies: dict[str, str] = {}
    with ExitStack() as opened:

        def dial(name: str = "ann") -> ClientConnection:
            if name not in cookies:
                cookies[name] = cookie_of(make_user(name, "view_fsmrecord"))
            page = opened.enter_context(open_socket(site, cookies[name]))
            page.send(json.dumps(RECORD))
            page.send("no JSON")
            while heard(page)["type"] != "error":
                pass
            return page

        yield dial
    _wait_for_the_consumers_end(own_redis)
    time.sleep(1.0)  # channels_redis may lose what it fetches for consumers that end


def open_socket(site: Site, cookie: str = "", path: str = "/ws/fsm_storage/") -> Any:
    headers = {"Cookie": cookie, "Origin": site.url}
    return connect(site.url.replace("http:", "ws:") + path, additional_headers=headers, open_timeout=20)


def heard(socket: ClientConnection, timeout: float = 45) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=timeout))
    return message


def layer(server: RedisServer) -> dict[str, str]:
    return {"FSM_TEST_LAYER": server.url}


def newest() -> list[Any]:
    record = FSMRecord.objects.get(key="42:7:7")
    return ["default", record.key, record.version]


def test_a_page_hears_of_a_process_that_writes_and_ends_at_once(dial: Any, own_redis: RedisServer) -> None:
    page = dial()
    bot = start_child("tests.live.bot", "Order:size", env=layer(own_redis))
    finish_child(bot)
    assert heard(page) == {"type": "changed", "records": [newest()], "more": False}
    command = (
        "import django; django.setup(); from django.core.management import call_command as c; "
        # It tells at its very end; a machine may stand still just then.
        "from fsm_storage.live.broadcasting import Broadcaster; Broadcaster.finish.__defaults__ = (30.0,); "
    )
    run_python(command + "c('fsm_set', '42:7:7', state='Order:payment')", env=layer(own_redis))
    assert heard(page) == {"type": "changed", "records": [newest()], "more": False}


def test_a_bot_that_lives_on_is_heard_again_after_its_redis_was_killed(
    dial: Any, own_redis: RedisServer
) -> None:
    page = dial()
    bot = start_child("tests.live.bot", "a", env=layer(own_redis))
    assert bot.stdin is not None
    assert bot.stdout is not None
    assert bot.stdout.readline() == "written\n"
    assert heard(page)["records"] == [newest()]
    own_redis.kill()
    bot.stdin.write("b\n")
    bot.stdin.flush()
    assert bot.stdout.readline() == "written\n"  # and waits for no Redis
    with suppress(ConnectionClosed, TimeoutError):  # the page would connect again
        page.recv(timeout=10)
    own_redis.start()
    page = dial()
    bot.stdin.write("c\n")
    bot.stdin.flush()
    assert bot.stdout.readline() == "written\n"
    message = heard(page)  # it was away: so the message may say only that much has changed
    assert message["more"] or message["records"] == [newest()]
    bot.stdin.write("d\n")
    bot.stdin.flush()
    assert bot.stdout.readline() == "written\n"
    # What was told of "b" may have come by itself, and "c" after it.
    while heard(page)["records"] != [newest()]:
        pass
    finish_child(bot)


def test_a_page_hears_of_a_bot_on_redis_through_its_mirror(dial: Any, own_redis: RedisServer) -> None:
    page = dial()
    bot = start_child("tests.live.bot", "Order:size", own_redis.url, env=layer(own_redis))
    assert bot.stdin is not None
    assert bot.stdout is not None
    assert bot.stdout.readline() == "written\n"
    assert heard(page) == {"type": "changed", "records": [newest()], "more": False}
    assert FSMRecord.objects.get(key="42:7:7").state == "Order:size"
    bot.stdin.write("Order:payment\n")
    bot.stdin.flush()
    finish_child(bot)  # the mirror goes on until the outbox is empty, and what it did is told at the end
    assert heard(page) == {"type": "changed", "records": [newest()], "more": False}
    assert FSMRecord.objects.get(key="42:7:7").state == "Order:payment"


def test_strangers_are_refused(transactional_db: None, site: Site) -> None:
    with pytest.raises(InvalidStatus, match="403"), open_socket(site):
        pass
    cookie = cookie_of(make_user("eve"))
    with pytest.raises(InvalidStatus, match="403"), open_socket(site, cookie):
        pass


def test_people_in_different_tabs_see_each_other(dial: Any) -> None:
    """Also when the one who leaves is being told of the other. A message that the layer loses only delays it."""
    ann, longest = dial("ann"), 5 * RECHECK
    for _ in range(5):
        bob = dial("bob")
        assert heard(ann, longest) == {"type": "present", "names": ["bob"]}
        bob.close()
        assert heard(ann, longest) == {"type": "present", "names": []}
