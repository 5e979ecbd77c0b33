"""The graph of what a bot did, read from real tables."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db.models import F

from fsm_storage import DjangoStorage
from fsm_storage.discovery import Catalog, DeclaredGroup
from fsm_storage.graph import Edge, read_graph
from fsm_storage.models import FSMTransition
from tests.rows import let_time_pass


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests see no app but our own, which declares nothing."""
    catalog = Catalog(
        (DeclaredGroup("Order", ("Order:item", "Order:size")), DeclaredGroup("Support", ("Support:topic",)))
    )
    monkeypatch.setattr("fsm_storage.graph.declared_states", lambda: catalog)


def walk(storage: DjangoStorage, bot: int, user: int, *states: str | None) -> None:
    async def main() -> None:
        for state in states:
            await storage.set_state(StorageKey(bot_id=bot, chat_id=user, user_id=user), state)

    asyncio.run(main())


def test_live_counts_and_traffic(make_storage: Callable[..., DjangoStorage], database: str) -> None:
    storage = make_storage(state_ttl=60)
    walk(storage, 1, 1, "Order:item", "Order:size", None)
    walk(storage, 1, 2, "Order:item")
    let_time_pass(database, 120)  # the second has expired, and nobody saw it yet
    walk(storage, 1, 3, "Order:item", "Order:size")
    walk(storage, 2, 4, "Order:item", "Legacy:odd")
    storage.sweep()
    graph = read_graph(database)
    live = {node.state: (node.live, node.is_declared) for node in graph.nodes if node.live}
    assert live == {"Order:size": (1, True), "Legacy:odd": (1, False)}
    assert set(graph.edges) == {
        Edge(None, "Order:item", 4),
        Edge("Order:item", "Order:size", 2),
        Edge("Order:item", "Legacy:odd", 1),
        Edge("Order:item", None, 1, expired=1),
        Edge("Order:size", None, 1),
    }


def test_what_has_expired_is_not_live_though_no_sweep_saw_it(
    make_storage: Callable[..., DjangoStorage], database: str
) -> None:
    walk(make_storage(state_ttl=60), 1, 1, "Order:item")
    let_time_pass(database, 120)
    assert not any(node.live for node in read_graph(database).nodes)


def test_the_filters_narrow_both_counts_and_traffic(
    make_storage: Callable[..., DjangoStorage], database: str
) -> None:
    storage = make_storage(history="full")
    walk(storage, 1, 1, "Order:item")
    asyncio.run(storage.set_data(StorageKey(bot_id=1, chat_id=1, user_id=1), {"n": 1}))  # no move
    FSMTransition.objects.using(database).update(at=F("at") - timedelta(days=8))
    walk(storage, 1, 1, "Order:size")
    walk(storage, 2, 2, "Support:topic")
    walk(make_storage(alias="other"), 1, 3, "Order:item")
    week = read_graph(database, since=timedelta(days=7), alias=database, bot=1)
    assert week.edges == (Edge("Order:item", "Order:size", 1),)
    assert [(node.state, node.live) for node in week.nodes if node.live] == [("Order:size", 1)]
    assert read_graph(database, bot=2).edges == (Edge(None, "Support:topic", 1),)
    assert read_graph(database, alias="other").edges == (Edge(None, "Order:item", 1),)
    assert {node.group for node in read_graph(database, group="Support").nodes} == {"Support"}
