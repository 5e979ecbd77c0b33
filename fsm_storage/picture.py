"""The map as a drawing: places, sizes and texts, for the template that makes SVG of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from django.template.loader import render_to_string
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from fsm_storage.discovery import group_of
from fsm_storage.durations import in_words
from fsm_storage.layout import NODE_HEIGHT, NODE_WIDTH, Point, curve, drawing, middle
from fsm_storage.statemap import Kind, Node, Place, StateMap

_LONGEST_NAME = 17


class DrawnNode(NamedTuple):
    """A node of the picture; `x` and `y` are its upper left corner."""

    number: int
    x: float
    y: float
    name: str
    group: str
    figures: str
    title: str
    classes: str
    url: str


class DrawnEdge(NamedTuple):
    """An edge of the picture. `source` and `target` are numbers of nodes."""

    source: int
    target: int
    path: str
    label: Point
    times: str
    title: str
    thickness: float
    classes: str


class Picture(NamedTuple):
    nodes: list[DrawnNode]
    edges: list[DrawnEdge]
    width: float
    height: float
    node_width: int = NODE_WIDTH
    node_height: int = NODE_HEIGHT
    half: int = NODE_WIDTH // 2


class Walk(NamedTuple):
    """The way of one conversation: the ways that it took so far, and where it is."""

    ways: frozenset[tuple[Place, Place]] = frozenset()
    here: Place | None = None


NO_WALK = Walk()


def picture(
    shown: StateMap, url_of: Callable[[Place], str] = lambda place: "", walk: Walk = NO_WALK
) -> Picture:
    """Draw a map; `url_of` says where a node leads, "" being nowhere."""
    number = {node.place: at for at, node in enumerate(shown.nodes)}
    ways = sorted(shown.arrows, key=lambda way: (number[way[0]], number[way[1]]))
    drawn = drawing(len(number), [(number[source], number[target]) for source, target in ways])
    nodes = [
        _node(node, at, point, url_of(node.place), walk)
        for at, (node, point) in enumerate(zip(shown.nodes, drawn.nodes, strict=True))
    ]
    edges = [
        DrawnEdge(
            number[way[0]],
            number[way[1]],
            curve(points),
            middle(points),
            f"{shown.arrows[way]:,}",
            f"{name_of(way[0])} → {name_of(way[1])}: {shown.arrows[way]:,}",
            round(1.2 + 0.9 * math.log10(1 + shown.arrows[way]), 1),
            "fsm-walked" if way in walk.ways else "",
        )
        for way, points in zip(ways, drawn.edges, strict=True)
    ]
    return Picture(nodes, edges, drawn.width, drawn.height)


def as_svg(shown: StateMap) -> str:
    """Return a map as an SVG document of its own."""
    return render_to_string("fsm_storage/map.svg", {"picture": picture(shown), "is_alone": True})


def name_of(place: Place) -> str:
    """Return what people call a place."""
    names = {
        Kind.ENTRY: _("entry"),
        Kind.CLEARED: _("cleared"),
        Kind.EXPIRED: _("expired"),
    }
    return names.get(place.kind) or place.state or '""'


def live_text(node: Node) -> str:
    """Return how many are in a state: "12", or "10,000+" where nobody counted on."""
    return f"{node.live:,}{'+' if node.is_more else ''}"


def _node(node: Node, number: int, middle: Point, url: str, walk: Walk) -> DrawnNode:
    place = node.place
    full = name_of(place)
    is_state = place.kind is Kind.STATE
    figures = ""
    if is_state:
        figures = live_text(node) if node.stay is None else f"{live_text(node)} · {in_words(node.stay)}"
    return DrawnNode(
        number,
        middle.x - NODE_WIDTH / 2,
        middle.y - NODE_HEIGHT / 2,
        _cut(full.rpartition(":")[2] if is_state else full),
        _cut(group_of(place.state), 22) if is_state else "",
        figures,
        _title(node, full) if is_state else full,
        _classes(node, walk),
        url,
    )


def _title(node: Node, full: str) -> str:
    parts = [
        ngettext("%(count)s conversation now", "%(count)s conversations now", node.live)
        % {"count": live_text(node)}
    ]
    if node.stay is not None:
        parts.append(_("stay about %(time)s") % {"time": in_words(node.stay)})
    if not node.is_declared:
        parts.append(_("undeclared"))
    return f"{full}: {', '.join(parts)}"


def _classes(node: Node, walk: Walk) -> str:
    classes = [f"fsm-{node.place.kind.value}"]
    if node.stay_class is not None:
        classes.append(f"fsm-stay-{node.stay_class}")
    if not node.is_declared:
        classes.append("fsm-unknown")
    if node.place == walk.here:
        classes.append("fsm-here")
    elif any(node.place in way for way in walk.ways):
        classes.append("fsm-visited")
    return " ".join(classes)


def _cut(text: str, longest: int = _LONGEST_NAME) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
