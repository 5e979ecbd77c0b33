"""Counts the transitions, each once: into hourly sums and runs of conversations.

Ids of transactions that run side by side are not committed in order, so the mark remembers the ids
that were missing, and looks for them again until no transaction that could bring them is open.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connections, models, transaction
from django.db.models import Q

from fsm_storage.models import FSMTransition, UtcNow
from fsm_storage.tallies import FSMHourlyMove, FSMHourlyPath, FSMRollupMark, FSMRun

UNKNOWN_SPAN = -1
SPAN_GROWTH = 2.0
MAX_ENTRIES = 32
"""A run's path ends here: each further state would be counted with all those before it."""

_COLUMNS = ("id", "alias", "key", "bot_id", "chat_id", "user_id", "from_state", "to_state", "at", "source")
_GAP_LIFE = timedelta(days=1)
_RANGES_AT_ONCE = 100
_KINDS = FSMHourlyMove.Kind

# Transactions below the first number have ended; all from the second on have not begun.
_HORIZON = """
SELECT pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint FROM pg_current_snapshot() s
"""


class Row(NamedTuple):
    """What is counted of a transition."""

    id: int
    alias: str
    key: str
    bot_id: int
    chat_id: int
    user_id: int
    from_state: str | None
    to_state: str | None
    at: datetime
    source: str


class Move(NamedTuple):
    """What a row of `FSMHourlyMove` counts."""

    kind: str
    alias: str
    bot_id: int
    hour: datetime
    from_state: str | None
    to_state: str | None
    span: int


class Path(NamedTuple):
    """What a row of `FSMHourlyPath` counts."""

    alias: str
    bot_id: int
    hour: datetime
    states: tuple[str, ...]


class Gap(NamedTuple):
    """Ids that were missing, and by which horizon they can come no more."""

    first: int
    last: int
    until: float


def hour_of(at: datetime) -> datetime:
    """Return the beginning of the hour, by UTC where times know their zone."""
    return (at if at.tzinfo is None else at.astimezone(UTC)).replace(minute=0, second=0, microsecond=0)


def span_of(time: timedelta) -> int:
    """Return the class of a time: 0 under a second, then a new one whenever it has grown by `SPAN_GROWTH`."""
    seconds = time.total_seconds()
    return 0 if seconds < 1 else 1 + int(math.log(seconds, SPAN_GROWTH))


def number_of(*parts: Any) -> UUID:
    """Return the number of these values: the same in every process, for ever."""
    text = json.dumps(parts, default=datetime.isoformat)
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
    return UUID(bytes=digest, version=5)  # MariaDB refuses a UUID with a version that there is none of


class Count:
    """What some transitions add to the sums, and the runs as they are afterwards. Asks no database."""

    def __init__(self, open_runs: Iterable[FSMRun]) -> None:
        self._open = {(run.alias, run.key): run for run in open_runs}
        self.runs: dict[int, FSMRun] = {}
        self.moves: Counter[Move] = Counter()
        self.paths: Counter[Path] = Counter()

    def add(self, row: Row) -> None:
        """Count a transition; those of one key must come in order."""
        if row.from_state == row.to_state:  # data changed, and the state did not
            return
        run = self._open.get((row.alias, row.key))
        if run is not None and run.state != row.from_state:  # the history was off for a while
            self._end(run, run.moved_at)
            run = None
        span = UNKNOWN_SPAN if run is None else span_of(row.at - run.moved_at)
        is_expiry = row.to_state is None and row.source == FSMTransition.Source.EXPIRY
        kind = _KINDS.EXPIRY.value if is_expiry else _KINDS.MOVE.value
        hour = hour_of(row.at)
        self.moves[Move(kind, row.alias, row.bot_id, hour, row.from_state, row.to_state, span)] += 1
        if row.to_state is None:
            if run is not None:
                self._end(run, row.at)
        else:
            self._enter(run or self._begin(row), row.to_state, row.at)

    def _begin(self, row: Row) -> FSMRun:
        run = FSMRun(
            id=row.id,
            alias=row.alias,
            key=row.key,
            bot_id=row.bot_id,
            chat_id=row.chat_id,
            user_id=row.user_id,
            started_at=row.at,
            entries=[],
        )
        self._open[row.alias, row.key] = run
        return run

    def _end(self, run: FSMRun, at: datetime) -> None:
        run.state, run.moved_at = None, at
        self.runs[run.id] = run
        del self._open[run.alias, run.key]

    def _enter(self, run: FSMRun, state: str, at: datetime) -> None:
        run.state, run.moved_at = state, at
        self.runs[run.id] = run
        before = tuple(entry[0] for entry in run.entries)
        if state in before or len(before) == MAX_ENTRIES:
            return
        hour, since = hour_of(run.started_at), (at - run.started_at).total_seconds()
        for earlier, seconds in run.entries:
            span = span_of(timedelta(seconds=since - seconds))
            self.moves[Move(_KINDS.REACH.value, run.alias, run.bot_id, hour, earlier, state, span)] += 1
        if before:
            self.paths[Path(run.alias, run.bot_id, hour, before)] -= 1
        path = (*before, state)
        self.paths[Path(run.alias, run.bot_id, hour, path)] += 1
        run.entries = [*run.entries, [state, since]]
        run.path = number_of(path)


class Pending:
    """The transitions that follow the mark, and what the mark becomes once they are counted."""

    def __init__(self, mark: FSMRollupMark, using: str, limit: int) -> None:
        # What had ended at the first look is seen by the next statement; what that one did not see
        # had begun at the second look.
        ended, _ = _horizon(using)
        gaps = [Gap(*gap) for gap in mark.gaps]
        late = _within(using, gaps)
        following = _rows(using, Q(id__gt=mark.upto), limit)
        _, begun = _horizon(using)
        self.is_all = len(following) < limit
        self.rows = sorted([*late, *following])
        self.upto = following[-1].id if following else mark.upto
        self.gaps = list(_without([gap for gap in gaps if gap.until > ended], [row.id for row in late]))
        if begun:
            self.gaps += _missing([mark.upto, *(row.id for row in following)], begun)

    def count(self, using: str) -> Count:
        """Count the rows upon the runs that are in the table."""
        aliases, keys = {row.alias for row in self.rows}, {row.key for row in self.rows}
        runs = FSMRun.objects.using(using).filter(state__isnull=False, alias__in=aliases, key__in=keys)
        counted = Count(runs)
        for row in self.rows:
            counted.add(row)
        return counted


Step = Callable[[], tuple[int, bool]]
"""Counts one batch."""


class Roller:
    """Counts what is new, in batches, each a transaction of its own.

    Any number may run at once: one counts, and the others find that it does. A batch that fails is
    counted as a whole the next time.
    """

    def __init__(self, using: str, batch_size: int = 5000) -> None:
        self.using, self.batch_size = using, batch_size

    def roll(self, carry_out: Callable[[Step], tuple[int, bool]] = lambda step: step()) -> Iterator[int]:
        """Count until nothing is left; yield how many transitions each batch had.

        `carry_out(step)` calls `step`, once or again after a fault that may pass, and returns what it returns.
        """
        while True:
            rows, is_all = carry_out(self._step)
            yield rows
            if is_all:
                return

    def _step(self) -> tuple[int, bool]:
        """Count one batch; return how many transitions it had, and whether that was all."""
        features = connections[self.using].features
        marks = FSMRollupMark.objects.using(self.using)
        marks.get_or_create(pk=1)
        with transaction.atomic(self.using):
            # On a database that does not lock rows, this write takes the lock instead.
            if not features.has_select_for_update:
                marks.filter(pk=1).update(rolled_at=UtcNow())
            skips = features.has_select_for_update_skip_locked
            mark = marks.select_for_update(skip_locked=skips).filter(pk=1).first()
            if mark is None:
                return 0, True
            pending = Pending(mark, self.using, self.batch_size)
            self._write(pending.count(self.using))
            marks.filter(pk=1).update(upto=pending.upto, gaps=pending.gaps, rolled_at=UtcNow())
        return len(pending.rows), pending.is_all

    def _write(self, count: Count) -> None:
        self._upsert(FSMRun, list(count.runs.values()), ["state", "moved_at", "path", "entries"])
        moves = [
            FSMHourlyMove(id=number_of(*move), count=added, **move._asdict())
            for move, added in count.moves.items()
        ]
        paths = [
            FSMHourlyPath(id=number_of(*path), path=number_of(path.states), count=added, **path._asdict())
            for path, added in count.paths.items()
            if added
        ]
        self._add(FSMHourlyMove, moves)
        self._add(FSMHourlyPath, paths)

    def _add(self, model: type[Any], rows: Sequence[Any]) -> None:
        """Add counts to those in the table. Nobody else writes there while the mark is locked."""
        found: dict[UUID, int] = {}
        for some in _in_chunks([row.id for row in rows]):
            found.update(model.objects.using(self.using).filter(pk__in=some).values_list("pk", "count"))
        for row in rows:
            row.count += found.get(row.id, 0)
        self._upsert(model, [row for row in rows if row.count], ["count"])
        for some in _in_chunks([row.id for row in rows if not row.count]):
            model.objects.using(self.using).filter(pk__in=some).delete()

    def _upsert(self, model: type[models.Model], rows: Sequence[Any], fields: list[str]) -> None:
        has_target = connections[self.using].features.supports_update_conflicts_with_target
        model._default_manager.using(self.using).bulk_create(
            sorted(rows, key=lambda row: row.pk),
            batch_size=500,
            update_conflicts=True,
            update_fields=fields,
            unique_fields=["id"] if has_target else None,
        )


def _horizon(using: str) -> tuple[float, float]:
    """Return below which number all transactions have ended, and from which on none has begun.

    Where writers take turns no id comes late, and both are 0. Databases that do not tell what is open
    get the time, and a day for a transaction.
    """
    connection = connections[using]
    if not connection.features.has_select_for_update:
        return 0.0, 0.0
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(_HORIZON)
            low, high = cursor.fetchone()
            return low, high
        cursor.execute("SELECT unix_timestamp()")
        now = float(cursor.fetchone()[0])
    return now, now + _GAP_LIFE.total_seconds()


def _rows(using: str, which: Q, limit: int | None = None) -> list[Row]:
    found = FSMTransition.objects.using(using).filter(which).order_by("id")
    return [Row(*values) for values in found.values_list(*_COLUMNS)[:limit]]


def _within(using: str, gaps: Sequence[Gap]) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(gaps), _RANGES_AT_ONCE):
        which = Q()
        for gap in gaps[start : start + _RANGES_AT_ONCE]:
            which |= Q(id__range=(gap.first, gap.last))
        rows += _rows(using, which)
    return rows


def _missing(ids: Sequence[int], until: float) -> list[Gap]:
    return [Gap(before + 1, after - 1, until) for before, after in pairwise(ids) if after > before + 1]


def _without(gaps: Iterable[Gap], found: Sequence[int]) -> Iterator[Gap]:
    for gap in gaps:
        inside = [number for number in found if gap.first <= number <= gap.last]
        yield from _missing([gap.first - 1, *inside, gap.last + 1], gap.until)


def _in_chunks(values: Sequence[UUID], size: int = 500) -> Iterator[Sequence[UUID]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
