"""States and instants as HTML, for lists and pages. Everything that comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from zlib import crc32

from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from fsm_storage.discovery import declared_states
from fsm_storage.durations import in_words
from fsm_storage.models import FSMRecord
from fsm_storage.peers import Name, names_of

COLOURS = 12


def clock_of(record: FSMRecord) -> datetime:
    """Return the database's time when it gave out `record`."""
    now: datetime = getattr(record, "read_at", None) or timezone.now()
    return now


def colour_of(group: str) -> int:
    """Return the number of a group's colour: the same in every process, for ever."""
    return crc32(group.encode()) % COLOURS


def badge(state: str | None) -> SafeString:
    """Return a state as a badge in its group's colour, marked if no app declares it."""
    if state is None:
        return format_html('<span class="fsm-badge fsm-none">{}</span>', _("no state"))
    group, colon, name = state.rpartition(":")
    colour = f"fsm-c{colour_of(group)}" if group else "fsm-plain"
    text = format_html('<span class="fsm-group">{}{}</span>{}', group, colon, name or '""')
    if state in declared_states():
        return format_html('<span class="fsm-badge {}" title="{}">{}</span>', colour, state, text)
    return format_html(
        '<span class="fsm-badge fsm-undeclared {}" title="{}">{}</span> <span class="fsm-flag">{}</span>',
        colour,
        _("No app declares the state %(state)s") % {"state": state},
        text,
        _("undeclared"),
    )


def local(at: datetime) -> str:
    """Return a time to the second, in the time zone of the site."""
    return (timezone.localtime(at) if timezone.is_aware(at) else at).strftime("%Y-%m-%d %H:%M:%S")


def instant(at: datetime, words: str, left: timedelta | None = None) -> SafeString:
    """Return `words` with the exact time behind them; a script counts `left` down where there is one."""
    title = f"{local(at)} {timezone.get_current_timezone_name()}"
    if left is None:
        return format_html('<time datetime="{}" title="{}">{}</time>', at.isoformat(), title, words)
    return format_html(
        '<time datetime="{}" title="{}" data-fsm-left="{}">{}</time>',
        at.isoformat(),
        title,
        int(left.total_seconds()),
        words,
    )


def ago(at: datetime, now: datetime) -> SafeString:
    """Return how long ago something was: "5 min ago"."""
    span = now - at
    words = _("just now") if span < timedelta(seconds=1) else _("%(time)s ago") % {"time": in_words(span)}
    return instant(at, words)


def expiry(at: datetime | None, now: datetime) -> SafeString:
    """Return when something expires: "in 3 h", "expired 5 min ago", "never"."""
    if at is None:
        return format_html('<span class="fsm-quiet">{}</span>', _("never"))
    if at <= now:
        words = _("expired %(time)s ago") % {"time": in_words(now - at)}
        return format_html('<span class="fsm-past">{}</span>', instant(at, words))
    element = instant(at, _("in %(time)s") % {"time": in_words(at - now)}, at - now)
    return (
        format_html('<span class="fsm-soon">{}</span>', element) if at - now < timedelta(hours=1) else element
    )


def record_expiry(record: FSMRecord, now: datetime) -> SafeString:
    """Return when the parts of a record expire; one text where they go together."""
    state_at, data_at = record.state_expires_at, record.data_expires_at
    if record.state is None and data_at == record.updated_at:
        # A write that leaves nothing behind lets the data expire at once, for the sweep.
        return format_html('<span class="fsm-quiet">{}</span>', _("ended"))
    if record.state is None or _together(state_at, data_at):
        return expiry(data_at, now)
    if data_at is None and state_at is not None:
        return _part(_("state"), expiry(state_at, now))
    return format_html(
        "{} <br>{}", _part(_("state"), expiry(state_at, now)), _part(_("data"), expiry(data_at, now))
    )


def _together(one: datetime | None, other: datetime | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < timedelta(seconds=1)


def _part(name: str, text: SafeString) -> SafeString:
    return format_html('<span class="fsm-quiet">{}</span> {}', name, text)


def labelled(label: str, content: object) -> SafeString:
    """Return the content of a cell, with a label that only the narrow, headless table shows."""
    return format_html('<span class="fsm-label">{}</span>{}', label, content)


def with_names(records: Iterable[FSMRecord]) -> None:
    """Give each record the names of its chat and user, found with one query, for `peer`."""
    found = list(records)
    names = names_of(number for record in found for number in (record.chat_id, record.user_id))
    for record in found:
        record.names = names  # type: ignore[attr-defined]


def peer(record: FSMRecord, number: int) -> SafeString:
    """Return a chat or user of `record`: its name, if it is known, and its id."""
    name: Name | None = getattr(record, "names", {}).get(number)
    if name is None:
        return format_html("{}", number)
    at = format_html(' <span class="fsm-quiet">@{}</span>', name.username) if name.username else ""
    return format_html(
        '<span class="fsm-name">{}</span>{} <span class="fsm-id">{}</span>', name.title, at, number
    )
