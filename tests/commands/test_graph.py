"""`fsm_graph`: the same graph in three spellings."""

from __future__ import annotations

import asyncio

import pytest
from aiogram.fsm.storage.base import StorageKey

from fsm_storage import DjangoStorage
from fsm_storage.discovery import Catalog, DeclaredGroup
from tests.commands.conftest import Run

KEY = StorageKey(1, 7, 7)
ODD = 'Odd:"]\\<b>\n'


@pytest.fixture
def walked(storage: DjangoStorage, database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    catalog = Catalog((DeclaredGroup("Order", ("Order:item", "Order:size")), DeclaredGroup("", ("lone",))))
    monkeypatch.setattr("fsm_storage.graph.declared_states", lambda: catalog)

    async def main() -> None:
        for state in ("Order:item", "Order:size", None, ODD):
            await storage.set_state(KEY, state)

    asyncio.run(main())
    return database


def test_as_json(walked: str, run: Run) -> None:
    graph = run("fsm_graph", "--database", walked, "--json").json
    assert [(node["state"], node["is_declared"], node["live"]) for node in graph["nodes"]] == [
        ("Order:item", True, 0),
        ("Order:size", True, 0),
        ("lone", True, 0),
        (ODD, False, 1),
    ]
    assert [(edge["from_state"], edge["to_state"], edge["moves"]) for edge in graph["edges"]] == [
        (None, "Order:item", 1),
        (None, ODD, 1),
        ("Order:item", "Order:size", 1),
        ("Order:size", None, 1),
    ]
    group = run("fsm_graph", "--database", walked, "--json", "--group", "Odd", "--since", "ever").json
    assert [node["state"] for node in group["nodes"]] == [ODD]


def test_as_mermaid(walked: str, run: Run) -> None:
    lines = run("fsm_graph", "--alias", walked).out.splitlines()
    assert lines == [
        "flowchart LR",
        '  subgraph g0["Order"]',
        '    s0["item: 0"]',
        '    s1["size: 0"]',
        "  end",
        '    s2["lone: 0"]',
        '  subgraph g2["Odd"]',
        '    s3["#34;#93;#92;#60;b#62;#10; (undeclared): 1"]',
        "  end",
        "  class s3 undeclared",
        "  entry((entry))",
        "  gone((gone))",
        "  entry -->|1| s0",
        "  entry -->|1| s3",
        "  s0 -->|1| s1",
        "  s1 -->|1| gone",
        "  classDef undeclared stroke-dasharray: 4",
    ]


def test_as_dot(walked: str, run: Run) -> None:
    lines = run("fsm_graph", "--alias", walked, "--format", "dot").out.splitlines()
    assert lines[0] == "digraph states {"
    assert '    s3 [label="\\"]\\\\<b>  (undeclared): 1", style="rounded,dashed"];' in lines
    assert '  s0 -> s1 [label="1"];' in lines
    assert lines[-1] == "}"


@pytest.mark.parametrize("arguments", [["--since", "soon"], ["--format", "gif"], ["--bot", "x"]])
@pytest.mark.django_db
def test_arguments_that_mean_nothing(arguments: list[str], run: Run) -> None:
    assert run("fsm_graph", *arguments).code in (1, 2)
