"""What differs between versions of a record, and how a log entry tells it. No database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from django.utils.translation import gettext as _

from fsm_storage.admin.jsontext import compact, pretty, short

MAX_KEYS_TOLD = 50
_ABSENT = object()


class Difference(NamedTuple):
    """One thing in the version that was opened, the one in the database now, and the one typed."""

    name: str
    opened: str | None
    theirs: str | None
    yours: str | None

    @property
    def by_them(self) -> bool:
        return self.opened != self.theirs

    @property
    def by_you(self) -> bool:
        return self.opened != self.yours

    @property
    def clashes(self) -> bool:
        return self.by_them and self.by_you and self.theirs != self.yours


def data_differences(opened: Any, theirs: Any, yours: Any) -> list[Difference]:
    """Return the keys in which three versions of the data are not all the same.

    None in a difference is a key that is not there. Data that is no object is compared as a whole.
    """
    versions = (opened, theirs, yours)
    if not all(isinstance(version, dict) for version in versions):
        same = len({compact(version) for version in versions}) == 1
        return [] if same else [Difference("", *(pretty(version) for version in versions))]
    found = []
    for key in dict.fromkeys(key for version in versions for key in version):
        values = [version.get(key, _ABSENT) for version in versions]
        texts = [None if value is _ABSENT else compact(value) for value in values]
        if len(set(texts)) > 1:
            found.append(Difference(key, *(None if value is _ABSENT else pretty(value) for value in values)))
    return found


def told_state(old: str | None, new: str | None) -> str:
    """Say in a log entry how the state changed."""
    return _("State: %(old)s → %(new)s") % {"old": _named(old), "new": _named(new)}


def told_data(old: Any, new: Any) -> str:
    """Say in a log entry what changed in the data, key by key, with old and new."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return _("Data: %(old)s → %(new)s") % {"old": short(old), "new": short(new)}
    changes = list(_told_keys(old, new))
    told = "; ".join(changes[:MAX_KEYS_TOLD])
    if len(changes) > MAX_KEYS_TOLD:
        told = _("%(told)s; and %(count)d more") % {"told": told, "count": len(changes) - MAX_KEYS_TOLD}
    return _("Data: %(changes)s") % {"changes": told}


def _told_keys(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            yield _("%(key)s: %(old)s removed") % {"key": key, "old": short(old[key])}
        elif key not in old:
            yield _("%(key)s: %(new)s added") % {"key": key, "new": short(new[key])}
        elif compact(old[key]) != compact(new[key]):
            yield _("%(key)s: %(old)s → %(new)s") % {
                "key": key,
                "old": short(old[key]),
                "new": short(new[key]),
            }


def _named(state: str | None) -> str:
    return _("no state") if state is None else state or '""'
