"""Log entries: who changed what, with old and new, in the transaction of the change.

The message is Django's own JSON: as text it names states and keys, but no value of the data, so it
may be shown to anybody who may see the conversation. The values are beside it, for the timeline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import router, transaction
from django.utils.translation import gettext as _

from fsm_storage.admin.comparing import data_changes
from fsm_storage.admin.forms import Changes
from fsm_storage.admin.timelimit import lock_limit
from fsm_storage.durations import in_words
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.patches import KEEP

MAX_KEYS = 50
MAX_TEXT = 200

Note = dict[str, Any]


@contextmanager
def logged(user: Any, notes: Sequence[tuple[FSMRecord, Note]]) -> Iterator[None]:
    """Log changes that the block makes to records of one storage, or nothing if it raises.

    The entries go first: so the transaction begins with a write, and on SQLite, whose deferred
    transactions cannot pass from reading to writing while a bot writes, it waits for its turn.
    """
    kind = ContentType.objects.get_for_model(FSMRecord)
    database = router.db_for_write(LogEntry)
    with transaction.atomic(using=database):
        entries = LogEntry.objects.using(database).bulk_create(
            LogEntry(
                user_id=user.pk,
                content_type_id=kind.pk,
                object_id=str(record.pk),
                object_repr=str(record)[:200],
                action_flag=CHANGE,
                change_message=_message(note),
            )
            for record, note in notes
        )
        newest = FSMTransition.objects.order_by("-id").values_list("id", flat=True).first() or 0
        with lock_limit(notes[0][0].alias):
            yield
        _link(entries, notes, newest)


def _link(entries: list[LogEntry], notes: Sequence[tuple[FSMRecord, Note]], newest: int) -> None:
    """Note in each entry the transition that tells of the same change, so that a timeline shows it once."""
    keys = [record.key for record, _note in notes]
    made = FSMTransition.objects.filter(id__gt=newest, key__in=keys, source=FSMTransition.Source.ADMIN)
    ids = {(alias, key): pk for alias, key, pk in made.values_list("alias", "key", "id")}
    linked = []
    for entry, (record, note) in zip(entries, notes, strict=True):
        if (record.alias, record.key) in ids and entry.pk is not None:  # MySQL does not tell the ids
            entry.change_message = _message({**note, "transition": ids[record.alias, record.key]})
            linked.append(entry)
    if linked:
        LogEntry.objects.using(linked[0]._state.db).bulk_update(linked, ["change_message"])


def _message(note: Note) -> str:
    return json.dumps([{"changed": {"fields": list(_fields(note))}, "fsm_storage": note}])


def note_of(entry: LogEntry) -> Note:
    """Return what `noted` said of the change; nothing for an entry that others wrote."""
    try:
        note = json.loads(entry.change_message)[0]["fsm_storage"]
    except (ValueError, LookupError, TypeError):
        return {}
    return note if isinstance(note, dict) else {}


def noted(record: FSMRecord, changes: Changes) -> Note:
    """Return what `changes` do to `record`: each part, old and new, long values cut."""
    note: Note = {}
    if changes.state is not KEEP:
        note["state"] = [record.current_state, changes.state]
    if changes.data is not KEEP:
        found = data_changes(record.current_data, changes.data)
        note["data"] = [[_cut(text) for text in change] for change in found[:MAX_KEYS]]
        note["more"] = max(0, len(found) - MAX_KEYS)
    for part, ttl in (("state_ttl", changes.state_ttl), ("data_ttl", changes.data_ttl)):
        if ttl is not KEEP:
            note[part] = ttl.total_seconds() if isinstance(ttl, timedelta) else None
    return note


def told_ttls(note: Note) -> Iterator[str]:
    """Say what became of the times to expiry."""
    if "state_ttl" in note:
        yield _("State expires: %(ttl)s") % {"ttl": _told_ttl(note["state_ttl"])}
    if "data_ttl" in note:
        yield _("Data expires: %(ttl)s") % {"ttl": _told_ttl(note["data_ttl"])}


def _fields(note: Note) -> Iterator[str]:
    if "state" in note:
        old, new = (_("no state") if state is None else state or '""' for state in note["state"])
        yield _("State: %(old)s → %(new)s") % {"old": old, "new": new}
    if "data" in note:
        keys = [name or _("as a whole") for name, _old, _new in note["data"]]
        if note["more"]:
            keys.append(_("and %(count)d more") % {"count": note["more"]})
        yield _("Data: %(keys)s") % {"keys": ", ".join(keys)}
    yield from told_ttls(note)


def _told_ttl(seconds: float | None) -> str:
    return (
        _("never") if seconds is None else _("in %(time)s") % {"time": in_words(timedelta(seconds=seconds))}
    )


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
