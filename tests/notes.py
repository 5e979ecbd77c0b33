"""What a process that may be killed says to the test that started it."""

from __future__ import annotations

import os
from collections.abc import Callable


def notes(path: str) -> Callable[[str], None]:
    """Return a function that adds a line to the file in one write, which no kill can cut."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return lambda line: (os.write(file, f"{line}\n".encode()), None)[1]
