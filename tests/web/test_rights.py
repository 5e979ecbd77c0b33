"""Who sees and changes what: each permission taken away alone, the read-only switch, and the mask."""

import json
from itertools import pairwise

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from fsm_storage.admin.actions import Selection
from fsm_storage.admin.bulk import ACTIONS
from fsm_storage.admin.forms import Changes
from fsm_storage.admin.log import logged, noted
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.rights import HIDDEN, Mask, mask_for, rights_of
from tests.addresses import SECRET, urls_of
from tests.web.conftest import LIST, form_of, fresh, html_of, messages_of, page_of

ALL = [
    "view_fsmrecord", "view_data_fsmrecord", "change_state_fsmrecord", "change_data_fsmrecord", "bulk_fsmrecord",
    "export_fsmrecord", "delete_fsmrecord", "view_fsmtransition",
]  # fmt: skip


@pytest.fixture
def record(make_record, make_user):
    """A conversation whose data has been in every place that shows data."""
    record = make_record(state="Order:item", data={"phone": SECRET, "item": "pizza"})
    FSMTransition.objects.create(
        alias="default", key=record.key, bot_id=1, chat_id=1, user_id=1, to_state="Order:item",
        data_before={"phone": f"old {SECRET}"}, data_after=record.data,
    )  # fmt: skip
    changes = Changes(data={"phone": f"new {SECRET}", "item": "pizza"})
    with logged(make_user(), [(record, noted(record, changes))]):
        record.edit(**changes.as_arguments())
    return fresh(record)


def test_the_walk_finds_the_urls(record):
    urls = urls_of(record)
    assert LIST in urls
    assert page_of(record) in urls
    assert f"{LIST}{record.pk}/history/" in urls
    assert any(url.endswith("/undo/") for url in urls)


def test_every_url_refuses_without_the_view_permission(as_user, record):
    client = as_user(*(name for name in ALL if name != "view_fsmrecord"))
    for url in urls_of(record):
        for response in (
            client.get(url, follow=True),
            client.post(url, form_of(record, state="none"), follow=True),
        ):
            assert response.status_code in (403, 404), url
    assert fresh(record).version == record.version


def run(client, action, record, **arguments):
    """Try to do an action to a record with a selection as the dry run would have signed it."""
    user = client.get("/admin/").context["user"]
    selection = Selection(user.pk, action, None, [record.pk], 1, arguments)
    return client.post(f"{LIST}bulk/", {"token": selection.signed(), "run": "1"}, follow=True)


@pytest.mark.parametrize(
    ("removed", "refused"),
    [
        ("change_state_fsmrecord", {"move_state", "clear_state", "clear_all"}),
        ("change_data_fsmrecord", {"set_key", "unset_key", "clear_all"}),
        ("view_data_fsmrecord", {"set_key", "unset_key", "clear_all"}),
        ("bulk_fsmrecord", set(ACTIONS)),
        ("export_fsmrecord", set()),
        ("delete_fsmrecord", set()),
    ],
)
def test_what_a_missing_permission_forbids_is_not_done(as_user, record, removed, refused):
    client = as_user(*(name for name in ALL if name != removed))
    arguments = {"other_state": "Order:size", "name": "a", "value": "1", "duration": "2h"}
    for action in refused:
        assert run(client, action, record, **arguments).status_code == 403, action
    match removed:
        case "change_state_fsmrecord":
            client.post(page_of(record), form_of(record, state="none", other_state="x", state_ttl_for="2h"))
        case "change_data_fsmrecord" | "view_data_fsmrecord":
            client.post(page_of(record), form_of(record, data_json="{}", data_ttl_for="2h", data_patch="{}"))
        case "export_fsmrecord":
            act = {"action": "export_jsonl", "_selected_action": [record.pk]}
            assert not client.post(LIST, act).streaming
        case "delete_fsmrecord":
            assert client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"}).status_code == 403
            client.post(LIST, {"action": "delete_selected", "_selected_action": [record.pk], "post": "yes"})
    assert fresh(record).version == record.version
    for action in set(ACTIONS) - refused:
        assert run(client, action, record, **arguments).status_code == 200, action


def test_results_and_their_undo_need_the_rights_of_the_action(as_user, record):
    url = run(as_user(*ALL), "set_key", record, name="a", value="1").redirect_chain[-1][0]
    version = fresh(record).version
    for missing in ("view_fsmrecord", "view_data_fsmrecord", "change_data_fsmrecord", "bulk_fsmrecord"):
        client = as_user(*(name for name in ALL if name != missing))
        assert client.get(url).status_code == 403
        assert client.post(url).status_code == 403
        assert client.post(f"{url}undo/").status_code == 403
    assert fresh(record).version == version


def test_nothing_shows_data_without_its_permission(as_user, record):
    client = as_user(*(name for name in ALL if name != "view_data_fsmrecord"))
    for url in urls_of(record):
        assert SECRET not in html_of(client.get(url, follow=True)), url
    for action in ("clear_state", "extend_ttl", "delete_selected"):
        assert SECRET not in html_of(client.post(LIST, {"action": action, "_selected_action": [record.pk]}))
    response = client.post(LIST, {"action": "export_jsonl", "_selected_action": [record.pk]})
    line = json.loads(b"".join(response.streaming_content))
    assert line["data"] == {"phone": HIDDEN, "item": HIDDEN}


def test_with_its_permission_data_is_shown(as_user, record):
    assert SECRET in html_of(as_user(*ALL).get(page_of(record)))


def test_a_conflict_shows_no_data_without_its_permission(as_user, record):
    client = as_user("view_fsmrecord", "change_state_fsmrecord")
    form = form_of(
        record, state="=Order:payment", opened_data='{"phone": "guess"}', data_json='{"phone": "x"}'
    )
    record.edit(state="Order:size", data={"phone": SECRET + "2"})
    response = client.post(page_of(record), form)
    assert response.status_code == 409
    assert SECRET not in html_of(response)
    response = client.post(page_of(record), {**form, "merging": record.version, "choice-state": "yours"})
    assert response.status_code == 302
    assert (fresh(record).state, fresh(record).data) == ("Order:payment", {"phone": SECRET + "2"})


def test_what_is_hidden_cannot_be_searched(as_user, record):
    blind = as_user("view_fsmrecord")
    for term in (f'phone="new {SECRET}"', "item=pizza", "item=nothing"):
        response = blind.get(LIST, {"q": term})
        assert "no permission" in messages_of(response)[0]
        assert response.context["cl"].result_count == 0
    with override_settings(FSM_ADMIN={"MASK": ["phone"]}):
        assert blind.get(LIST, {"q": "item=pizza"}).context["cl"].result_count == 1
        assert "no permission" in messages_of(blind.get(LIST, {"q": f'phone="new {SECRET}"'}))[0]
    sees = as_user("view_fsmrecord", "view_data_fsmrecord")
    assert sees.get(LIST, {"q": "item=pizza"}).context["cl"].result_count == 1


@override_settings(FSM_ADMIN={"MASK": ["phone", "card.*"]})
def test_the_mask_hides_what_it_names_and_no_more(as_user, record):
    html = html_of(as_user("view_fsmrecord").get(page_of(record)))
    assert SECRET not in html
    assert "pizza" in html
    assert "•••" in html


@override_settings(FSM_ADMIN={"READ_ONLY": True})
def test_read_only_leaves_nothing_to_change_for_anybody(admin_client, record):
    body = html_of(admin_client.get(page_of(record))).split('id="content-main"')[1]
    for tag in ("<textarea", "<select", "_save", "deletelink", "_preview"):
        assert tag not in body
    listed = html_of(admin_client.get(LIST))
    assert '<option value="export_jsonl"' in listed
    for action in ACTIONS:
        assert f'<option value="{action}"' not in listed
        assert run(admin_client, action, record, name="a", value="1", duration="2h").status_code == 403
    admin_client.post(LIST, {"action": "delete_selected", "_selected_action": [record.pk], "post": "yes"})
    assert admin_client.post(page_of(record), form_of(record, state="none")).status_code == 403
    assert admin_client.post(f"{LIST}{record.pk}/delete/", {"post": "yes"}).status_code == 403
    assert FSMRecord.objects.get(pk=record.pk).version == record.version


def is_vowel(path):
    return path[-1] in "aeiou"


DATA = {"phone": "1", "client": {"Phone": {"n": 2}, "name": "A"}, "list": [{"phone": 3}, 4], "a": 5}


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (["*"], {"phone": HIDDEN, "client": HIDDEN, "list": HIDDEN, "a": HIDDEN}),
        ([], DATA),
        (
            ["phone"],
            {"phone": HIDDEN, "client": {"Phone": HIDDEN, "name": "A"}, "list": [{"phone": HIDDEN}, 4], "a": 5},
        ),
        (["client.*"], {**DATA, "client": {"Phone": HIDDEN, "name": HIDDEN}}),
        (["PH*", "a"], {"phone": HIDDEN, "client": {"Phone": HIDDEN, "name": "A"}, "list": [{"phone": HIDDEN}, 4],
                        "a": HIDDEN}),
        (is_vowel, {**DATA, "a": HIDDEN}),
        (f"{__name__}.is_vowel", {**DATA, "a": HIDDEN}),
    ],
)  # fmt: skip
def test_patterns_and_functions(make_user, mask, seen):
    with override_settings(FSM_ADMIN={"MASK": mask}):
        mask = mask_for(make_user("view_fsmrecord"))
        assert mask.over(DATA) == seen
        assert mask_for(make_user("view_fsmrecord", "view_data_fsmrecord")).over(DATA) is DATA


@pytest.mark.parametrize("data", [[SECRET], SECRET, None, 5])
def test_data_that_is_no_object_is_hidden_as_a_whole(data):
    assert Mask(lambda path: False).over(data) == HIDDEN


def test_data_nested_too_deep_is_hidden_as_a_whole():
    data = {"a": SECRET}
    for _ in range(5000):
        data = {"b": data}
    assert Mask(lambda path: False).over(data) == HIDDEN


def test_a_search_inside_a_list_or_below_a_hidden_key_is_hidden():
    mask = Mask(lambda path: path in {("people", "phone"), ("card",)})
    assert mask.hides(["people", "0", "phone"])
    assert mask.hides(["card", "number"])
    assert not mask.hides(["people", "0", "name"])
    assert not Mask().hides(["card"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ([], "must be a dict"),
        ({"MASKS": []}, "has 'MASKS'; it takes 'MASK', 'READ_ONLY'"),
        ({"READ_ONLY": "no"}, "must be True or False, not 'no'"),
        ({"LIVE": "ws"}, "must be the path of the websocket, like '/ws/fsm_storage/', or False, not 'ws'"),
        ({"LIVE": True}, "or False, not True"),
        ({"MASK": "phone"}, "'phone' cannot be imported"),
        ({"MASK": [1]}, "must be a list of patterns"),
        ({"MASK": None}, "must be a list of patterns"),
    ],
)
def test_a_wrong_setting_is_a_check_error(setting, words):
    with override_settings(FSM_ADMIN=setting):
        (error,) = run_checks(tags=["fsm_storage"])
    assert (error.id, words in error.msg) == ("fsm_storage.E020", True)


def test_rights_only_grow_with_permissions(make_user):
    """Superset of permissions, superset of rights; nothing at all without `view`."""
    rights = [rights_of(make_user(*ALL[:count])) for count in range(len(ALL) + 1)]
    assert all(one <= other for one, other in pairwise(rights))
    assert not any(rights_of(make_user(*ALL[1:])))
    assert rights_of(make_user("view_fsmrecord", "change_data_fsmrecord")).change is False
