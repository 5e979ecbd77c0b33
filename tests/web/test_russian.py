"""The admin in Russian: nothing of the app's own is left in English, and numbers go with the right words."""

import gettext
import re
from html import unescape

import pytest

from tests.addresses import urls_of
from tests.unit.test_catalogs import MO, ROOT
from tests.web.conftest import LIST, form_of, html_of, page_of

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _russian(settings):
    settings.LANGUAGE_CODE = "ru"


@pytest.fixture
def record(make_record):
    record = make_record(state="Order:item", data={"item": "pizza"})
    record.edit(state="Order:size", data={"item": "soup"}, source="bot")
    record.refresh_from_db()
    return record


def english():
    """The app's texts that are a sentence or so: short words may well stand in data or in names."""
    with (ROOT / MO).open("rb") as file:
        catalog = vars(gettext.GNUTranslations(file))["_catalog"]
    texts = (key if isinstance(key, str) else key[0] for key in catalog)
    return [text for text in texts if text.count(" ") >= 2 and "%(" not in text and "\x04" not in text]


def test_no_page_has_an_english_text_of_ours(admin_client, record):
    texts = english()
    assert len(texts) > 100
    for url in urls_of(record):
        html = unescape(html_of(admin_client.get(url)))
        assert [text for text in texts if text in html] == [], url


def test_the_words_of_a_page(admin_client, record):
    html = html_of(admin_client.get(page_of(record)))
    for words in ("Как диалог сюда пришёл", "Показать, что изменится", "Срок состояния", "Изменить диалог"):
        assert words in html
    assert re.search(r"<th scope=\"col\">Изменение</th>", html)


def test_a_preview_and_a_mistake(admin_client, record):
    html = html_of(admin_client.post(page_of(record), form_of(record, state="=Order:payment", _preview="1")))
    assert "Что изменит сохранение. Пока ничего не сохранено." in html
    html = html_of(admin_client.post(page_of(record), form_of(record, data_json='{"a": oops}')))
    assert "Строка 1, столбец 7" in html


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "Выбран 1 диалог."),
        (2, "Выбрано 2 диалога."),
        (5, "Выбрано 5 диалогов."),
        (21, "Выбран 21 диалог."),
    ],
)
def test_numbers_go_with_their_words(admin_client, make_record, number, words):
    for _ in range(number):
        make_record(state="Order:item")
    chosen = {"action": "clear_state", "select_across": "1", "_selected_action": ["0"], "index": "0"}
    assert words in html_of(admin_client.post(LIST, chosen))


def test_what_the_storage_refuses_is_told_in_words_of_the_page(admin_client, record):
    form = form_of(record, state="=Order:size", data_json='{"a": "\\u0000"}')
    assert "Эти данные нельзя сохранить: a — символ NUL." in html_of(admin_client.post(page_of(record), form))
    record.refresh_from_db()
    assert record.data == {"item": "soup"}
