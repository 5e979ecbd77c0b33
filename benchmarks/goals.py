"""The rows of DESIGN section 10 that this package measures: what must be, what should be, what is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.contenders import BASE
from benchmarks.results import Results, Spread


@dataclass(frozen=True)
class Goal:
    """One promise about speed. `at_most`: smaller is better."""

    title: str
    must: float
    goal: float
    unit: str
    measure: Callable[[Results], Spread | None]
    at_most: bool = False

    def bound(self, value: float) -> str:
        return f"{'≤' if self.at_most else '≥'} {value:g}×"

    def verdict(self, measured: float) -> str:
        if self._reaches(measured, self.goal):
            return "goal"
        return "must" if self._reaches(measured, self.must) else "NO"

    def _reaches(self, measured: float, bound: float) -> bool:
        return measured <= bound if self.at_most else measured >= bound


def _to_redis(contender: str, chats: int) -> Callable[[Results], Spread | None]:
    return lambda results: results.ratio("handler", (contender, chats), (BASE, chats))


def _flat(contender: str) -> Callable[[Results], Spread | None]:
    return lambda results: results.ratio("handler", (contender, 512), (contender, 64))


def _statement(contender: str, field: str) -> Callable[[Results], Spread | None]:
    return lambda results: results.spread("statement", contender, 1, field)


def _dispatcher(contender: str, kind: str = "dispatcher") -> Callable[[Results], Spread | None]:
    return lambda results: results.ratio(kind, (contender, 64), ("memory", 64))


def _locks(contender: str) -> Callable[[Results], Spread | None]:
    return lambda results: results.ratio("lock", (contender, 64), (BASE, 64))


_REDIS = "aiogram RedisStorage"
_LOCKS = "aiogram RedisEventIsolation"
_C64 = "its own C=64"
_BARE = "the bare statement"
_MEMORY = "MemoryStorage's updates/s"
_DATABASES = (("SQLite", "ours-sqlite"), ("PostgreSQL", "ours-postgres"))

GOALS = [
    Goal("SQLite, C=64, history off", 4, 6, _REDIS, _to_redis("ours-sqlite-off", 64)),
    Goal("SQLite, C=64, history states", 2.5, 4, _REDIS, _to_redis("ours-sqlite-states", 64)),
    Goal("PostgreSQL, C=64, history off", 2, 3, _REDIS, _to_redis("ours-postgres-off", 64)),
    Goal("PostgreSQL, C=64, history states", 1.5, 2.5, _REDIS, _to_redis("ours-postgres-states", 64)),
    Goal("SQLite, C=512, history off", 0.75, 0.95, _C64, _flat("ours-sqlite-off")),
    Goal("SQLite, C=512, history states", 0.75, 0.95, _C64, _flat("ours-sqlite-states")),
    Goal("PostgreSQL, C=512, history off", 0.75, 0.95, _C64, _flat("ours-postgres-off")),
    Goal("PostgreSQL, C=512, history states", 0.75, 0.95, _C64, _flat("ours-postgres-states")),
    Goal("SQLite, C=1, history off", 0.9, 1.2, _REDIS, _to_redis("ours-sqlite-off", 1)),
    Goal("SQLite, C=1, history states", 0.9, 1.2, _REDIS, _to_redis("ours-sqlite-states", 1)),
    Goal(
        "PostgreSQL, C=1, get_state",
        2.5,
        1.5,
        _BARE,
        _statement("ours-postgres-states", "get_ratio"),
        at_most=True,
    ),
    Goal(
        "PostgreSQL, C=1, set_state, history off",
        1.5,
        1.2,
        _BARE,
        _statement("ours-postgres-off", "set_ratio"),
        at_most=True,
    ),
    Goal(
        "PostgreSQL, C=1, set_state, history states",
        1.5,
        1.2,
        _BARE,
        _statement("ours-postgres-states", "set_ratio"),
        at_most=True,
    ),
    Goal("Redis, C=1, no mirror", 0.95, 1.2, _REDIS, _to_redis("ours-redis-alone", 1)),
    Goal("Redis, C=1, mirror in another process", 0.95, 1, _REDIS, _to_redis("ours-redis-apart", 1)),
    Goal("Redis, C=1, mirror in the bot", 0.95, 1, _REDIS, _to_redis("ours-redis-mirrored", 1)),
    Goal("Redis, C=64, no mirror", 4, 5, _REDIS, _to_redis("ours-redis-alone", 64)),
    Goal("Redis, C=64, mirror in another process", 2.5, 3.5, _REDIS, _to_redis("ours-redis-apart", 64)),
    Goal("Redis, C=64, mirror in the bot", 2.5, 3.5, _REDIS, _to_redis("ours-redis-mirrored", 64)),
    Goal("Redis, C=512, no mirror", 6, 7, _REDIS, _to_redis("ours-redis-alone", 512)),
    Goal("Redis, C=512, mirror in another process", 4, 5, _REDIS, _to_redis("ours-redis-apart", 512)),
    Goal("Redis, C=512, mirror in the bot", 4, 5, _REDIS, _to_redis("ours-redis-mirrored", 512)),
    *(
        Goal(
            f"a Dispatcher, C=64, {name}, history {history}",
            0.9,
            0.97,
            _MEMORY,
            _dispatcher(f"{ours}-{history}"),
        )
        for name, ours in _DATABASES
        for history in ("off", "states")
    ),
    *(
        Goal(
            f"a Dispatcher whose handlers answer, C=64, {name}, history states",
            0.9,
            0.97,
            _MEMORY,
            _dispatcher(f"{ours}-states", "answering"),
        )
        for name, ours in _DATABASES
    ),
    Goal("lock and unlock, C=64, Redis", 1, 3, _LOCKS, _locks("ours-redis-alone")),
    Goal("lock and unlock, C=64, SQLite", 1, 3, _LOCKS, _locks("ours-sqlite-states")),
    Goal("lock and unlock, C=64, PostgreSQL", 1, 3, _LOCKS, _locks("ours-postgres-states")),
]
