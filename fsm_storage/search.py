"""What people type into the search box: ids, names, and `key=value` of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from django.db.models import Q
from django.utils.text import smart_split, unescape_string_literal
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.models import FSMRecordQuerySet
from fsm_storage.peers import FSMPeer
from fsm_storage.rights import Mask

HELP = gettext_lazy(
    "A chat or user id, the beginning of a name or @username, or key=value inside the data, like cart.item=pizza. "
    "Several with spaces between: all must fit."
)
_LOW, _HIGH = -(2**63), 2**63 - 1
_ID = re.compile(r"[+-]?\d{1,30}", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,300})(?:\.\d{1,100})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_QUOTED = re.compile(r"""\"(?:[^"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'""")
_MAX_DEPTH = 20
MAX_NAMED = 500
"""People and chats whose names begin with a term."""


class SearchError(ValueError):
    """A search that means nothing; the message says what could be typed."""


def search(records: FSMRecordQuerySet, text: str, mask: Mask | None = None) -> FSMRecordQuerySet:
    """Narrow `records` to those that fit every term of `text`. Raises `SearchError`.

    What `mask` hides cannot be searched either, or it could be guessed bit by bit.
    """
    for term in smart_split(text):
        if _ID.fullmatch(term):
            records = records.filter(_has_id(int(term)))
        elif "=" not in term or _QUOTED.fullmatch(term):
            records = records.filter(_is_called(_unquoted(term)))
        else:
            path, values = parse_pair(term)
            if mask and mask.hides(path):
                raise SearchError(
                    _("You have no permission to see the values of %(key)s.") % {"key": ".".join(path)}
                )
            records = records.holding(path, values)
    return records


def _has_id(number: int) -> Q:
    if not _LOW <= number <= _HIGH:
        raise SearchError(_("%(number)d is too big for a chat or user id.") % {"number": number})
    return Q(chat_id=number) | Q(user_id=number)


def _is_called(text: str) -> Q:
    if not text.strip("@ "):
        raise SearchError(_("“%(term)s” is no beginning of a name.") % {"term": text})
    ids = list(FSMPeer.objects.called(text).values_list("peer_id", flat=True)[: MAX_NAMED + 1])
    if len(ids) > MAX_NAMED:
        raise SearchError(
            _("More than %(count)d people and chats are called “%(term)s…”: type more of the name.")
            % {"count": MAX_NAMED, "term": text}
        )
    if not ids:
        raise SearchError(
            _(
                "No name that is known begins with “%(term)s”. Type another, an id, or key=value, like item=pizza."
            )
            % {"term": text}
        )
    return Q(chat_id__in=ids) | Q(user_id__in=ids)


def parse_pair(term: str) -> tuple[list[str], list[Any]]:
    """Return the path and the values that `key=value` can stand for. Raises `SearchError`."""
    name, equals, value = term.partition("=")
    path = _unquoted(name).split(".")
    if not equals or not all(path):
        raise SearchError(
            _("“%(term)s” is neither an id nor key=value: type a number, or for example cart.item=pizza.")
            % {"term": term}
        )
    if len(path) > _MAX_DEPTH:
        raise SearchError(_("A key can be at most %(depth)d levels deep.") % {"depth": _MAX_DEPTH})
    return path, list(_meanings(value))


def _meanings(value: str) -> Iterator[Any]:
    """Yield what `value` can stand for in JSON: always the text; in quotes, only the text."""
    text = _unquoted(value)
    yield text
    if text != value:
        return
    if value in {"true", "false", "null"}:
        yield json.loads(value)
    elif _NUMBER.fullmatch(value):
        number = json.loads(value)
        if number not in (float("inf"), float("-inf")):
            yield number


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] in "\"'" and text[-1] == text[0]:
        return unescape_string_literal(text)
    return text
