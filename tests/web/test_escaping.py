import pytest

from fsm_storage.models import FSMTransition
from tests.web.conftest import LIST, XSS, form_of, fresh, html_of, page_of

NASTY = [
    XSS,
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{ 7|add:7 }}{% now 'Y' %}",
    "</textarea><script>alert(1)</script>",
    "%s %(x)s {0}",
]


def clean(html):
    return not any(
        text in html
        for text in ("<script>alert", "<img src=x", '"><script', 'href="javascript', "</textarea><")
    )


@pytest.mark.parametrize("text", NASTY)
def test_no_page_renders_what_is_stored_as_markup(admin_client, make_record, text):
    record = make_record(
        state=text,
        data={text: [text, {text: text}]},
        destiny=text,
        business_connection_id=text,
        key=f"k{text}",
    )
    grouped = make_record(state=f"{text}:x")
    FSMTransition.objects.create(
        alias="default",
        key=record.key,
        bot_id=1,
        chat_id=1,
        user_id=1,
        from_state=text,
        to_state=text[:50],
        actor=text,
    )
    pages = [LIST, page_of(record), page_of(grouped), f"{LIST}?q={text}", f"{LIST}?group={text}",
             f"{LIST}?state={text}", f"{LIST}{record.pk}/delete/", "/admin/fsm_storage/fsmtransition/"]  # fmt: skip
    for page in pages:
        response = admin_client.get(page)
        assert response.status_code == 200, page
        assert clean(html_of(response)), page
    response = admin_client.post(page_of(record), form_of(record, other_state=f"{text}2"), follow=True)
    assert clean(html_of(response))
    assert fresh(record).state == f"{text}2"
    assert clean(html_of(admin_client.get(f"{LIST}{record.pk}/history/")))
    assert clean(html_of(admin_client.get("/admin/")))
    for action in ("clear_state", "extend_ttl", "delete_selected"):
        response = admin_client.post(LIST, {"action": action, "_selected_action": [record.pk], "index": 0})
        assert clean(html_of(response))


def test_what_was_typed_wrongly_is_escaped(admin_client, make_record):
    record = make_record(state="Order:item", data={"a": 1})
    wrong = {"data_json": f'{{"a": {XSS}</textarea>}}', "state_ttl_for": XSS, "other_state": XSS, "state": f"={XSS}",
             "data_ttl": XSS}  # fmt: skip
    html = html_of(admin_client.post(page_of(record), form_of(record, **wrong)))
    assert clean(html)
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("path", ["list", "page", "confirm"])
def test_there_is_no_inline_style_or_script_of_ours(admin_client, make_record, path):
    record = make_record(state="Order:item", data={"a": 1})
    if path == "confirm":
        html = html_of(
            admin_client.post(LIST, {"action": "clear_all", "_selected_action": [record.pk], "index": 0})
        )
    else:
        html = html_of(admin_client.get(LIST if path == "list" else page_of(record)))
    body = html.split("<body")[1]
    assert " style=" not in body
    assert "<style" not in html
    assert " onclick=" not in body
    assert all("src=" in tag.split(">")[0] for tag in html.split("<script")[1:])
