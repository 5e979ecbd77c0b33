"""One timeline of a conversation: its transitions and what the staff did, newest first, a page at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Self

from django.conf import settings
from django.contrib.admin.models import LogEntry
from django.contrib.contenttypes.models import ContentType
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from fsm_storage.admin.comparing import Change, data_changes
from fsm_storage.admin.log import Note, note_of, told_ttls
from fsm_storage.admin.presentation import ago, badge, clock_of, local
from fsm_storage.durations import in_words
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.rights import HIDDEN, Mask

PAGE = 50
MAX_KEYS = 50
MAX_TEXT = 300
LOG_LIMIT = 50_000
"""As many entries of the log are looked through; transitions are found by an index, and have no such limit."""
MIRRORED_WITHIN = timedelta(minutes=1)
_NEWEST = 2**63 - 1


class Step(NamedTuple):
    """A row of the timeline, ready to be shown."""

    when: SafeString
    exactly: str
    change: SafeString
    source: str
    actor: str
    dwell: str
    is_newest: bool
    changes: list[Change]
    more: int
    told: list[str]
    restorable: int | None
    """The transition whose state and data could be brought back."""


class Cursor(NamedTuple):
    """Where a page ends: all that comes is older than this transition, this log entry and this time."""

    transition: int = _NEWEST
    entry: int = _NEWEST
    at: datetime | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the cursor of a page's address; that of the newest page if it is none."""
        parts = text.split(".")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
            return cls()
        transition, entry, micros = map(int, parts)
        try:
            at = datetime.fromtimestamp(micros / 1_000_000, UTC if settings.USE_TZ else None)
        except (OverflowError, ValueError, OSError):
            return cls()
        return cls(transition, entry, at)

    def __str__(self) -> str:
        micros = round(self.at.timestamp() * 1_000_000) if self.at else 0
        return f"{self.transition}.{self.entry}.{micros}"


class Event(NamedTuple):
    """A change of the conversation: a transition, or what the log has of a change without one, or both."""

    at: datetime
    transition: FSMTransition | None
    entry: LogEntry | None
    note: Note


class Page(NamedTuple):
    steps: list[Step]
    older: Cursor | None
    """Where the next page begins, if there is one."""
    has_data: bool
    """Whether the history keeps the data, so that earlier points can be restored."""


def timeline(record: FSMRecord, mask: Mask, before: Cursor | None = None) -> Page:
    """Return a page of the record's changes. Three bounded queries, whatever the number of changes."""
    before = before or Cursor()
    transitions = list(FSMTransition.objects.of(record).filter(id__lt=before.transition)[: PAGE + 1])
    entries = list(_entries(record).filter(id__lt=before.entry)[: PAGE + 1])
    events = _merged(transitions, entries)
    shown = events[:PAGE]
    now, until, steps = clock_of(record), before.at, []
    for event in shown:
        steps.append(_step(event, until, now, mask))
        until = event.at
    has_data = any(event.transition and event.transition.data_after is not None for event in shown)
    older = _end(shown, before) if len(events) > PAGE else None
    return Page(steps, older, has_data)


def _entries(record: FSMRecord) -> Any:
    """Return the log's entries of the record, newest first, among the last `LOG_LIMIT` of the log.

    Django's log has no index on its objects, and grows with all that the staff does in the whole project.
    """
    kind = ContentType.objects.get_for_model(FSMRecord)
    newest = LogEntry.objects.order_by("-id").values_list("id", flat=True).first() or 0
    found = LogEntry.objects.filter(id__gt=newest - LOG_LIMIT, content_type=kind, object_id=str(record.pk))
    return found.select_related("user").order_by("-id")


def _merged(transitions: Sequence[FSMTransition], entries: Sequence[LogEntry]) -> list[Event]:
    """Put both lists together by time. Each keeps its own order, also where the clocks of their writers differ."""
    notes = [(entry, note_of(entry)) for entry in entries]
    told = {note["transition"]: (entry, note) for entry, note in notes if "transition" in note}
    loose = [(entry, note) for entry, note in notes if "transition" not in note]
    for transition in transitions:
        if transition.pk not in told and (match := _match(transition, loose)):
            told[transition.pk] = match
            loose.remove(match)
    moves = [Event(t.at, t, *told.get(t.pk, (None, {}))) for t in transitions]
    alone = [Event(entry.action_time, None, entry, note) for entry, note in loose]
    merged = []
    while moves and alone:
        merged.append((moves if moves[0].at >= alone[0].at else alone).pop(0))
    return [*merged, *moves, *alone]


def _match(transition: FSMTransition, loose: Sequence[tuple[LogEntry, Note]]) -> tuple[LogEntry, Note] | None:
    """Return the entry that tells of the same change, where they could not be linked: a mirror writes later."""
    if transition.source != FSMTransition.Source.ADMIN:
        return None
    move = [transition.from_state, transition.to_state]
    for entry, note in loose:
        is_same = note.get("state", move if move[0] == move[1] and "data" in note else None) == move
        is_near = abs(transition.at - entry.action_time) <= MIRRORED_WITHIN
        if is_same and is_near and entry.user.get_username() == transition.actor:
            return entry, note
    return None


def _end(shown: Sequence[Event], before: Cursor) -> Cursor:
    return Cursor(
        min((event.transition.pk for event in shown if event.transition), default=before.transition),
        min((event.entry.pk for event in shown if event.entry), default=before.entry),
        shown[-1].at,
    )


def _step(event: Event, until: datetime | None, now: datetime, mask: Mask) -> Step:
    span = in_words((until or now) - event.at)
    changes = list(_changes(event, mask))
    transition, entry = event.transition, event.entry
    if transition is not None:
        source, actor = transition.get_source_display(), transition.actor
    else:
        source, actor = str(FSMTransition.Source.ADMIN.label), entry.user.get_username() if entry else ""
    return Step(
        ago(event.at, now),
        local(event.at),
        change(transition) if transition else SafeString(),
        source,
        actor,
        _("%(time)s so far") % {"time": span} if until is None else span,
        until is None,
        changes[:MAX_KEYS],
        max(0, len(changes) - MAX_KEYS) + int(event.note.get("more", 0)),
        list(_told(event, mask)),
        transition.pk if transition and isinstance(transition.data_after, dict) else None,
    )


def _changes(event: Event, mask: Mask) -> Iterator[Change]:
    """Yield what became of the data: exactly from the history, else as the log has it."""
    transition = event.transition
    if transition is not None and transition.data_after is not None:
        for name, old, new in data_changes(transition.data_before, transition.data_after, mask):
            yield Change(name, _cut(old), _cut(new))
    else:
        for name, old, new in event.note.get("data", []):
            # A value in the log is text, in which a mask could find no keys: all of it is hidden.
            yield Change(name, *(HIDDEN if mask and text is not None else text for text in (old, new)))


def _told(event: Event, mask: Mask) -> Iterator[str]:
    yield from told_ttls(event.note)
    if event.entry is not None and not event.note and not mask:
        yield event.entry.get_change_message()  # of somebody else's making


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def change(transition: FSMTransition) -> SafeString:
    """Return what changed, as badges."""
    if transition.from_state == transition.to_state:
        return format_html(
            '{} <span class="fsm-quiet">{}</span>', badge(transition.to_state), _("data changed")
        )
    return format_html(
        '{} <span class="fsm-arrow">→</span> {}', badge(transition.from_state), badge(transition.to_state)
    )
