"""What is true of the code as a whole, and can be said without a linter (see `make lint`)."""

from __future__ import annotations

import asyncio
import time
from io import StringIO

import pytest
from django.core.management import call_command

from tests.loop_watch import watched_loop


@pytest.mark.django_db
def test_the_migrations_say_what_the_models_say() -> None:
    call_command("makemigrations", "--check", "--dry-run", stdout=StringIO())


@pytest.mark.django_db
def test_the_example_project_passes_djangos_checks() -> None:
    out = StringIO()
    call_command("check", "--fail-level", "WARNING", "--database", "default", stdout=out, stderr=StringIO())
    assert "no issues" in out.getvalue()


@pytest.mark.loop_gap(10)
async def test_the_watch_sees_a_loop_that_stands_still() -> None:
    for _ in range(5):  # for a machine that is busy just then, it takes something off
        async with watched_loop() as watch:
            await asyncio.sleep(0.05)
            time.sleep(1.0)
        if watch.longest > 0.9:
            return
    pytest.fail(f"it has seen {watch.longest:.3f} s")


@pytest.mark.loop_gap(10)
async def test_the_watch_sees_no_gap_in_a_loop_that_waits() -> None:
    for _ in range(5):  # the machine itself may stand still
        async with watched_loop() as watch:
            await asyncio.sleep(1.0)
        if watch.longest < 0.9:
            return
    pytest.fail(f"it has seen {watch.longest:.3f} s")
