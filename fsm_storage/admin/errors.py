"""What errors of the storage say to the staff, in their language. The errors themselves are in English, for logs."""

from __future__ import annotations

import re
from typing import Any

from django.db import OperationalError
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.exceptions import (
    CorruptData,
    InvalidData,
    InvalidDataType,
    InvalidState,
    NotEditable,
    RedisUnavailable,
    StorageTimeout,
    StorageUnavailable,
    VersionConflict,
)

# How `keys` and `codec` say what is wrong with a text or a value.
_REASONS = [
    (re.compile(pattern), words)
    for pattern, words in (
        ("contains NUL$", gettext_lazy("contains a NUL character")),
        (
            r"contains a lone surrogate at position (?P<position>\d+)$",
            gettext_lazy("contains half a character at position %(position)s"),
        ),
        (
            r"has (?P<count>\d+) characters, over the limit of (?P<most>\d+)$",
            gettext_lazy("has %(count)s characters, and at most %(most)s fit"),
        ),
        (
            r"takes (?P<count>\d+) characters of JSON, over the limit of (?P<most>\d+)$",
            gettext_lazy("takes %(count)s characters of JSON, and at most %(most)s fit"),
        ),
        (
            r"is nested deeper than (?P<most>\d+) levels",
            gettext_lazy("is nested deeper than %(most)s levels"),
        ),
    )
]


def told(error: Exception) -> str:
    """Return what `error` says; in English what only developers can mend."""
    match error:
        case InvalidState():
            return _("This state cannot be stored: it %(reason)s.") % {"reason": _reason(error.reason)}
        case InvalidData(path="") | InvalidDataType(path=""):
            return _("The data cannot be stored: it %(reason)s.") % {"reason": _reason(error.reason)}
        case InvalidData() | InvalidDataType():
            facts: dict[str, Any] = {"path": error.path, "reason": _reason(error.reason)}
            return _("The data cannot be stored: %(path)s %(reason)s.") % facts
        case CorruptData():
            return _("What is stored for %(key)s cannot be read.") % {"key": error.key}
        case VersionConflict():
            return _("%(key)s changed meanwhile, so nothing was written.") % {"key": error.key}
        case NotEditable():
            facts = {"alias": error.alias, "reason": error.reason}
            return _("Conversations of the storage “%(alias)s” cannot be changed here: %(reason)s.") % facts
        case StorageTimeout():
            return _(
                "The storage did not answer within %(seconds).1f seconds. Look whether the change was made, "
                "and try again. (%(reason)s)"
            ) % {"seconds": error.waited, "reason": error.reason}
        case RedisUnavailable():
            return _("Redis did not take the change; try again later. (%(cause)s)") % {"cause": error}
        case StorageUnavailable() | OperationalError():
            return _("The database did not take the change: %(error)s") % {"error": error}
    return str(error)


def _reason(reason: str) -> str:
    for pattern, words in _REASONS:
        if found := pattern.match(reason):
            return str(words) % found.groupdict()
    return reason
