"""The house: which room may import which, and what must not come in at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsm_storage

ROOT = Path(fsm_storage.__file__).parent
PURE = {"exceptions", "patches", "keys", "codec", "dialects"}
CORE = {*PURE, "lanes", "backlog", "batching", "outbox", "models", "conf", "signals"}
FIGURES = {"tallies", "rollup", "figures", "layout", "statemap", "picture"}
BELOW_ADMIN = {
    *CORE,
    "peers",
    *FIGURES,
    "backends",
    "lifecycle",
    "discovery",
    "durations",
    "search",
    "graph",
    "rights",
    "transfer",
}

# Each room, and the rooms that it may import. A new room has a line here, or the test fails.
MAY_IMPORT: dict[str, set[str]] = {
    "exceptions": set(),
    "patches": set(),
    "keys": {"exceptions"},
    "codec": {"exceptions", "keys", "patches"},
    "dialects": {"exceptions", "keys", "patches", "codec"},
    "lanes": set(),
    "backlog": {"exceptions", "lanes"},
    "batching": {"exceptions", "lanes", "backlog"},
    "outbox": {"exceptions", "keys"},
    "signals": {"dialects"},
    "conf": {"exceptions"},  # storages are loaded by their dotted paths
    "tallies": {"keys"},
    "peers": {"keys", "rights"},
    "querysets": {"patches", "conf"},
    "models": {"exceptions", "keys", "patches", "conf", "tallies", "peers", "querysets"},
    "rollup": {"models", "tallies"},
    "figures": {"models", "tallies", "rollup", "graph"},
    "layout": set(),
    "statemap": {"models", "discovery", "figures", "graph"},
    "picture": {"discovery", "durations", "layout", "statemap"},
    "discovery": set(),
    "durations": set(),
    "rights": set(),
    "search": {"models", "peers", "rights"},
    "graph": {"models", "discovery"},
    "backends": CORE,
    "leases": {*PURE, "batching"},
    "transfer": {*CORE, "backends"},
    "sources": {"exceptions", "transfer"},
    "isolation": {*CORE, "backends", "leases"},
    "lifecycle": {*CORE, "backends", "leases", "rollup"},
    "mirror": {*CORE, "backends", "leases", "sources"},
    "operations": CORE,
    "chats": {"dialects", "keys"},
    "checks": {*CORE, "backends", "discovery", "rights"},
    "apps": {"checks", "signals", "live"},
    "live": {"rights"},
    "admin": BELOW_ADMIN,
    "management": {*BELOW_ADMIN, "sources", "mirror"},
    "migrations": set(),
    "testing": set(),
    "pytest_plugin": {"backends", "conf"},
    "fsm_storage": {
        "backends",
        "conf",
        "keys",
        "patches",
        "lifecycle",
        "exceptions",
        "isolation",
    },  # the package's own names, loaded lazily
}

# What a room must not know, of the standard library and of others.
MUST_NOT_KNOW: dict[str, set[str]] = {
    "patches": {"django", "aiogram", "asgiref", "asyncio", "threading", "time", "psycopg", "sqlite3"},
    "keys": {"django", "asyncio", "threading", "time"},
    "codec": {"django", "asyncio", "threading", "time"},
    "dialects": {"django", "asgiref", "asyncio", "threading", "time", "psycopg", "sqlite3"},
    "backlog": {"django", "aiogram", "asgiref", "psycopg", "sqlite3"},
    "batching": {"django", "aiogram", "asgiref", "psycopg", "sqlite3"},
    "outbox": {"django", "redis", "asyncio", "threading", "time"},
    "rights": {"aiogram", "asyncio", "asgiref"},
    "querysets": {"asyncio", "threading"},
    "models": {"asyncio", "threading"},
    "layout": {"django", "aiogram", "asyncio", "threading", "time"},
    "testing": {"django", "psycopg"},
}


def room_of(module: str) -> str:
    """`fsm_storage.dialects.sqlite` is in the room `dialects`; `fsm_storage` itself is a room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("fsm_storage", *path.relative_to(ROOT).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported when the program runs, also within functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(ast.Module(body=node.orelse, type_ignores=[]))
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "fsm_storage":
                yield from (f"fsm_storage.{alias.name}" for alias in node.names)
            else:
                yield node.module
        yield from imports(node)


ALL = dict(modules())


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in ALL} <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", ALL)
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    for imported in imports(ast.parse(ALL[module].read_text())):
        if not imported.startswith("fsm_storage"):
            continue
        target = room_of(imported)
        if target != room and target in fsm_storage._HOMES:  # a public name: the arrow goes to its home
            target = room_of(fsm_storage._HOMES[target])
        assert target == room or target in MAY_IMPORT[room], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [module for module in ALL if room_of(module) in MUST_NOT_KNOW])
def test_a_pure_room_stays_pure(module: str) -> None:
    found = {imported.split(".")[0] for imported in imports(ast.parse(ALL[module].read_text()))}
    assert found & MUST_NOT_KNOW[room_of(module)] == set()


def test_the_batcher_knows_no_sql() -> None:
    text = ALL["fsm_storage.batching"].read_text().upper()
    assert [word for word in ("SELECT ", "INSERT ", "UPDATE FSM", "COMMIT;", "BEGIN ") if word in text] == []


def test_the_arrows_have_no_circle() -> None:
    """`models` and `conf` meet lazily, by the alias; all others stand on those below them."""
    order: list[str] = []
    rest = {room: set(targets) for room, targets in MAY_IMPORT.items()}
    while rest:
        free = sorted(room for room, targets in rest.items() if targets <= set(order))
        assert free, f"a circle among {sorted(rest)}"
        order += free
        for room in free:
            del rest[room]


def test_a_forbidden_arrow_would_be_seen() -> None:
    tree = ast.parse(
        "def f():\n    from fsm_storage.backends.django import DjangoStorage\n    import django.db\n"
    )
    assert list(imports(tree)) == ["fsm_storage.backends.django", "django.db"]
    typed = ast.parse("if TYPE_CHECKING:\n    import django\nelse:\n    import asyncio\n")
    assert list(imports(typed)) == ["asyncio"]


@pytest.mark.parametrize("name", ["utils", "helpers", "common"])
def test_no_room_is_called_a_corner(name: str) -> None:
    assert not [module for module in ALL if name in module.split(".")]
