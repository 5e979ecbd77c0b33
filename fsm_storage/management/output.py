"""How commands say things to people: tables, progress on a terminal, a question, what is left to scripts."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from django.core.management.base import CommandError, OutputWrapper
from django.utils import timezone

from fsm_storage.durations import in_words
from fsm_storage.exceptions import FSMStorageError

WIDEST = 60


def actor(name: str | None) -> str:
    """Return who is to be named in the history: `name`, or the user of this shell."""
    if name:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container with a number instead of a user
        return "shell"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table. Control characters are escaped: they would act on the terminal."""
    cells = [[_cell(text) for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _cell(text: str) -> str:
    shown = plain(text)
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}…"


def plain(text: str) -> str:
    """Return `text` with what a terminal would obey written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def when(at: datetime | None, now: datetime) -> str:
    """Return an instant as seen from `now`: "in 3 h", "5 min ago", "never"."""
    if at is None:
        return "never"
    return f"in {in_words(at - now)}" if at > now else f"{in_words(now - at)} ago"


def local(at: datetime) -> str:
    return (timezone.localtime(at) if timezone.is_aware(at) else at).strftime("%Y-%m-%d %H:%M:%S")


class Progress:
    """One line on a terminal that is written over and over; nothing where the output goes elsewhere."""

    def __init__(self, stream: OutputWrapper) -> None:
        self._stream, self._width = stream, 0
        self._is_shown = stream.isatty()

    def show(self, text: str) -> None:
        if self._is_shown:
            self._stream.write(text.ljust(self._width), ending="\r")
            self._stream.flush()
            self._width = len(text)

    def end(self) -> None:
        """Take the line away."""
        if self._is_shown and self._width:
            self._stream.write(" " * self._width, ending="\r")
            self._width = 0


@contextmanager
def errors(what: str = "") -> Iterator[None]:
    """Turn the errors of storages into a command's. `what` is said first."""
    try:
        yield
    except FSMStorageError as error:
        raise CommandError(f"{what}{error}") from error


def confirmed(question: str) -> bool:
    """Ask on the terminal. Raises `CommandError` if nobody is there to answer."""
    if not sys.stdin.isatty():
        raise CommandError(f"{question} There is no terminal to ask on: --no-input says yes.", returncode=2)
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
