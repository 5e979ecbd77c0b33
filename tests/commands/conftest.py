"""Fixtures for the management commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from typing import Any, NamedTuple

import pytest
from django.core.management import CommandError, call_command


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    out: str
    err: str
    code: int

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Said]


@pytest.fixture
def run() -> Run:
    """Run a command as a shell does; its error is the last that it said."""

    def run(*arguments: Any) -> Said:
        out, err = StringIO(), StringIO()
        code = 0
        try:
            call_command(*map(str, arguments), stdout=out, stderr=err)
        except CommandError as error:
            code = error.returncode
            err.write(f"{error}\n")
        return Said(out.getvalue(), err.getvalue(), code)

    return run
