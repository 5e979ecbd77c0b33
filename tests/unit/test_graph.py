"""The graph is put together from values; no database."""

from __future__ import annotations

from fsm_storage.discovery import Catalog, DeclaredGroup
from fsm_storage.graph import Edge, Graph, Node, graph_of

CATALOG = Catalog(
    (
        DeclaredGroup("Order", ("Order:size", "Order:item")),
        DeclaredGroup("Order.Gift", ("Order.Gift:note",)),
        DeclaredGroup("Orders", ("Orders:all",)),
        DeclaredGroup("", ("lone",)),
    )
)


def states(graph: Graph) -> list[str]:
    return [node.state for node in graph.nodes]


def ends(graph: Graph) -> list[tuple[str | None, str | None]]:
    return [edge[:2] for edge in graph.edges]


def test_declared_states_come_in_their_order_and_others_by_name_and_marked() -> None:
    graph = graph_of(CATALOG, {"Z:z": 1, "Order:item": 3}, [Edge("Order:item", "A:gone", 2)])
    assert graph.nodes == (
        Node("Order:size", "Order", True),
        Node("Order:item", "Order", True, 3),
        Node("Order.Gift:note", "Order.Gift", True),
        Node("Orders:all", "Orders", True),
        Node("lone", "", True),
        Node("A:gone", "A", False),
        Node("Z:z", "Z", False, 1),
    )


def test_edges_of_the_same_ends_are_added_and_come_in_the_order_of_the_nodes() -> None:
    moves = [
        Edge("Order:item", None, 2, 1),
        Edge(None, "Order:size", 5),
        Edge("Order:size", "Order:item", 4),
        Edge("Order:item", None, 3, 3),
    ]
    graph = graph_of(CATALOG, {}, moves)
    assert graph.edges == (
        Edge(None, "Order:size", 5),
        Edge("Order:size", "Order:item", 4),
        Edge("Order:item", None, 5, 4),
    )
    assert graph.has_entry
    assert graph.has_gone


def test_who_stays_goes_no_way() -> None:
    graph = graph_of(CATALOG, {}, [Edge("Order:item", "Order:item", 9), Edge(None, None, 9)])
    assert graph.edges == ()
    assert not graph.has_entry
    assert not graph.has_gone


def test_a_group_has_its_nested_groups_and_its_neighbours_and_nothing_else() -> None:
    moves = [
        Edge("Order:item", "Orders:all", 1),
        Edge("Order.Gift:note", None, 1),
        Edge("Orders:all", "lone", 1),
        Edge(None, "lone", 1),
    ]
    graph = graph_of(CATALOG, {"Order:old": 1, "Other:x": 1}, moves, group="Order")
    assert states(graph) == ["Order:size", "Order:item", "Order.Gift:note", "Orders:all", "Order:old"]
    assert ends(graph) == [("Order:item", "Orders:all"), ("Order.Gift:note", None)]
    assert list(graph.groups) == ["Order", "Order.Gift", "Orders"]


def test_states_without_a_group_are_a_group() -> None:
    graph = graph_of(CATALOG, {"odd": 1, "Order:item": 1}, [Edge(None, "lone", 1)], group="")
    assert states(graph) == ["lone", "odd"]
    assert ends(graph) == [(None, "lone")]
