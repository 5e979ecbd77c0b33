"""Log entries: who changed what, with old and new, in the transaction of the change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import router, transaction
from django.utils.translation import gettext as _

from fsm_storage.admin.comparing import told_data, told_state
from fsm_storage.admin.forms import Changes
from fsm_storage.durations import in_words
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP

MAX_LENGTH = 20_000


@contextmanager
def logged(user: Any, messages: Sequence[tuple[FSMRecord, str]]) -> Iterator[None]:
    """Log changes that the block makes, or nothing if it raises.

    The entries go first: so the transaction begins with a write, and on SQLite, whose deferred
    transactions cannot pass from reading to writing while a bot writes, it waits for its turn.
    """
    kind = ContentType.objects.get_for_model(FSMRecord)
    entries = [
        LogEntry(
            user_id=user.pk,
            content_type_id=kind.pk,
            object_id=str(record.pk),
            object_repr=str(record)[:200],
            action_flag=CHANGE,
            change_message=_storable(message[:MAX_LENGTH]),
        )
        for record, message in messages
    ]
    database = router.db_for_write(LogEntry)
    with transaction.atomic(using=database):
        LogEntry.objects.using(database).bulk_create(entries)
        yield


def _storable(text: str) -> str:
    """Return `text` as any database takes it. What is logged may be about to be refused for its letters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def told(record: FSMRecord, changes: Changes) -> str:
    """Say what `changes` do to `record`: each part, old and new."""
    sentences = []
    if changes.state is not KEEP:
        sentences.append(told_state(record.current_state, changes.state))
    if changes.data is not KEEP:
        sentences.append(told_data(record.current_data, changes.data))
    if changes.state_ttl is not KEEP:
        sentences.append(_("State expires: %(ttl)s") % {"ttl": _told_ttl(changes.state_ttl)})
    if changes.data_ttl is not KEEP:
        sentences.append(_("Data expires: %(ttl)s") % {"ttl": _told_ttl(changes.data_ttl)})
    return ". ".join(sentences) + "."


def _told_ttl(ttl: timedelta | None) -> str:
    return _("never") if ttl is None else _("in %(time)s") % {"time": in_words(ttl)}
