"""What a process that may be killed says to the test that started it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def notes(path: str) -> Callable[[str], None]:
    """Return a function that adds a line to the file in one write, which no kill can cut."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return lambda line: (os.write(file, f"{line}\n".encode()), None)[1]


def meet(path: str, who: str, everybody: Iterable[str]) -> None:
    """Wait, in the process `who`, until each of `everybody` has come here."""
    notes(path)(f"ready {who}")
    deadline = time.monotonic() + 60
    while not all(f"ready {one}\n" in Path(path).read_text() for one in everybody):
        assert time.monotonic() < deadline
        time.sleep(0.01)
