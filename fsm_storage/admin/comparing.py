"""What differs between versions of a record, and what becomes of two changes together. No database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fsm_storage.admin.jsontext import compact, pretty
from fsm_storage.patches import KEEP, Keep
from fsm_storage.rights import Mask

_ABSENT = object()


class Change(NamedTuple):
    """One key of the data, before and after; None is a key that is not there. No name: the data as a whole."""

    name: str
    old: str | None
    new: str | None


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

    @property
    def field(self) -> str:
        """The name under which a form asks which side shall win."""
        return f"choice:{self.name}"


def data_changes(old: Any, new: Any, mask: Mask | None = None) -> list[Change]:
    """Return the keys whose values differ, as `mask` lets them be seen."""
    mask = mask or Mask()
    if not isinstance(old, dict) or not isinstance(new, dict):
        same = compact(old) == compact(new)
        return [] if same else [Change("", pretty(mask.over(old)), pretty(mask.over(new)))]
    return [
        Change(
            key,
            *(
                pretty(mask.over({key: version[key]})[key]) if key in version else None
                for version in (old, new)
            ),
        )
        for key in _unlike(old, new)
    ]


def data_differences(opened: Any, theirs: Any, yours: Any) -> list[Difference]:
    """Return the keys in which three versions of the data are not all the same.

    None in a difference is a key that is not there. Data that is no object is compared as a whole.
    """
    versions = (opened, theirs, yours)
    if not all(isinstance(version, dict) for version in versions):
        same = len({compact(version) for version in versions}) == 1
        return [] if same else [Difference("", *(pretty(version) for version in versions))]
    return [
        Difference(key, *(pretty(version[key]) if key in version else None for version in versions))
        for key in _unlike(*versions)
    ]


def merged_data(opened: Any, theirs: Any, yours: Any, choices: Mapping[str, str]) -> dict[str, Any] | Keep:
    """Return `theirs` with what you changed laid over it; `KEEP` if that changes nothing.

    Where both sides changed the same, `choices` says by the difference's field which one wins: "yours", or theirs.
    """
    winning = [
        one
        for one in data_differences(opened, theirs, yours)
        if one.by_you and one.theirs != one.yours and (not one.clashes or choices.get(one.field) == "yours")
    ]
    if not winning:
        return KEEP
    if not all(isinstance(version, dict) for version in (opened, theirs, yours)):
        return yours  # type: ignore[no-any-return]
    merged = dict(theirs)
    for one in winning:
        if one.yours is None:
            merged.pop(one.name, None)
        else:
            merged[one.name] = yours[one.name]
    return merged


def _unlike(*versions: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys(key for version in versions for key in version):
        values = [version.get(key, _ABSENT) for version in versions]
        if len({None if value is _ABSENT else compact(value) for value in values}) > 1:
            yield key
