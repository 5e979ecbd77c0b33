"""Whose clock a query asks."""

from __future__ import annotations

import re
from pathlib import Path

import fsm_storage

ROOT = Path(fsm_storage.__file__).parent


def test_no_query_asks_for_the_time_of_the_sessions_zone() -> None:
    """Django's `Now` gives it on MariaDB and MySQL; `UtcNow` is for queries. A default is mended by a migration."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(ROOT.rglob("*.py"))
        if "migrations" not in path.parts
        for line in path.read_text().splitlines()
        if re.search(r"(?<![A-Za-z_.])Now\(\)", line) and "db_default=Now()" not in line
    ]
    assert found == []
