"""The tables, for the terminal and for docs/benchmarks.md. What they say is in `results` and `goals`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from benchmarks.contenders import BASE, CONTENDERS
from benchmarks.goals import GOALS
from benchmarks.results import Results, Spread

Row = Sequence[str]
Facts = Sequence[tuple[str, str]]

_GOAL_HEADER = ("this package", "beside", "must", "goal", "measured", "reached")
_HANDLER_HEADER = ("Storage", "operations/s", "least–greatest", "to RedisStorage", "CPU µs/op", "remarks")
_STATEMENT_HEADER = ("", "get, µs", "bare get, µs", "set, µs", "bare set, µs")
_DISPATCHER_HEADER = ("Storage", "C", "updates/s", "least–greatest", "to MemoryStorage", "CPU µs/update")
_LOCK_HEADER = ("Isolation", "C", "locks/s", "least–greatest", "to RedisEventIsolation", "CPU µs/lock")
_STATEMENT_FIELDS = ("get_us", "bare_get_us", "set_us", "bare_set_us")

_ISOLATIONS = {
    "redis": "aiogram RedisEventIsolation",
    "ours-redis-alone": "DjangoEventIsolation, Redis",
    "ours-sqlite-states": "DjangoEventIsolation, SQLite",
    "ours-postgres-states": "DjangoEventIsolation, PostgreSQL",
}

_METHOD = Path(__file__).with_name("method.md")


def terminal(results: Results) -> str:
    """Return all tables as plain text."""
    return "\n\n".join(f"{title}\n\n{_aligned(header, rows)}" for title, header, rows in _tables(results))


def document(
    results: Results,
    machine: Facts,
    versions: Facts,
    *,
    noisy: bool,
    rounds: int,
    seconds: float,
    warm_up: float,
) -> str:
    """Return docs/benchmarks.md."""
    made = f"Made by `make bench` (`python -m benchmarks --write`) on {date.today():%-d %B %Y}."
    if noisy:
        made += " **The machine was busy with other work when it began: these numbers are noisy.**"
    method = _METHOD.read_text(encoding="utf-8").format(rounds=rounds, seconds=seconds, warm_up=warm_up)
    parts = [
        "# Benchmarks",
        made,
        *(f"## {title}\n\n{_markdown(header, rows)}" for title, header, rows in _tables(results)),
        "## How it was measured",
        method.strip(),
        "The contenders:",
        "\n".join(f"- {contender.title}: {contender.note}" for contender in CONTENDERS.values()),
        "## Where",
        _markdown(("", ""), machine),
        _markdown(("", "Version"), versions),
    ]
    return "\n\n".join(parts) + "\n"


def _tables(results: Results) -> Iterator[tuple[str, Row, list[Row]]]:
    """Yield title, header and rows of each table that has any."""
    tables = [
        ("What it must reach", _GOAL_HEADER, _goal_rows(results)),
        *_handler_tables(results),
        ("One chat on PostgreSQL, beside the bare statement", _STATEMENT_HEADER, _statement_rows(results)),
        ("A Dispatcher with handlers", _DISPATCHER_HEADER, _dispatcher_rows(results, "dispatcher")),
        (
            "A Dispatcher whose handlers answer",
            _DISPATCHER_HEADER,
            _dispatcher_rows(results, "answering"),
        ),
        ("Lock and unlock, each time another key", _LOCK_HEADER, _lock_rows(results, "lock")),
        ("Lock and unlock, 8 keys in turn", _LOCK_HEADER, _lock_rows(results, "shared-lock")),
    ]
    return (table for table in tables if table[2])


def _goal_rows(results: Results) -> list[Row]:
    rows = []
    for goal in GOALS:
        measured = goal.measure(results)
        if measured:
            bounds = goal.bound(goal.must), goal.bound(goal.goal)
            rows.append((goal.title, goal.unit, *bounds, _ratio(measured), goal.verdict(measured.median)))
    return rows


def _handler_tables(results: Results) -> Iterator[tuple[str, Row, list[Row]]]:
    for chats in results.chats("handler"):
        what = "one chat" if chats == 1 else f"{chats} chats at a time"
        yield f"A handler's work, {what}", _HANDLER_HEADER, list(_handler_rows(results, chats))


def _handler_rows(results: Results, chats: int) -> Iterator[Row]:
    for name, contender in CONTENDERS.items():
        rate = results.spread("handler", name, chats)
        cost = results.spread("handler", name, chats, "cpu_us")
        if rate and cost:
            ratio = results.ratio("handler", (name, chats), (BASE, chats))
            remarks = _remarks(results, name, chats)
            yield contender.title, *_rate(rate), _ratio(ratio), f"{cost.median:.0f}", remarks


def _remarks(results: Results, name: str, chats: int) -> str:
    remarks = []
    share = results.error_share("handler", name, chats)
    if results.error_names("handler", name, chats):
        names = ", ".join(results.error_names("handler", name, chats))
        remarks.append(f"{share:.1%} failed ({names})")
    wrong = results.wrong("handler", name, chats)
    if wrong:
        remarks.append(f"{wrong} wrong answers")
    behind = results.behind("handler", name, chats)
    if behind is not None:
        remarks.append(f"in the end, the mirror was up to {behind:.1f} s behind")
    return "; ".join(remarks)


def _statement_rows(results: Results) -> list[Row]:
    rows = []
    for name, contender in CONTENDERS.items():
        fields = [results.spread("statement", name, 1, field) for field in _STATEMENT_FIELDS]
        if all(fields):
            rows.append((contender.title, *(f"{field.median:.0f}" for field in fields if field)))
    return rows


def _dispatcher_rows(results: Results, kind: str) -> list[Row]:
    rows = []
    for chats in results.chats(kind):
        for name, contender in CONTENDERS.items():
            rate = results.spread(kind, name, chats)
            cost = results.spread(kind, name, chats, "cpu_us")
            if rate and cost:
                ratio = results.ratio(kind, (name, chats), ("memory", chats))
                rows.append((contender.title, str(chats), *_rate(rate), _ratio(ratio), f"{cost.median:.0f}"))
    return rows


def _lock_rows(results: Results, kind: str) -> list[Row]:
    rows = []
    for chats in results.chats(kind):
        for name, title in _ISOLATIONS.items():
            rate = results.spread(kind, name, chats)
            cost = results.spread(kind, name, chats, "cpu_us")
            if rate and cost:
                ratio = results.ratio(kind, (name, chats), (BASE, chats))
                rows.append((title, str(chats), *_rate(rate), _ratio(ratio), f"{cost.median:.0f}"))
    return rows


def _rate(rate: Spread) -> tuple[str, str]:
    return f"{rate.median:,.0f}", f"{rate.low:,.0f}–{rate.high:,.0f}"


def _ratio(ratio: Spread | None) -> str:
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else ""


def _markdown(header: Row, rows: Sequence[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(header: Row, rows: Sequence[Row]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
