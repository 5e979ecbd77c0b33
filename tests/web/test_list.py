from datetime import timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from fsm_storage.admin import changelist
from fsm_storage.models import FSMRecord
from tests.web.conftest import LIST, fresh, html_of, messages_of


def found(client, query):
    response = client.get(LIST + query)
    assert response.status_code == 200, (query, response)
    return {record.pk for record in response.context["cl"].result_list}


def test_a_row_says_where_a_conversation_is(agent, make_record):
    make_record(
        state="Order:payment", chat_id=-1001234567890, user_id=55, bot_id=7, thread_id=12, destiny="side",
        state_ttl=timedelta(hours=3, minutes=1), data_ttl=timedelta(hours=3, minutes=1),
    )  # fmt: skip
    html = html_of(agent.get(LIST))
    for text in (
        "-1001234567890",
        ">55<",
        ">7<",
        "topic 12",
        "side",
        "in 3 h",
        "fsm-badge fsm-c4",
        "just now",
    ):
        assert text.replace(">", "</span>", 1) if text[0] == ">" else text in html
    assert "1 conversation" in html


def test_an_expired_state_is_no_state(agent, make_record):
    make_record(state="Order:payment", state_ttl=-timedelta(minutes=5))
    html = html_of(agent.get(LIST))
    assert "expired 5 min ago" in html
    assert "no state" in html
    assert 'title="Order:payment"' not in html


def test_the_list_reads_no_data(agent, make_record):
    make_record(data={"secret": "x" * 50})
    with CaptureQueriesContext(
        connection,
    ) as queries:
        agent.get(LIST)
    assert not [q for q in queries if '"fsm_storage_record"."data"' in q["sql"].split("FROM")[0]]


@pytest.mark.parametrize("rows", [3, 130])
def test_the_number_of_queries_does_not_depend_on_the_rows(
    agent, make_record, rows, django_assert_max_num_queries
):
    for _ in range(rows):
        make_record(state="Order:payment", data={"a": 1})
    with django_assert_max_num_queries(11):
        agent.get(LIST)


def test_the_newest_change_is_first_and_only_that_order_is_offered(agent, make_record):
    old, new = make_record(), make_record()
    FSMRecord.objects.filter(pk=old.pk).update(updated_at=Now() - timedelta(days=1))
    assert [r.pk for r in agent.get(LIST).context["cl"].result_list] == [new.pk, old.pk]
    assert [r.pk for r in agent.get(LIST + "?o=5").context["cl"].result_list] == [old.pk, new.pk]
    for column in (1, 2, 3, 4, 6):
        cl = agent.get(f"{LIST}?o={column}").context["cl"]
        assert "user_id" not in str(cl.queryset.query.order_by)
    html = html_of(agent.get(LIST))
    assert html.count('class="sortable') == 1


@pytest.fixture
def small_bound(monkeypatch):
    monkeypatch.setattr(changelist, "COUNT_LIMIT", 60)
    monkeypatch.setattr("fsm_storage.admin.records.RecordAdmin.list_per_page", 10)


def test_counting_stops_and_paging_goes_on(agent, make_record, small_bound):
    made = {make_record().pk for _ in range(95)}
    html = html_of(agent.get(LIST))
    assert "60+ conversations" in html
    seen, url = set(), LIST
    for _ in range(10):
        cl = agent.get(url).context["cl"]
        seen |= {record.pk for record in cl.result_list}
        url = LIST + (cl.next_page or "")
    assert seen == made
    assert cl.next_page is None
    assert cl.previous_page == "?p=9"
    assert "95 conversations" in html_of(agent.get(LIST + "?p=10"))


def test_a_page_that_does_not_exist_is_no_error(agent, make_record, small_bound):
    [make_record() for _ in range(11)]
    for page in ("99", "0", "-1", "x", "9" * 30):
        assert agent.get(f"{LIST}?p={page}", follow=True).status_code == 200


def test_filter_by_bot(agent, make_record):
    one, other = make_record(bot_id=1), make_record(bot_id=2)
    assert found(agent, "?bot=1") == {one.pk}
    assert found(agent, "?bot=2") == {other.pk}
    assert found(agent, "?bot=3") == set()
    assert "?bot=3" in html_of(agent.get(LIST + "?bot=3"))


def test_filter_by_state_and_group(agent, make_record):
    item = make_record(state="Order:item")
    payment = make_record(state="Order:payment")
    topic = make_record(state="Support:topic")
    odd = make_record(state="Order:old")
    gone = make_record(state="Gone.Deep:x")
    lone = make_record(state="~none")
    empty = make_record(state="")
    expired = make_record(state="Order:item", state_ttl=-timedelta(seconds=1))
    none = make_record(state=None)
    assert found(agent, "?group=Order") == {item.pk, payment.pk, odd.pk}
    assert found(agent, "?group=Gone.Deep") == {gone.pk}
    assert found(agent, "?group=~nogroup") == {lone.pk, empty.pk}
    assert found(agent, "?group=Nothing") == set()
    assert found(agent, "?state=Order:item") == {item.pk}
    assert found(agent, "?state=~none") == {none.pk, expired.pk}
    assert found(agent, "?state=~~~none") == {lone.pk}
    assert found(agent, "?state=~~") == {empty.pk}
    assert found(agent, "?state=~undeclared") == {odd.pk, gone.pk, lone.pk, empty.pk}
    assert found(agent, "?group=Support&state=Order:item") == set()
    assert found(agent, "?group=Support") == {topic.pk}
    html = html_of(agent.get(LIST + "?group=Support"))
    assert "state=Support%3Atopic" in html
    assert "state=Order%3Aitem" not in html


def test_filter_by_expiry(agent, make_record):
    soon = make_record(state="Order:item", state_ttl=timedelta(minutes=30))
    later = make_record(state="Order:item", data={"a": 1}, data_ttl=timedelta(hours=5))
    far = make_record(state="Order:item", state_ttl=timedelta(days=5))
    past = make_record(state="Order:item", state_ttl=-timedelta(minutes=1))
    never = make_record(state="Order:item")
    make_record()  # idle: nothing there that could last for ever
    assert found(agent, "?expires=1h") == {soon.pk}
    assert found(agent, "?expires=24h") == {soon.pk, later.pk}
    assert found(agent, "?expires=expired") == {past.pk}
    assert found(agent, "?expires=never") == {never.pk}
    assert far.pk in found(agent, "")


def test_filter_by_idle_time(agent, make_record):
    old, new = make_record(), make_record()
    FSMRecord.objects.filter(pk=old.pk).update(updated_at=Now() - timedelta(hours=2))
    assert found(agent, "?idle=1h") == {old.pk}
    assert found(agent, "?idle=24h") == set()
    assert found(agent, "?idle=15m") == {old.pk}
    assert fresh(new).pk in found(agent, "")


@pytest.mark.parametrize(
    "query", ["?bot=x", "?bot=" + "9" * 22, "?expires=x", "?idle=x", "?data__x=1", "?nothing=1"]
)
def test_a_made_up_filter_is_refused_without_harm(agent, make_record, query):
    make_record()
    assert agent.get(LIST + query, follow=True).status_code in (200, 400)


@pytest.mark.parametrize(
    ("query", "hits"),
    [
        ("100", "ab"), ("-100500", "c"), ("200", "a"), ("100 200", "a"), ("+100", "ab"),
        ("cart.item=pizza", "a"), ("item=pizza", ""), ("n=5", "ab"), ('n="5"', "b"), ("n=5.0", "a"),
        ("ok=true", "a"), ("ok=false", "b"), ("ok=null", "c"), ("big=9007199254740993", "a"),
        ("big=9007199254740992", ""), ('name="Anna Maria"', "a"), ("100 cart.item=pizza n=5", "a"),
        ("200 cart.item=soup", ""), ("list.1=y", "a"), ("name=", "b"), ("a=b=c", "b"), ("neg=-1.5e3", "a"),
        ("cart.item=piz'za", "b"), ("99", ""),
    ],
)  # fmt: skip
def test_search(agent, make_record, query, hits):
    records = {
        "a": make_record(
            chat_id=100, user_id=200,
            data={"cart": {"item": "pizza"}, "n": 5, "ok": True, "big": 2**53 + 1, "name": "Anna Maria",
                  "list": ["x", "y"], "neg": -1500},
        ),
        "b": make_record(
            chat_id=300, user_id=100,
            data={"cart": {"item": "piz'za"}, "n": "5", "ok": False, "name": "", "a": "b=c"},
        ),
        "c": make_record(chat_id=-100500, user_id=400, data={"ok": None}),
        "d": make_record(chat_id=1, user_id=1, data=[1, 2]),
        "e": make_record(chat_id=2, user_id=2, data={"n": 5}, data_ttl=-timedelta(seconds=1)),
    }  # fmt: skip
    response = agent.get(LIST, {"q": query})
    names = {record.pk: name for name, record in records.items()}
    assert "".join(sorted(names[r.pk] for r in response.context["cl"].result_list)) == hits


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("pizza", "No name that is known begins with"),
        ("=x", "neither an id nor key=value"),
        ("a..b=x", "neither an id nor key=value"),
        ("9" * 25, "too big"),
        (".".join("a" * 30) + "=1", "levels deep"),
        ("<script>alert(1)</script>", "&lt;script&gt;"),
    ],
)
def test_a_search_that_means_nothing_says_what_could_be_typed(agent, make_record, query, words):
    make_record()
    response = agent.get(LIST, {"q": query})
    assert response.status_code == 200
    assert list(response.context["cl"].result_list) == []
    assert len(messages_of(response)) == 1
    assert words in html_of(response)


@pytest.mark.parametrize("query", [
        "a=1e999", "a=NaN", "a=-", "x" * 5000 + "=1", "a=" + "9" * 5000, "a%=1", "a'b=1", 'a"b=1', "$=1", "a[0]=1",
        "'; DROP TABLE x; --=1", "a=\0",
    ])  # fmt: skip
def test_a_strange_search_is_no_error(agent, make_record, query):
    make_record(data={"a": 1})
    assert agent.get(LIST, {"q": query}).status_code == 200


@pytest.mark.parametrize("data", [[1, 2], None, "text", 5, True, {"deep": [[[[[]]]]]}])
def test_data_of_any_shape_is_shown(agent, make_record, data):
    from tests.web.conftest import page_of

    record = make_record(data=data)
    assert agent.get(LIST).status_code == 200
    response = agent.get(page_of(record))
    assert response.status_code == 200
    assert ("is no object" in html_of(response)) == (not isinstance(data, dict))


def test_an_empty_list_says_what_to_do(agent, make_record):
    assert "They appear when somebody writes to the bot" in html_of(agent.get(LIST))
    make_record(state="Order:item")
    assert "fsm-empty" not in html_of(agent.get(LIST))
    assert "take filters away" in html_of(agent.get(f"{LIST}?state=Order:size"))
    assert "take filters away" in html_of(agent.get(f"{LIST}?q=12345678"))
