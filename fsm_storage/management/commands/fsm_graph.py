from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from fsm_storage.graph import Edge, Graph, Node, read_graph
from fsm_storage.management import selection
from fsm_storage.management.output import as_json, errors
from fsm_storage.picture import as_svg
from fsm_storage.statemap import map_of


def _since(text: str) -> timedelta | None:
    return None if text == "ever" else selection.duration(text)


class Command(BaseCommand):
    help = "Prints the states as a graph: how many conversations are in each, and where they went from there."

    def add_arguments(self, parser: CommandParser) -> None:
        selection.add_place(parser)
        parser.add_argument("--format", choices=list(FORMATS), default="mermaid", help="(default: mermaid)")
        parser.add_argument("--json", action="store_const", const="json", dest="format", help="--format json")
        parser.add_argument("--bot", type=int, metavar="ID", help="only this bot")
        parser.add_argument("--group", help="only this group of states, and its neighbours")
        parser.add_argument(
            "--since",
            type=_since,
            default=timedelta(days=7),
            metavar="7d",
            help="the traffic of this time, or of 'ever' (default: 7d)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        with errors():
            graph = read_graph(
                selection.using(options),
                alias=options["alias"],
                bot=options["bot"],
                group=options["group"],
                since=options["since"],
            )
        for line in FORMATS[options["format"]](graph):
            self.stdout.write(line)


def as_mermaid(graph: Graph) -> Iterator[str]:
    """Yield a Mermaid flowchart, with a box for each group."""
    names = _names(graph)
    yield "flowchart LR"
    for number, (group, nodes) in enumerate(graph.groups.items()):
        inside = [f'{names[node.state]}["{_mermaid(_label(node))}"]' for node in nodes]
        undeclared = [names[node.state] for node in nodes if not node.is_declared]
        yield from _boxed(f'  subgraph g{number}["{_mermaid(group)}"]', inside, "  end", bool(group))
        yield from (f"  class {name} undeclared" for name in undeclared)
    if graph.has_entry:
        yield "  entry((entry))"
    if graph.has_gone:
        yield "  gone((gone))"
    for edge in graph.edges:
        source, target = _ends(edge, names)
        yield f"  {source} -->|{edge.moves}| {target}"
    if not all(node.is_declared for node in graph.nodes):
        yield "  classDef undeclared stroke-dasharray: 4"


def as_dot(graph: Graph) -> Iterator[str]:
    """Yield a graph for Graphviz, with a cluster for each group."""
    names = _names(graph)
    yield "digraph states {"
    yield "  rankdir=LR; node [shape=box, style=rounded];"
    for number, (group, nodes) in enumerate(graph.groups.items()):
        inside = [f"{names[node.state]} [label={_quoted(_label(node))}{_dashes(node)}];" for node in nodes]
        yield from _boxed(
            f"  subgraph cluster_{number} {{ label={_quoted(group)};", inside, "  }", bool(group)
        )
    if graph.has_entry:
        yield "  entry [shape=circle];"
    if graph.has_gone:
        yield "  gone [shape=doublecircle];"
    for edge in graph.edges:
        source, target = _ends(edge, names)
        yield f'  {source} -> {target} [label="{edge.moves}"];'
    yield "}"


def _as_json(graph: Graph) -> Iterator[str]:
    yield as_json(
        {
            "nodes": [node._asdict() for node in graph.nodes],
            "edges": [edge._asdict() for edge in graph.edges],
        }
    )


def _as_svg(graph: Graph) -> Iterator[str]:
    yield as_svg(map_of(graph))


FORMATS: dict[str, Callable[[Graph], Iterator[str]]] = {
    "mermaid": as_mermaid,
    "dot": as_dot,
    "json": _as_json,
    "svg": _as_svg,
}


def _boxed(begin: str, inside: list[str], end: str, is_boxed: bool) -> Iterator[str]:
    if is_boxed:
        yield begin
    yield from (f"    {line}" for line in inside)
    if is_boxed:
        yield end


def _names(graph: Graph) -> dict[str | None, str]:
    """Return short names for the states, which may hold any letters."""
    return {node.state: f"s{number}" for number, node in enumerate(graph.nodes)}


def _ends(edge: Edge, names: dict[str | None, str]) -> tuple[str, str]:
    source = "entry" if edge.from_state is None else names[edge.from_state]
    return source, "gone" if edge.to_state is None else names[edge.to_state]


def _label(node: Node) -> str:
    name = node.state.rpartition(":")[2] or node.state or '""'
    undeclared = "" if node.is_declared else " (undeclared)"
    return f"{name}{undeclared}: {node.live}"


def _mermaid(text: str) -> str:
    """Return `text` for a label in quotes: what Mermaid or HTML would read becomes a number."""
    return "".join(
        letter if letter.isalnum() or letter in " :._-()" else f"#{ord(letter)};" for letter in text
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{"".join(letter if letter.isprintable() else " " for letter in escaped)}"'


def _dashes(node: Node) -> str:
    return "" if node.is_declared else ', style="rounded,dashed"'
