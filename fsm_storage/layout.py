"""Places the nodes of a graph in layers, and bends its edges around them. Pure.

After Sugiyama, Tagawa and Toda (1981): layers by the longest path, the order in a layer by the mean place
of the neighbours. The pages lay out again with dagre, which does more; this serves where no script runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

NODE_WIDTH, NODE_HEIGHT = 136, 56
GAP_X, GAP_Y, BEND_WIDTH, MARGIN = 18, 48, 14, 20
_SWEEPS = 8
_PER_ROW = 4


class Point(NamedTuple):
    x: float
    y: float


class Drawing(NamedTuple):
    """The middle of each node, the bends of each edge from its source to its target, and the whole size."""

    nodes: list[Point]
    edges: list[list[Point]]
    width: float
    height: float


class _Layers:
    """Nodes and the bends of long edges, each in its layer."""

    def __init__(self, count: int, edges: Sequence[tuple[int, int]]) -> None:
        # An edge that leads back in the order of the nodes is laid out the other way round.
        forward = [(min(edge), max(edge)) for edge in edges]
        joined = {node for edge in forward if edge[0] != edge[1] for node in edge}
        self.layer = _longest_paths(count, forward)
        self.count = count
        self.above: dict[int, list[int]] = defaultdict(list)
        self.below: dict[int, list[int]] = defaultdict(list)
        self.chains = [self._chain(*edge) for edge in forward]
        self.rows: list[list[int]] = [[] for _ in range(max(self.layer, default=-1) + 1)]
        for item, layer in enumerate(self.layer):
            if item in joined or item >= count:
                self.rows[layer].append(item)
        self._add_lonely([node for node in range(count) if node not in joined])

    def _chain(self, source: int, target: int) -> list[int]:
        if source == target:
            return [source, target]
        chain = [source]
        for layer in range(self.layer[source] + 1, self.layer[target]):
            chain.append(len(self.layer))
            self.layer.append(layer)
        chain.append(target)
        for upper, lower in pairwise(chain):
            self.below[upper].append(lower)
            self.above[lower].append(upper)
        return chain

    def _add_lonely(self, nodes: list[int]) -> None:
        self.rows = [row for row in self.rows if row]
        self.rows += [nodes[start : start + _PER_ROW] for start in range(0, len(nodes), _PER_ROW)]

    def sort(self) -> None:
        """Put each item near the middle of those that it is joined to, downwards and upwards in turn."""
        for sweep in range(_SWEEPS):
            neighbours = self.below if sweep % 2 else self.above
            for row in self.rows[::-1] if sweep % 2 else self.rows:
                place = {item: at for other in self.rows for at, item in enumerate(other)}
                row.sort(key=lambda item: _mean([place[n] for n in neighbours[item]], place[item]))

    def widths(self, row: Sequence[int]) -> list[int]:
        return [NODE_WIDTH if item < self.count else BEND_WIDTH for item in row]

    def columns(self) -> dict[int, float]:
        """Return where each item is from left to right."""
        x: dict[int, float] = {}
        for row in self.rows:
            _spread(row, self.widths(row), dict.fromkeys(row, 0.0), x)
        for sweep in range(_SWEEPS):
            neighbours = self.below if sweep % 2 else self.above
            for row in self.rows[::-1] if sweep % 2 else self.rows:
                wanted = {item: _mean([x[n] for n in neighbours[item]], x[item]) for item in row}
                _spread(row, self.widths(row), wanted, x)
        return x


def drawing(count: int, edges: Sequence[tuple[int, int]]) -> Drawing:
    """Lay out the nodes 0 to `count` - 1, in the order in which they are meant to follow one another."""
    layers = _Layers(count, edges)
    layers.sort()
    x = layers.columns()
    left = min((x[item] - (NODE_WIDTH if item < count else 0) / 2 for item in x), default=0) - MARGIN
    right = max((x[item] + (NODE_WIDTH if item < count else 0) / 2 for item in x), default=0) + MARGIN
    y = {
        item: MARGIN + NODE_HEIGHT / 2 + row * (NODE_HEIGHT + GAP_Y)
        for row, items in enumerate(layers.rows)
        for item in items
    }
    points = {item: Point(round(x[item] - left, 1), round(y[item], 1)) for item in x}
    bends = [
        [points[item] for item in (chain if source <= target else chain[::-1])]
        for chain, (source, target) in zip(layers.chains, edges, strict=True)
    ]
    height = 2 * MARGIN + len(layers.rows) * (NODE_HEIGHT + GAP_Y) - GAP_Y
    nodes = [points[node] for node in range(count)]
    return Drawing(nodes, [_from_border_to_border(bend) for bend in bends], round(right - left, 1), height)


def curve(points: Sequence[Point]) -> str:
    """Return a smooth way through the points, as the `d` of an SVG path."""
    text = f"M{points[0].x:g},{points[0].y:g}"
    for before, after in pairwise(points):
        middle = (before.y + after.y) / 2
        text += f"C{before.x:g},{middle:g} {after.x:g},{middle:g} {after.x:g},{after.y:g}"
    return text


def middle(points: Sequence[Point]) -> Point:
    """Return where the label of an edge goes."""
    at = (len(points) - 1) // 2
    one, other = points[at], points[at + 1]
    return Point(round((one.x + other.x) / 2, 1), round((one.y + other.y) / 2, 1))


def _longest_paths(count: int, forward: Sequence[tuple[int, int]]) -> list[int]:
    layer = [0] * count
    for source, target in sorted(edge for edge in forward if edge[0] != edge[1]):
        layer[target] = max(layer[target], layer[source] + 1)
    return layer


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: Sequence[int], widths: Sequence[int], wanted: dict[int, float], x: dict[int, float]) -> None:
    """Give each item its wanted place, or the next one that is free, and keep the row's middle where it was."""
    at: list[float] = []
    for place, (item, width) in enumerate(zip(row, widths, strict=True)):
        least = at[-1] + (widths[place - 1] + width) / 2 + GAP_X if at else wanted[item]
        at.append(max(wanted[item], least))
    shift = _mean([wanted[item] for item in row], 0) - _mean(at, 0)
    x.update({item: value + shift for item, value in zip(row, at, strict=True)})


def _from_border_to_border(points: list[Point]) -> list[Point]:
    """Let an edge begin and end at the borders of its nodes; one to itself goes around the right side."""
    first, last = points[0], points[-1]
    if first == last:
        right = first.x + NODE_WIDTH / 2
        return [Point(right, first.y - 10), Point(right + 22, first.y), Point(right, first.y + 10)]
    down = NODE_HEIGHT / 2 if last.y > first.y else -NODE_HEIGHT / 2
    return [Point(first.x, first.y + down), *points[1:-1], Point(last.x, last.y - down)]
