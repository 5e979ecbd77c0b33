"""What was measured, round by round, and the medians and ratios that are asked of it. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median, the least and the greatest of a number over the rounds."""

    median: float
    low: float
    high: float


class Results:
    """Results by kind, contender and chats; the n-th of each comes from the n-th round."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)

    def add(self, kind: str, contender: str, chats: int, result: dict[str, Any]) -> None:
        self._rounds[kind, contender, chats].append(result)

    def has(self, kind: str, contender: str, chats: int) -> bool:
        return (kind, contender, chats) in self._rounds

    def chats(self, kind: str) -> list[int]:
        return sorted({chats for found, _, chats in self._rounds if found == kind})

    def spread(self, kind: str, contender: str, chats: int, field: str = "rate") -> Spread | None:
        return _spread(result[field] for result in self._rounds.get((kind, contender, chats), []))

    def ratio(self, kind: str, over: tuple[str, int], under: tuple[str, int]) -> Spread | None:
        """The rate of `over` to that of `under`, taken within each round: a slow minute slows both."""
        pairs = zip(self._rounds.get((kind, *over), []), self._rounds.get((kind, *under), []), strict=False)
        return _spread(one["rate"] / max(other["rate"], 1e-9) for one, other in pairs)

    def error_share(self, kind: str, contender: str, chats: int) -> float:
        shares = [result["error_share"] for result in self._rounds.get((kind, contender, chats), [])]
        return statistics.fmean(shares) if shares else 0.0

    def error_names(self, kind: str, contender: str, chats: int) -> list[str]:
        found = self._rounds.get((kind, contender, chats), [])
        return sorted({name for result in found for name in result["errors"]})

    def behind(self, kind: str, contender: str, chats: int) -> float | None:
        """By how many seconds the mirror was behind at the end, at the most; None where there is no mirror."""
        found = self._rounds.get((kind, contender, chats), [])
        return max((result["behind"] for result in found if "behind" in result), default=None)

    def wrong(self, kind: str, contender: str, chats: int) -> int:
        return sum(result["wrong"] for result in self._rounds.get((kind, contender, chats), []))


def _spread(values: Iterable[float]) -> Spread | None:
    numbers = list(values)
    return Spread(statistics.median(numbers), min(numbers), max(numbers)) if numbers else None
