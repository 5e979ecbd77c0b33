"""Traffic between states, and funnels: sums of the roll-ups, and what came since. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple, TypeVar
from uuid import UUID

from django.db.models import Q, Sum
from django.utils import timezone

from fsm_storage.graph import Edge
from fsm_storage.models import FSMTransition
from fsm_storage.rollup import SPAN_GROWTH, UNKNOWN_SPAN, Count, Pending, hour_of, number_of
from fsm_storage.tallies import FSMHourlyMove, FSMHourlyPath, FSMRollupMark, FSMRun

WINDOWS = {
    "1h": timedelta(hours=1),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
}
TAIL_LIMIT = 3000
"""As many transitions are counted for a page; if more wait for the sweep, the page says since when."""

_ATTEMPTS = 3
_KINDS = FSMHourlyMove.Kind

T = TypeVar("T")


class Scope(NamedTuple):
    """What figures are about: since when, and of which bot; None stands for all."""

    since: datetime
    bot: int | None = None


class Freshness(NamedTuple):
    """Whether all that was committed is in the figures; if not, what came after `rolled_at` is missing."""

    is_complete: bool
    rolled_at: datetime | None


class Traffic(NamedTuple):
    """How often each way was taken, in parts to be added up; how long conversations stayed, by classes of time."""

    edges: list[Edge]
    stays: dict[str, Counter[int]]
    freshness: Freshness


class Step(NamedTuple):
    """A step of a funnel: how many came so far, and by classes of time how long after the step before."""

    state: str
    reached: int
    spans: Counter[int]


class Funnel(NamedTuple):
    """The steps, and which paths of conversations came how far."""

    steps: list[Step]
    depths: dict[UUID, int]
    freshness: Freshness


def window_start(window: timedelta, now: datetime | None = None) -> datetime:
    """Return the full hour at or before the beginning of `window`: hours are counted whole."""
    return hour_of((now or timezone.now()) - window)


def median(spans: Mapping[int, int]) -> timedelta | None:
    """Return the middle time: its class is exact, where within it is an estimate."""
    known = {span: count for span, count in spans.items() if span != UNKNOWN_SPAN and count > 0}
    middle = sum(known.values()) / 2
    for span, count in sorted(known.items()):
        if middle <= count:
            part = middle / count
            return timedelta(seconds=part if span == 0 else SPAN_GROWTH ** (span - 1 + part))
        middle -= count
    return None


def traffic(scope: Scope) -> Traffic:
    """Count the moves of a window."""

    def read(pending: Count | None) -> tuple[list[Edge], dict[str, Counter[int]]]:
        edges: list[Edge] = []
        stays: dict[str, Counter[int]] = {}
        kinds = [_KINDS.MOVE, _KINDS.EXPIRY]
        summed = FSMHourlyMove.objects.within(*scope).filter(kind__in=kinds).summed()
        for kind, source, target, span, count in [*summed, *_pending_moves(pending, scope, kinds)]:
            edges.append(Edge(source, target, count, count if kind == _KINDS.EXPIRY else 0))
            if source is not None:
                stays.setdefault(source, Counter())[span] += count
        return edges, stays

    (edges, stays), freshness = _with_what_came_since(read)
    return Traffic(edges, stays, freshness)


def funnel(states: Sequence[str], scope: Scope, *, has_times: bool = True) -> Funnel:
    """Count how many of the conversations that began in a window first came into these states in this order.

    Without `has_times`, there are no times between the steps.
    """

    def read(pending: Count | None) -> tuple[list[int], dict[UUID, int], dict[tuple[str, str], Counter[int]]]:
        reached, depths = [0] * len(states), {}
        for path, found, count in _paths(scope, pending):
            depths[path] = depth = depth_of(found, states)
            for step in range(depth):
                reached[step] += count
        return reached, depths, _spans(states if has_times else [], scope, pending)

    (reached, depths, spans), freshness = _with_what_came_since(read)
    pairs = zip([None, *states], states, strict=False)
    steps = [
        Step(state, count, Counter() if before is None else spans.get((before, state), Counter()))
        for (before, state), count in zip(pairs, reached, strict=True)
    ]
    return Funnel(steps, depths, freshness)


def depth_of(path: Iterable[str], states: Sequence[str]) -> int:
    """Return how many of `states` a path has in their order, from the first one on."""
    places = {state: place for place, state in enumerate(path)}
    depth, last = 0, -1
    for state in states:
        if places.get(state, -1) <= last:
            break
        depth, last = depth + 1, places[state]
    return depth


def runs_with(
    paths: Iterable[UUID], scope: Scope, limit: int, before: tuple[datetime, int] | None = None
) -> list[FSMRun]:
    """Return the last `limit` conversations that began in a window and went one of `paths`."""
    found = FSMRun.objects.filter(path__in=list(paths), started_at__gte=scope.since)
    if scope.bot is not None:
        found = found.filter(bot_id=scope.bot)
    if before is not None:
        at, number = before
        found = found.filter(Q(started_at__lt=at) | Q(started_at=at, id__lt=number))

    def read(pending: Count | None) -> list[FSMRun]:
        newer = pending.runs if pending else {}
        rows = [
            *_of_paths(newer.values(), set(paths), scope, before),
            *found.exclude(pk__in=newer).order_by("-started_at", "-id")[:limit],
        ]
        return sorted(rows, key=lambda run: (run.started_at, run.pk), reverse=True)[:limit]

    return _with_what_came_since(read)[0]


def _with_what_came_since(read: Callable[[Count | None], T]) -> tuple[T, Freshness]:
    """Return what `read` makes of the sums and of the transitions after the mark, as of one moment.

    A sweep that moves the mark meanwhile would have some counted twice; then it is read again.
    """
    using = FSMTransition.objects.db
    for _ in range(_ATTEMPTS):
        mark = _mark(using)
        pending = Pending(mark, using, TAIL_LIMIT)
        result = read(pending.count(using) if pending.is_all else None)
        now = _mark(using)
        if (now.upto, now.gaps) == (mark.upto, mark.gaps):
            return result, Freshness(pending.is_all, mark.rolled_at)
    return read(None), Freshness(False, now.rolled_at)


def _mark(using: str) -> FSMRollupMark:
    return FSMRollupMark.objects.using(using).filter(pk=1).first() or FSMRollupMark()


def _pending_moves(
    pending: Count | None, scope: Scope, kinds: Iterable[str]
) -> list[tuple[str, str | None, str | None, int, int]]:
    return [
        (move.kind, move.from_state, move.to_state, move.span, count)
        for move, count in (pending.moves.items() if pending else ())
        if move.kind in kinds and _is_within(move.hour, move.bot_id, scope)
    ]


def _paths(scope: Scope, pending: Count | None) -> list[tuple[UUID, list[str], int]]:
    summed = FSMHourlyPath.objects.filter(hour__gte=scope.since)
    if scope.bot is not None:
        summed = summed.filter(bot_id=scope.bot)
    found = [*summed.order_by().values_list("path", "states").annotate(total=Sum("count"))]
    for path, count in pending.paths.items() if pending else ():
        if _is_within(path.hour, path.bot_id, scope):
            found.append((number_of(path.states), list(path.states), count))
    return found


def _spans(states: Sequence[str], scope: Scope, pending: Count | None) -> dict[tuple[str, str], Counter[int]]:
    pairs = {pair: Counter[int]() for pair in pairwise(states)}
    if not pairs:
        return {}
    which = FSMHourlyMove.objects.within(*scope).filter(kind=_KINDS.REACH, from_state__in=states)
    for _, source, target, span, count in [*which.summed(), *_pending_moves(pending, scope, [_KINDS.REACH])]:
        if source is not None and target is not None and (source, target) in pairs:
            pairs[source, target][span] += count
    return pairs


def _of_paths(
    runs: Iterable[FSMRun], paths: set[UUID], scope: Scope, before: tuple[datetime, int] | None
) -> list[FSMRun]:
    return [
        run
        for run in runs
        if run.path in paths
        and run.started_at >= scope.since
        and scope.bot in (None, run.bot_id)
        and (before is None or (run.started_at, run.pk) < before)
    ]


def _is_within(hour: datetime, bot: int, scope: Scope) -> bool:
    return hour >= scope.since and scope.bot in (None, bot)
