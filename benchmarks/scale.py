"""Pages and operations on a large PostgreSQL: `python -m benchmarks.scale [--rows N] [--keep FOLDER]`.

Every page is asked for through Django's test client, rendered whole, by a superuser. The same is measured on 10,000
rows and on N. Besides the time that passed, the processor time of this process and of the server's is taken, which
others on the machine change less. Operations are measured by `benchmarks.scale_operations`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.servers import postgres_server

BASE = 10_000
RUNS = 7
BY_HAND = 100_000
"""Up to so many transitions are also rolled up as the sweep does, and the sums compared."""
SERVER = ("shared_buffers = '4GB'", "max_wal_size = '8GB'")
"""A server for tables that large has memory for the pages in use, and no checkpoint at every gigabyte of log."""
LIST = "/admin/fsm_storage/fsmrecord/"
STEPS = "&".join(f"step=Order:{name}" for name in ("item", "size", "amount", "address", "phone", "payment"))

PAGES = {
    "list, newest first": "",
    "list, page 20": "?p=20",
    "search: a chat's id": "?q={id}",
    "search: a value in the data of a chat": "?q={id}+cart.item=funghi",
    "search: a phone number in the data": "?q=phone=%2B1555{phone}",
    "filter: state": "?state=Order:payment",
    "filter: group": "?group=Support",
    "filter: no state": "?state=~none",
    "filter: bot": "?bot=42",
    "filter: no change for 7 days": "?idle=7d",
    "filter: expired": "?expires=expired",
    "map, 24 hours": "map/?window=24h",
    "map, 30 days": "map/?window=30d",
    "map, 30 days, one bot": "map/?window=30d&bot=42",
    "map, 30 days, one group": "map/?window=30d&group=Order",
    "funnel, 24 hours": f"funnel/?group=Order&window=24h&{STEPS}",
    "funnel, 30 days": f"funnel/?group=Order&window=30d&{STEPS}",
    "people of a step, 30 days": f"funnel/people/?group=Order&window=30d&{STEPS}&at=3&who=left",
    "funnel as CSV, 30 days": f"funnel/csv/?group=Order&window=30d&{STEPS}",
}


class Measured(NamedTuple):
    """What one size gave: milliseconds (median, worst, processor) of each page, seconds of each task."""

    pages: dict[str, tuple[float, float, float]]
    tasks: dict[str, float]


def main() -> None:
    options = _options()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fsm-scale"))
    with postgres_server(folder, keep=options.keep is not None, settings=SERVER) as host:
        os.environ.update(DJANGO_SETTINGS_MODULE="benchmarks.scale_settings", BENCH_POSTGRES=host)
        import django

        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        from benchmarks import scale_operations

        sizes = [options.rows] if options.again else [BASE, options.rows]
        results = {rows: _measure(rows, gin=options.gin, again=options.again) for rows in sizes}
        scale_operations.make_small(BASE)
        _report(results, scale_operations.measure({"small": BASE, "default": options.rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="records, and transitions (10,000,000)")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the database (default: a new one for this run)"
    )
    parser.add_argument(
        "--gin", action="store_true", help="with the index on the data that docs/admin.md tells of"
    )
    parser.add_argument("--again", action="store_true", help="measure once more what --keep has")
    return parser.parse_args()


def _measure(rows: int, *, gin: bool, again: bool) -> Measured:
    from django.db import connection

    from benchmarks import filling
    from fsm_storage.rollup import Roller

    tasks: dict[str, float] = {}

    def timed(name: str, task: Callable[[], Any]) -> None:
        sys.stderr.write(f"{rows:,} rows: {name}\n")
        began = time.perf_counter()
        task()
        tasks[name] = time.perf_counter() - began

    if not again:
        timed("fill the records", lambda: filling.fill_records(rows))
        timed("fill the transitions", lambda: filling.fill_transitions(rows))
        if rows <= BY_HAND:
            filling.empty_rollups()
            timed("roll up as the sweep does", lambda: sum(Roller("default").roll()))
            kept = filling.rollups()
        timed("roll up in the database", filling.fill_rollups)
        assert rows > BY_HAND or filling.rollups() == kept, "the two ways to roll up differ"
    with connection.cursor() as cursor:
        cursor.execute("DROP INDEX IF EXISTS fsm_storage_record_data")
        if gin:
            statement = (
                "CREATE INDEX fsm_storage_record_data ON fsm_storage_record USING gin (data jsonb_path_ops)"
            )
            timed("index on the data", lambda: cursor.execute(statement))
        cursor.execute("VACUUM ANALYZE")
    pages = _pages(rows)
    return Measured(pages, tasks)


def _pages(rows: int) -> dict[str, tuple[float, float, float]]:
    from django.contrib.auth.models import User
    from django.test import Client

    client, chance = Client(), random.Random(rows)
    client.force_login(User.objects.get_or_create(username="bench", is_superuser=True, is_staff=True)[0])
    found = {}
    for name, url in PAGES.items():
        times, busy = [], 0.0
        for run in range(RUNS + 1):
            number = chance.randrange(1, rows)
            began, at_work = time.perf_counter(), _processor_time()
            response = client.get(LIST + url.format(id=number, phone=f"{number:08}"))
            assert response.status_code == 200, f"{name}: {response.status_code}"
            if run:  # the first one warms the caches up
                times.append(1000 * (time.perf_counter() - began))
                busy += 1000 * (_processor_time() - at_work)
        found[name] = statistics.median(times), max(times), busy / RUNS
        sys.stderr.write(f"  {name}: {found[name][0]:.0f} ms ({found[name][2]:.0f} ms at work)\n")
    return found


def _processor_time() -> float:
    """Return the seconds that this process and its server process have been at work."""
    from django.db import connection

    connection.ensure_connection()
    status = (
        Path(f"/proc/{connection.connection.info.backend_pid}/stat").read_text().rsplit(")", 1)[1].split()
    )
    return time.process_time() + (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")


def _report(results: dict[int, Measured], operations: list[list[str]]) -> None:
    small, (rows, large) = next(iter(results.values())), list(results.items())[-1]
    lines = [f"{name}: {value}" for name, value in machine()]
    lines += ["", f"| | {BASE:,} rows: processor | {rows:,} rows: processor | median | worst of {RUNS} |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, (median, worst, busy) in large.pages.items():
        lines.append(
            f"| {name} | {small.pages[name][2]:.0f} ms | {busy:.0f} ms | {median:.0f} ms | {worst:.0f} ms |"
        )
    lines += ["", f"| operations | {BASE:,} rows | {rows:,} rows | of the time | of the processor time |"]
    lines += ["|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(cells)} |" for cells in operations]
    lines += ["", *(f"{name}: {seconds:,.0f} s" for name, seconds in large.tasks.items())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
