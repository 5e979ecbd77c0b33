"""The scripted people: they finish what they begin, at the pace they were given, and stop when told."""

from __future__ import annotations

import asyncio
import random

import pytest

from fsm_storage import DjangoStorage
from project.bot_api import BotAPI
from project.people import FIRST_USER_ID, People, make_user
from project.person import Pace
from tests.conftest import SQLITE
from tests.project.conftest import running_bot
from tests.rows import in_thread, records


@pytest.mark.parametrize("database", [SQLITE], indirect=True)
async def test_people_and_bot_understand_each_other(api: BotAPI, storage: DjangoStorage) -> None:
    people = People(api, count=16, pace=200, seed=7)
    async with running_bot(api, storage):
        talking = asyncio.create_task(people.run(seconds=60))
        await asyncio.sleep(1.5)
        orders = groups = False
        while not talking.done() and not (people.endings["finished"] > 5 and orders and groups):
            await asyncio.sleep(0.1)
            rows = await in_thread(records, storage.database)
            orders |= any(row.state and row.state.startswith("Order:") for row in rows)
            groups |= any(row.thread_id is not None and row.chat_id < -(10**12) for row in rows)
        talking.cancel()
        await asyncio.wait([talking])
    assert people.endings["finished"] > 5
    assert set(people.endings) <= {"finished", "given up"}
    assert orders
    assert groups


async def test_people_keep_to_their_pace(api: BotAPI) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    talking = asyncio.create_task(People(api, count=50, pace=100).run())
    while api.updates.last_id < 40:
        await asyncio.sleep(0.001)
    took = loop.time() - began
    talking.cancel()
    await asyncio.wait([talking])
    assert 0.25 < took < 3.5  # 0.4 s, or more if the machine stood still


async def test_people_stop_when_cancelled(api: BotAPI) -> None:
    task = asyncio.create_task(People(api, count=5, pace=100).run())
    while not len(api.updates):
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(asyncio.all_tasks() - {asyncio.current_task()}) <= 2  # the loop watch, the server


async def test_turns_are_given_in_the_order_in_which_they_are_asked_for() -> None:
    pace = Pace(1000, random.Random(1))
    order: list[int] = []

    async def take(number: int) -> None:
        await pace.turn()
        order.append(number)

    await asyncio.gather(*map(take, range(10)))
    assert order == list(range(10))


def test_a_seed_gives_the_same_people() -> None:
    first, again = ([make_user(FIRST_USER_ID + n, random.Random(3)) for n in range(20)] for _ in range(2))
    assert first == again
    assert all(user.id > 0 and not user.is_bot for user in first)
