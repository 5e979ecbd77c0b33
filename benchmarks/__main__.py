"""The command line: `python -m benchmarks [--quick] [--only TEXT ...] [--write]`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.machine import is_busy, machine, versions
from benchmarks.plan import WARM_UP_SECONDS, cells_of_a_round
from benchmarks.results import Results
from benchmarks.runner import Runner, places

_DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def main() -> None:
    options = _options()
    cells = cells_of_a_round(quick=options.quick, seconds=options.seconds, only=options.only)
    if not cells:
        raise SystemExit(f"no cell has one of {options.only} in its name")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    results, facts, noisy = Results(), machine(), is_busy()
    if noisy:
        sys.stderr.write("the machine is busy with something else: the numbers will be noisy\n")
    with places() as where:
        software = versions(where)
        runner = Runner(where)
        runner.migrate()
        try:
            runner.run(cells, options.rounds, results)
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped; this is what there is\n")
    sys.stdout.write(report.terminal(results) + "\n")
    if options.write:
        text = report.document(
            results,
            facts,
            software,
            noisy=noisy,
            rounds=options.rounds,
            seconds=options.seconds,
            warm_up=WARM_UP_SECONDS,
        )
        _DOCUMENT.write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, under 20 s, of a few cells")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help='such as redis or "ours-sqlite-off C=64"'
    )
    parser.add_argument("--rounds", type=int, help="how often each cell is measured (7; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="how long each time (1.0; 0.2 with --quick)")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md too")
    options = parser.parse_args()
    if options.write and (options.quick or options.only):
        parser.error("--write wants a full run")
    options.rounds = options.rounds or (1 if options.quick else 7)
    options.seconds = options.seconds or (0.2 if options.quick else 1.0)
    return options


if __name__ == "__main__":
    main()
