"""The map: a graph of states with its figures, as places and the ways between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum
from typing import NamedTuple

from fsm_storage.discovery import declared_states, group_of
from fsm_storage.figures import Freshness, Scope, median, traffic
from fsm_storage.graph import Edge, Graph, graph_of
from fsm_storage.models import FSMRecord

LIVE_LIMIT = 1000
"""No more records of a state are looked at; the map then shows "1,000+". Where PostgreSQL has not vacuumed the table
for long, each costs a read of its own."""

UNDECLARED_LIMIT = 100
STAYS = [timedelta(minutes=1), timedelta(minutes=10), timedelta(hours=1), timedelta(days=1)]
"""The borders between the classes of median stay, which are shown as colours."""


class Kind(StrEnum):
    """What a node stands for. Their order is that in which a conversation passes them."""

    ENTRY = "entry"
    STATE = "state"
    CLEARED = "cleared"
    EXPIRED = "expired"


class Place(NamedTuple):
    """Where a conversation can be: in a state, before the first one, or behind the last one."""

    kind: Kind
    state: str = ""


Way = tuple[Place, Place]


class Node(NamedTuple):
    """A place with its figures; `live` counts at least so many if `is_more`."""

    place: Place
    is_declared: bool = True
    live: int = 0
    is_more: bool = False
    stay: timedelta | None = None

    @property
    def stay_class(self) -> int | None:
        """The number of the class of the median stay, from the shortest."""
        return None if self.stay is None else sum(self.stay >= border for border in STAYS)


class StateMap(NamedTuple):
    """Nodes in the order in which they follow one another, and how often each way was taken."""

    nodes: list[Node]
    arrows: Counter[Way]
    freshness: Freshness = Freshness(True, None)


def state_map(
    scope: Scope, known: Iterable[str], group: str | None = None, also: Iterable[Way] = ()
) -> StateMap:
    """Return the map of a group, or of all states: those that are `known`, and those that somebody came through.

    The ways `also` are on it even if nobody took them lately.
    """
    moved, also = traffic(scope), list(also)
    walked = [Edge(_state(source), _state(target), 0) for source, target in also]
    found = graph_of(declared_states(), dict.fromkeys(known, 0), [*moved.edges, *walked], group)
    shown = map_of(found)
    shown.arrows.update(dict.fromkeys(also, 0))
    nodes = [_counted(node, scope, moved.stays.get(node.place.state, Counter())) for node in shown.nodes]
    return StateMap(_with_ends(nodes, shown.arrows), shown.arrows, moved.freshness)


def map_of(found: Graph) -> StateMap:
    """Return a graph as a map: who is gone is either cleared or expired."""
    arrows: Counter[Way] = Counter()
    for edge in found.edges:
        source = _place(edge.from_state, Kind.ENTRY)
        for kind, moves in (Kind.CLEARED, edge.moves - edge.expired), (Kind.EXPIRED, edge.expired):
            if moves:
                arrows[source, _place(edge.to_state, kind)] += moves
    nodes = [Node(Place(Kind.STATE, node.state), node.is_declared, node.live) for node in found.nodes]
    return StateMap(_with_ends(nodes, arrows), arrows)


def states_known(also: Iterable[str] = ()) -> list[str]:
    """Return the declared states, then the others in the table or in `also`."""
    declared = declared_states().states
    found = FSMRecord.objects.states_in_use(UNDECLARED_LIMIT + len(declared))
    return [*declared, *sorted({*found, *also} - set(declared))]


def groups_of(states: Iterable[str]) -> list[str]:
    """Return the full names of the groups of these states."""
    return list(dict.fromkeys(map(group_of, states)))


def way_of(source: str | None, target: str | None, is_expiry: bool) -> Way:
    """Return the two places that a move leads between."""
    return _place(source, Kind.ENTRY), _place(target, Kind.EXPIRED if is_expiry else Kind.CLEARED)


def _place(state: str | None, otherwise: Kind) -> Place:
    return Place(otherwise) if state is None else Place(Kind.STATE, state)


def _state(place: Place) -> str | None:
    return place.state if place.kind is Kind.STATE else None


def _with_ends(nodes: Iterable[Node], arrows: Iterable[Way]) -> list[Node]:
    """Put the nodes that are no state before and behind the others, as far as an arrow needs them."""
    states = [node for node in nodes if node.place.kind is Kind.STATE]
    used = {place.kind for way in arrows for place in way} - {Kind.STATE}
    ends = {kind: [Node(Place(kind))] if kind in used else [] for kind in Kind}
    return [*ends[Kind.ENTRY], *states, *ends[Kind.CLEARED], *ends[Kind.EXPIRED]]


def _counted(node: Node, scope: Scope, stays: Counter[int]) -> Node:
    if node.place.kind is not Kind.STATE:
        return node
    looked, live = FSMRecord.objects.count_in_state(node.place.state, scope.bot, LIVE_LIMIT)
    return node._replace(live=live, is_more=looked > LIVE_LIMIT, stay=median(stays))
