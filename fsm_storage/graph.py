"""The states of a project as a graph: who is in each, and who went from where to where. No drawing, no HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import NamedTuple

from fsm_storage.discovery import Catalog, declared_states, group_of, is_within
from fsm_storage.models import FSMRecord, FSMTransition


class Node(NamedTuple):
    """A state. `live`: the conversations that are in it now."""

    state: str
    group: str
    is_declared: bool
    live: int = 0


class Edge(NamedTuple):
    """A way that conversations went. No `from_state`: they entered; no `to_state`: they are gone.

    `expired` of the `moves` were because the time was up.
    """

    from_state: str | None
    to_state: str | None
    moves: int
    expired: int = 0


class Graph(NamedTuple):
    """Nodes in the order of declaration, then by name; edges in the order of their nodes.

    Entry and gone are no nodes but the None of an edge; `has_entry` and `has_gone` say whether to draw them.
    """

    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()

    @property
    def has_entry(self) -> bool:
        return any(edge.from_state is None for edge in self.edges)

    @property
    def has_gone(self) -> bool:
        return any(edge.to_state is None for edge in self.edges)

    @property
    def groups(self) -> dict[str, list[Node]]:
        """The nodes by the full names of their groups; "" has those without a group."""
        groups: dict[str, list[Node]] = {}
        for node in self.nodes:
            groups.setdefault(node.group, []).append(node)
        return groups


def graph_of(
    catalog: Catalog, live: Mapping[str, int], edges: Iterable[Edge], group: str | None = None
) -> Graph:
    """Put a graph together from the declared states, the counts in states and the edges. Asks no database.

    With `group`, of its states, those of groups nested in it, and their neighbours; "" is those without
    a group. Edges with the same ends are added up; one from a state to itself is left out, because
    nobody went anywhere.
    """
    sums: dict[tuple[str | None, str | None], Edge] = {}
    for edge in edges:
        ends = edge.from_state, edge.to_state
        if edge.from_state != edge.to_state and (group is None or any(_is_in(group, end) for end in ends)):
            old = sums.get(ends, Edge(*ends, 0))
            sums[ends] = Edge(*ends, old.moves + edge.moves, old.expired + edge.expired)
    named = [state for state in (*catalog.states, *live) if group is None or is_within(group, state)]
    ends_named = {end for ends in sums for end in ends if end is not None}
    declared = [state for state in catalog.states if state in {*named, *ends_named}]
    names = [*declared, *sorted({*named, *ends_named}.difference(declared))]
    nodes = tuple(Node(state, group_of(state), state in catalog, live.get(state, 0)) for state in names)
    places: dict[str | None, int] = {node.state: place for place, node in enumerate(nodes)}
    ordered = sorted(
        sums.values(),
        key=lambda edge: (places.get(edge.from_state, -1), places.get(edge.to_state, len(nodes))),
    )
    return Graph(nodes, tuple(ordered))


def read_graph(
    using: str = "default",
    *,
    alias: str | None = None,
    bot: int | None = None,
    group: str | None = None,
    since: timedelta | None = None,
) -> Graph:
    """Return the graph of a database, with the traffic of the time `since` (None: of all that is kept).

    `alias` and `bot` narrow what is counted. Two statements, which read every live state and every
    transition of that time: for a command, not for a page over millions of rows.
    """
    records, transitions = FSMRecord.objects.using(using), FSMTransition.objects.using(using)
    if alias is not None:
        records, transitions = records.filter(alias=alias), transitions.filter(alias=alias)
    if bot is not None:
        records, transitions = records.filter(bot_id=bot), transitions.filter(bot_id=bot)
    if since is not None:
        transitions = transitions.within(since)
    edges = (Edge(*row) for row in transitions.traffic())
    return graph_of(declared_states(), records.live_by_state(), edges, group)


def _is_in(group: str, state: str | None) -> bool:
    return state is not None and is_within(group, state)
