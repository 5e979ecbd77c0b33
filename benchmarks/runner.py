"""Runs cells one at a time, each in a fresh process, and gathers what they measured."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, Places
from benchmarks.plan import Cell
from benchmarks.results import Results
from benchmarks.servers import Tables, bot_api_server, postgres_server, redis_server

_PATIENCE_SECONDS = 60.0


class CellError(Exception):
    """A cell ended without a result; the text says what it met."""


@contextmanager
def places() -> Iterator[Places]:
    """Start the servers, in a directory that goes away with them."""
    with tempfile.TemporaryDirectory(prefix="fsm_bench_") as name:
        directory = Path(name)
        with (
            postgres_server(directory / "postgres") as postgres,
            redis_server() as redis,
            bot_api_server() as bot_api,
        ):
            yield Places(directory / "bench.sqlite3", postgres, redis, bot_api)


class Runner:
    """Measures cells. Each runs in a process forked from a clean one that has done the imports.

    aiogram takes three seconds to import; a process that has only imported holds no threads, no
    connections and no leftovers of another cell.
    """

    def __init__(self, where: Places) -> None:
        self._where = where
        self._tables = Tables(where)
        root = str(Path(__file__).resolve().parent.parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.cells"])

    def migrate(self) -> None:
        self._measure(Cell("migrate", "", 0, 0.0))
        self._tables.keep_template()

    def clean(self, contender: str) -> None:
        """Give a contender empty tables."""
        self._tables.clean(contender)

    def run(self, cells: Sequence[Cell], rounds: int, results: Results) -> None:
        """Run every cell once a round, and say how it goes. A cell that fails is left out from then on."""
        failed: set[Cell] = set()
        for number in range(1, rounds + 1):
            started = time.monotonic()
            for cell in cells:
                if cell in failed:
                    continue
                self._tables.clean(cell.contender)
                _say(f"\rround {number} of {rounds}: {cell!s:<60}")
                try:
                    with self._mirror_of(cell):
                        results.add(cell.kind, cell.contender, cell.chats, self._measure(cell))
                except CellError as error:
                    failed.add(cell)
                    _say(f"\n{cell} failed:\n{error}\n")
            _say(f"\rround {number} of {rounds}: {time.monotonic() - started:.0f} s{'':<60}\n")

    @contextmanager
    def _mirror_of(self, cell: Cell) -> Iterator[None]:
        """Let a mirror run in a process of its own, where the contender's is apart."""
        if CONTENDERS[cell.contender].mirror != "apart":
            yield
            return
        process = self._context.Process(target=_mirror, args=(self._where,), daemon=True)
        process.start()
        try:
            yield
        finally:
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()

    def _measure(self, cell: Cell) -> dict[str, Any]:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(cell, self._where, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(cell.seconds + _PATIENCE_SECONDS):
                raise CellError("no answer in time")
            answer = ours.recv()
            process.join(5)
        except EOFError:
            raise CellError("the process died") from None
        finally:
            if process.is_alive():
                process.kill()
            process.join()
        if isinstance(answer, str):
            raise CellError(answer)
        return answer


def _work(cell: Cell, where: Places, answer: Connection) -> None:
    from benchmarks.cells import work

    work(cell, where, answer)


def _mirror(where: Places) -> None:
    from benchmarks.cells import serve_mirror

    serve_mirror(where)


def _say(text: str) -> None:
    if sys.stderr.isatty() or not text.startswith("\r") or text.endswith("\n"):
        sys.stderr.write(text.lstrip("\r") if not sys.stderr.isatty() else text)
        sys.stderr.flush()
