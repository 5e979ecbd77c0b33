"""JSON as people type it: read exactly or refused with line and column; written for reading. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from django.utils.translation import gettext as _

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|-?[A-Za-z]+|-?[0-9][0-9.eE+-]*')
_EXCERPT = 60
_MAX_DIGITS = 4000  # just below what Python itself refuses to turn into an int


class JSONTextError(ValueError):
    """What is wrong with the text, and where: `line` and `column` count from 1, 0 is the whole text."""

    def __init__(self, reason: str, text: str = "", position: int | None = None) -> None:
        self.reason, self.line, self.column, self.excerpt = reason, 0, 0, ""
        message = reason
        if position is not None:
            self.line = text.count("\n", 0, position) + 1
            start = text.rfind("\n", 0, position) + 1
            self.column = position - start + 1
            self.excerpt = _excerpt(text, start, position)
            message = _("Line %(line)d, column %(column)d: %(reason)s") % {
                "line": self.line,
                "column": self.column,
                "reason": reason,
            }
        super().__init__(message)


class _Refused(Exception):
    """Raised inside the decoder, which does not say where it is; `_find_flaw` looks for the place."""


def read_json(text: str) -> Any:
    """Return the value of `text`.

    Raises `JSONTextError`: for wrong syntax, and for what is syntax to Python but would lose
    something or is no JSON: duplicate keys, NaN, numbers beyond all bounds.
    """
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise JSONTextError(_("The text is empty. An empty object is {}."))
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=_short
        )
    except json.JSONDecodeError as error:
        raise JSONTextError(_reason(error), text, error.pos) from error
    except _Refused as error:
        raise _find_flaw(text) from error
    except RecursionError as error:
        raise JSONTextError(_("The data is nested too deep.")) from error


def read_object(text: str) -> dict[str, Any]:
    """Return the object in `text`. Raises `JSONTextError`, also if it is something else."""
    value = read_json(text)
    if not isinstance(value, dict):
        raise JSONTextError(_("Data must be an object, in curly brackets: {…}."), text, _first(text))
    return value


def pretty(value: Any) -> str:
    """Return `value` for people: indented, letters as they are, numbers exact."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def compact(value: Any) -> str:
    """Return `value` in one line, equal for equal values: 1, 1.0 and true stay different."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def short(value: Any, limit: int = 200) -> str:
    """Return `value` in one line, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Refused
    return value


def _refuse(name: str) -> NoReturn:
    raise _Refused(name)


def _finite(literal: str) -> float:
    number = float(literal)
    if number in (float("inf"), float("-inf")):
        raise _Refused(literal)
    return number


def _short(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise _Refused
    return int(literal)


def _find_flaw(text: str) -> JSONTextError:
    """Return the first thing that `read_json` refuses in `text`, whose syntax is right up to there."""
    for position, reason in _flaws(text):
        return JSONTextError(reason, text, position)
    return JSONTextError(_("This is not JSON."))


def _flaws(text: str) -> Iterator[tuple[int, str]]:
    keys: list[set[str] | None] = []  # of the objects that are open, outermost first; None is a list
    waiting: tuple[int, str] | None = None  # a string, which is a key if a colon follows
    for match in _TOKEN.finditer(text):
        piece = match.group()
        if piece == ":" and waiting and keys and keys[-1] is not None:
            position, key = waiting
            if key in keys[-1]:
                yield position, _("The key %(key)s is there twice.") % {"key": key}
            keys[-1].add(key)
        waiting = (match.start(), str(json.loads(piece, strict=False))) if piece[0] == '"' else None
        if piece in "{[":
            keys.append(set() if piece == "{" else None)
        elif piece in "}]" and keys:
            keys.pop()
        elif piece[0] == "-" or piece[0].isalnum():
            reason = _number_flaw(piece)
            if reason:
                yield match.start(), reason


def _number_flaw(piece: str) -> str | None:
    if piece in {"true", "false", "null"}:
        return None
    if piece.lstrip("-").isalpha():
        return _("%(name)s is not JSON.") % {"name": piece}
    if len(piece) > _MAX_DIGITS:
        return _("The number has more than %(limit)d digits.") % {"limit": _MAX_DIGITS}
    if float(piece) in (float("inf"), float("-inf")) and not piece.lstrip("-").isdigit():
        return _("The number %(number)s is too big to be kept exactly.") % {"number": piece}
    return None


def _reason(error: json.JSONDecodeError) -> str:
    """Return the decoder's words, put for people who know no decoder."""
    known = {
        "Expecting value": _("A value is missing, or a text without quotes."),
        "Expecting ',' delimiter": _("A comma or a closing bracket is missing."),
        "Expecting ':' delimiter": _("A colon is missing after the key."),
        "Expecting property name enclosed in double quotes": _("A key in double quotes is missing."),
        "Illegal trailing comma before end of object": _("There is a comma after the last entry."),
        "Illegal trailing comma before end of array": _("There is a comma after the last entry."),
        "Unterminated string starting at": _("A text begins here, and its closing quote is missing."),
        "Invalid control character at": _("A line break or a tab inside a text: write \\n or \\t."),
        "Extra data": _("There is more text after the end of the object."),
    }
    return known.get(error.msg, error.msg)


def _first(text: str) -> int:
    return len(text) - len(text.lstrip())


def _excerpt(text: str, start: int, position: int) -> str:
    """Return the piece of the line around `position`, and a caret below the place."""
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)].replace("\t", " ")
    offset = position - start
    left = max(0, offset - _EXCERPT // 2)
    piece = line[left : left + _EXCERPT]
    return f"{piece}\n{' ' * (offset - left)}^"
