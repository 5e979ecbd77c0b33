import pytest
from django.test import Client

from fsm_storage.models import FSMRecord, FSMTransition
from tests.web.conftest import AGENT, LIST, XSS, form_of, fresh, html_of, page_of

CHANGING = ["move_state", "set_key", "unset_key", "extend_ttl", "clear_state", "clear_all"]
ACTIONS = [*CHANGING, "export_jsonl", "delete_selected"]
TRANSITIONS = "/admin/fsm_storage/fsmtransition/"


@pytest.fixture
def record(make_record):
    return make_record(state="Order:item", data={"a": 1})


def act(client, action, record):
    data = {"action": action, "_selected_action": [record.pk], "post": "yes", "expected": 1, "duration": "2h"}
    return client.post(LIST, data)


def paths(record):
    return [LIST, page_of(record), f"{LIST}add/", f"{LIST}{record.pk}/history/", f"{LIST}{record.pk}/delete/"]


def test_anonymous_is_sent_to_the_login(record):
    client = Client()
    for path in paths(record):
        for response in (client.get(path), client.post(path, form_of(record, state="none"))):
            assert response.status_code == 302
            assert response["Location"].startswith("/admin/login/")
    assert fresh(record).version == record.version


def test_a_user_who_is_no_staff_is_sent_to_the_login(as_user, record):
    client = as_user(*AGENT, is_staff=False)
    for path in paths(record):
        assert client.get(path)["Location"].startswith("/admin/login/")


def test_staff_without_the_permission_is_refused(as_user, record):
    client = as_user()
    for path in paths(record):
        assert client.get(path).status_code == 403
        assert client.post(path, form_of(record, state="none")).status_code == 403
    for action in ACTIONS:
        assert act(client, action, record).status_code == 403
    assert "fsmrecord" not in html_of(client.get("/admin/"))
    assert client.get(TRANSITIONS).status_code == 403
    assert fresh(record).version == record.version


def test_who_may_view_gets_nothing_to_change(as_user, record):
    client = as_user("view_fsmrecord")
    html = html_of(client.get(page_of(record)))
    body = html.split('id="content-main"')[1]
    assert "Order:</span>item" in body
    assert "&quot;a&quot;: &quot;•••&quot;" in body
    for tag in ("<textarea", "<select", '<input type="text"', '<input type="submit"', "_save", "deletelink"):
        assert tag not in body
    listed = html_of(client.get(LIST))
    assert 'name="action"' not in listed
    assert "action-select" not in listed


def test_who_may_view_cannot_post(as_user, record):
    client = as_user("view_fsmrecord")
    assert client.post(page_of(record), form_of(record, state="none")).status_code == 403
    assert client.post(page_of(record), {"data_json": "x" * 3_000_000}).status_code == 403
    for action in ACTIONS:
        response = act(client, action, record)
        assert response.status_code in (200, 302, 403)
        assert not response.streaming
    assert client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"}).status_code == 403
    assert fresh(record).version == record.version


BULK = ["view_fsmrecord", "bulk_fsmrecord"]
DATA = ["view_data_fsmrecord", "change_data_fsmrecord"]


@pytest.mark.parametrize(
    ("permissions", "offered"),
    [
        (["view_fsmrecord"], set()),
        (BULK, set()),
        ([*BULK, "change_state_fsmrecord"], {"move_state", "clear_state", "extend_ttl"}),
        ([*BULK, "change_data_fsmrecord"], set()),
        ([*BULK, *DATA], {"set_key", "unset_key", "extend_ttl"}),
        ([*BULK, *DATA, "change_state_fsmrecord"], {*CHANGING}),
        (["view_fsmrecord", *DATA, "change_state_fsmrecord"], set()),
        (["view_fsmrecord", "export_fsmrecord"], {"export_jsonl"}),
        (["view_fsmrecord", "delete_fsmrecord"], {"delete_selected"}),
    ],
)
def test_actions_are_offered_and_done_only_with_their_permission(as_user, record, permissions, offered):
    client = as_user(*permissions)
    html = html_of(client.get(LIST))
    assert {action for action in ACTIONS if f'<option value="{action}"' in html} == offered
    for action in ACTIONS:
        if action not in offered:
            assert not act(client, action, record).streaming
    assert FSMRecord.objects.get(pk=record.pk).version == record.version


def test_export_alone_opens_no_list(as_user, record):
    client = as_user("export_fsmrecord")
    assert client.get(LIST).status_code == 403
    assert act(client, "export_jsonl", record).status_code == 403


def test_nobody_adds_a_conversation(admin_client, record):
    assert admin_client.get(f"{LIST}add/").status_code == 403
    assert admin_client.post(f"{LIST}add/", {"key": "x"}).status_code == 403
    assert "/add/" not in html_of(admin_client.get(LIST)).split('id="content-main"')[1]


def test_getting_changes_nothing(admin_client, record):
    queries = [
        f"{page_of(record)}?state=none&_save=1&data_json={{}}&version={record.version}",
        f"{LIST}?action=clear_state&_selected_action={record.pk}&post=yes",
        f"{LIST}{record.pk}/delete/?post=yes",
    ]
    for query in queries:
        admin_client.get(query)
        admin_client.head(query)
    assert fresh(record).version == record.version
    assert not FSMTransition.objects.exists()


def test_transitions_can_only_be_read(admin_client, as_user, record):
    step = FSMTransition.objects.create(
        alias="default", key=f"k{XSS}", bot_id=1, chat_id=1, user_id=1, from_state=XSS, to_state="Order:item"
    )
    html = html_of(admin_client.get(TRANSITIONS))
    assert "<script>alert" not in html
    assert "Order:</span>item" in html
    assert admin_client.get(f"{TRANSITIONS}add/").status_code == 403
    assert admin_client.post(f"{TRANSITIONS}{step.pk}/change/", {"to_state": "x"}).status_code == 403
    assert admin_client.post(f"{TRANSITIONS}{step.pk}/delete/", {"post": "yes"}).status_code == 403
    assert admin_client.get(f"{TRANSITIONS}{step.pk}/change/").status_code == 200
    assert as_user("view_fsmrecord").get(TRANSITIONS).status_code == 403
    assert 'name="action"' not in html


def test_transitions_need_the_permission_to_see_conversations_too(as_user, record):
    step = FSMTransition.objects.create(
        alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1, to_state="Order:item", actor="anna"
    )
    pages = [TRANSITIONS, f"{TRANSITIONS}{step.pk}/change/", f"{TRANSITIONS}{step.pk}/history/"]
    alone, both = as_user("view_fsmtransition"), as_user("view_fsmrecord", "view_fsmtransition")
    for page in pages:
        assert alone.get(page).status_code == 403
        assert both.get(page).status_code == 200
    assert "fsmtransition" not in html_of(alone.get("/admin/"))


def test_the_link_to_all_transitions_needs_their_permission(as_user, record):
    FSMTransition.objects.bulk_create(
        FSMTransition(alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1) for _ in range(51)
    )
    assert (
        TRANSITIONS
        not in html_of(as_user("view_fsmrecord").get(page_of(record))).split('id="content-main"')[1]
    )
    allowed = as_user("view_fsmrecord", "view_fsmtransition")
    assert TRANSITIONS in html_of(allowed.get(page_of(record))).split('id="content-main"')[1]
