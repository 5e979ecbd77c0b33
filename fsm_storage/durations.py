"""Spans of time as people write and read them. No database, no clock."""

from __future__ import annotations

import re
from datetime import timedelta

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

SHORTEST = timedelta(seconds=1)
LONGEST = timedelta(days=36_500)
HINT = gettext_lazy("A number and a unit: 45s, 30m, 2h, 3d, 1w, or together: 1d 12h.")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART = r"(\d{1,12}(?:\.\d{1,6})?)\s*(s|sec|m|min|h|d|w)"
_ONE = re.compile(_PART, re.ASCII)
_WHOLE = re.compile(rf"\s*{_PART}(?:\s*{_PART})*\s*", re.ASCII)


def parse_duration(text: str) -> timedelta:
    """Return the span that `text` means, as in "2h" or "1d 12h". Raises `ValueError` with what to type."""
    lowered = text.lower()
    if not _WHOLE.fullmatch(lowered):
        raise ValueError(_("“%(text)s” is no duration. %(hint)s") % {"text": text, "hint": HINT})
    seconds = sum(float(number) * _SECONDS[unit[0]] for number, unit in _ONE.findall(lowered))
    if not SHORTEST.total_seconds() <= seconds <= LONGEST.total_seconds():
        raise ValueError(_("A duration is between 1 second and 100 years."))
    return timedelta(seconds=seconds)


def in_words(span: timedelta) -> str:
    """Return the length of `span` in at most two units: "45 s", "1 h 20 min", "3 h", "12 d"."""
    seconds = int(abs(span.total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if not minutes:
        return _("%(count)d s") % {"count": seconds}
    if not hours:
        return _("%(count)d min") % {"count": minutes}
    if not days:
        return _two(_("%(count)d h"), hours, _("%(count)d min"), minutes % 60)
    return _two(_("%(count)d d"), days, _("%(count)d h"), hours % 24)


def _two(big: str, count: int, small: str, rest: int) -> str:
    """Put the smaller unit beside the bigger one only where it still matters."""
    text = big % {"count": count}
    return f"{text} {small % {'count': rest}}" if rest and count < 3 else text
