"""On tens of thousands of rows, what a page of figures asks is answered by an index, and reads little."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.db import connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from fsm_storage.figures import TAIL_LIMIT, Scope, funnel, runs_with, traffic, window_start
from fsm_storage.models import FSMHourlyMove, FSMRecord, FSMRun, FSMTransition
from fsm_storage.rollup import Roller
from fsm_storage.search import search
from tests.rows import execute

PEOPLE = 4000
STATES = ["Order:item", "Order:size", "Order:payment"]
DATA_INDEX = "CREATE INDEX fsm_storage_record_data ON fsm_storage_record USING gin (data jsonb_path_ops)"


@pytest.fixture
def many(transactional_db: None) -> str:
    """Thirty days of conversations on PostgreSQL, rolled up but for the last few."""
    using = "postgres"
    now, rows = timezone.now(), []
    for number in range(PEOPLE):
        before, at = None, now - timedelta(days=30) * (1 - number / PEOPLE)
        for state in STATES[: 1 + number % 3]:
            rows.append(
                FSMTransition(
                    alias="default",
                    key=f"42:{number}:{number}",
                    bot_id=42,
                    chat_id=number,
                    user_id=number,
                    from_state=before,
                    to_state=state,
                    at=at,
                )
            )
            before, at = state, at + timedelta(seconds=number % 500)
    FSMTransition.objects.using(using).bulk_create(rows[:-100])
    list(Roller(using).roll())
    FSMTransition.objects.using(using).bulk_create(rows[-100:])
    FSMRecord.objects.using(using).bulk_create(
        FSMRecord(
            alias="default",
            key=f"42:{number}:{number}",
            bot_id=42,
            chat_id=number,
            user_id=number,
            destiny="default",
            state=STATES[number % 3] if number % 5 == 0 else None,
            version=1,
            data={"phone": f"+{number}", "n": number},
        )
        for number in range(6000)
    )
    execute(using, "ANALYZE")
    return using


on_postgres = pytest.mark.django_db(transaction=True, databases=["default", "postgres"])


@on_postgres
def test_indexes_are_used(many: str) -> None:
    since = timezone.now() - timedelta(hours=24)
    keys = [f"42:{number}:{number}" for number in range(50)]
    transitions, runs = FSMTransition.objects.using(many), FSMRun.objects.using(many)
    plans = {
        "fsm_storage_transition_pkey": transitions.filter(id__gt=7000).order_by("id")[:50],
        "fsm_storage_run_key": runs.filter(state__isnull=False, alias__in=["default"], key__in=keys),
        "fsm_storage_run_started": runs.filter(started_at__gte=since).order_by("-started_at", "-id")[:50],
        "fsm_storage_run_path": runs.filter(path=uuid4(), started_at__gte=since - timedelta(days=28)),
        "fsm_storage_hourly_move_hour": FSMHourlyMove.objects.using(many)
        .within(since, None)
        .filter(kind__in=["move", "expiry"])
        .summed(),
        "fsm_storage_record_state": FSMRecord.objects.using(many).filter(state=STATES[0])[:101],
    }
    assert {name: query.explain() for name, query in plans.items() if name not in query.explain()} == {}


@on_postgres
@pytest.mark.parametrize("bot", [None, 42])
def test_the_counts_of_the_map_read_no_row(many: str, bot: int | None) -> None:
    """Only the index: with the rows, a count took a hundred times as long on ten million."""
    execute(many, "VACUUM fsm_storage_record")
    with CaptureQueriesContext(connections[many]) as queries:
        assert FSMRecord.objects.using(many).count_in_state(STATES[0], bot, 1000) == (400, 400)
    with connections[many].cursor() as cursor:
        cursor.execute("EXPLAIN " + queries[0]["sql"])
        plan = "\n".join(row[0] for row in cursor.fetchall())
    assert "Index Only Scan using fsm_storage_record_state" in plan, plan


@on_postgres
def test_the_index_on_the_data_finds_a_value(many: str) -> None:
    records = FSMRecord.objects.using(many)
    execute(many, DATA_INDEX)
    execute(many, "ANALYZE fsm_storage_record")
    try:
        found = search(records.with_clock(), "phone=+77")
        assert "fsm_storage_record_data" in found.explain()
        assert [record.chat_id for record in found] == [77]
        assert [record.chat_id for record in search(records, "n=77")] == [77]
    finally:
        execute(many, "DROP INDEX fsm_storage_record_data")


@pytest.mark.parametrize(
    ("data", "text", "is_found"),
    [
        ({"a": {"b": 1}}, "a.b=1", True),
        ({"a": {"b": "1"}}, "a.b=1", True),
        ({"a": {"b": [1]}}, "a.b=1", False),  # contained, and yet another value
        ({"a": ["x", "y"]}, "a.1=y", True),  # a place in a list
        ({"a": None}, "a=null", True),
        ({"b": 1}, "a=null", False),
        ({"a": 1.0}, "a=1", True),
        ({"a": True}, "a=true", True),
    ],
)
def test_what_the_index_answers_is_what_was_asked(
    database: str, data: object, text: str, is_found: bool
) -> None:
    records = FSMRecord.objects.using(database)
    records.create(alias="a", key="1", bot_id=1, chat_id=1, user_id=1, version=1, data=data)
    if database == "mariadb" and (data, text) == (
        {"a": 1.0},
        "a=1",
    ):  # which compares a number by the way it is written
        is_found = False
    assert search(records, text).exists() == is_found


class Router:
    """All is in PostgreSQL."""

    def db_for_read(self, *_: object, **__: object) -> str:
        return "postgres"


@pytest.fixture
def only_postgres(many: str, settings: Any) -> str:
    """Let figures be read from PostgreSQL, by a router."""
    settings.DATABASE_ROUTERS = [Router()]
    return many


@on_postgres
def test_the_figures_read_no_transition_that_is_rolled_up(only_postgres: str) -> None:
    scope = Scope(window_start(timedelta(days=30)))
    with CaptureQueriesContext(connections[only_postgres]) as queries:
        moved = traffic(scope)
        found = funnel(STATES, scope)
        people = runs_with(found.depths, scope, 100)
    of_transitions = [query["sql"] for query in queries if 'FROM "fsm_storage_transition"' in query["sql"]]
    assert of_transitions
    assert all(re.search(r'"id" > \d+', sql) and f"LIMIT {TAIL_LIMIT}" in sql for sql in of_transitions)
    assert len(queries) < 40
    # And all are counted: those in the sums, and those that came since.
    assert sum(edge.moves for edge in moved.edges) == FSMTransition.objects.count()
    assert found.steps[0].reached == PEOPLE - _before(scope)
    assert len(people) == 100


def _before(scope: Scope) -> int:
    return FSMTransition.objects.filter(from_state__isnull=True, at__lt=scope.since).count()
