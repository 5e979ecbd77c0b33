"""On 5,000 rows the list asks questions that an index answers."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from fsm_storage.admin import changelist
from fsm_storage.models import FSMRecord
from fsm_storage.search import search
from tests.web.conftest import LIST, html_of, messages_of


@pytest.fixture
def many(db):
    FSMRecord.objects.bulk_create(
        FSMRecord(
            alias="default", key=f"42:{number}:{number}", bot_id=42, chat_id=number, user_id=number, destiny="default",
            state=None if number % 3 else f"Order:{number % 9}", version=1,
        )
        for number in range(5000)
    )  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


@pytest.mark.parametrize(
    ("ask", "indexes"),
    [
        (lambda records: records.order_by("-updated_at")[:50], ["updated"]),
        (lambda records: search(records, "77"), ["chat", "user"]),
        (lambda records: search(records, "77 cart.item=pizza"), ["chat", "user"]),
        (lambda records: records.in_state("Order:3"), ["state"]),
        (lambda records: records.expiring(timedelta(hours=1)), ["state_exp", "data_exp"]),
        (lambda records: records.expired(), ["state_exp", "data_exp"]),
    ],
)
def test_an_index_is_used(many, ask, indexes):
    plan = ask(FSMRecord.objects.with_clock()).explain()
    assert [name for name in indexes if f"fsm_storage_record_{name} " not in f"{plan} "] == []


def test_the_states_in_use_are_found_by_stepping_along_the_index(many):
    with CaptureQueriesContext(connection) as queries:
        found = FSMRecord.objects.states_in_use(100)
    assert found == ["Order:0", "Order:3", "Order:6"]
    assert len(queries) == 4
    assert FSMRecord.objects.states_in_use(2) == ["Order:0", "Order:3"]


def test_no_query_of_the_list_reads_all_rows(admin_client, many):
    with CaptureQueriesContext(connection) as queries:
        admin_client.get(LIST)
    statements = [query["sql"] for query in queries if '"fsm_storage_record"' in query["sql"]]
    assert statements
    assert all("LIMIT" in statement for statement in statements)
    assert not any("DISTINCT" in statement for statement in statements)


def test_the_bots_are_looked_up_in_a_bounded_sample(many):
    with CaptureQueriesContext(connection) as queries:
        assert FSMRecord.objects.bots_seen(1000) == [42]
    assert "LIMIT 1000" in queries[0]["sql"]


@pytest.mark.parametrize(
    ("query", "advice"), [("q=cart.item=pizza", "Add a chat"), ("group=Order&expires=never", "fewer")]
)
def test_a_question_that_takes_too_long_is_stopped_with_advice(
    admin_client, many, monkeypatch, query, advice
):
    monkeypatch.setattr(changelist, "SEARCH_SECONDS", 0)
    response = admin_client.get(f"{LIST}?{query}")
    assert response.status_code == 200
    (message,) = messages_of(response)
    assert "was stopped" in message
    assert advice in message
    assert "No conversation fits" not in html_of(response)
    monkeypatch.undo()
    assert "was stopped" not in html_of(admin_client.get(f"{LIST}?{query}"))
