"""What operations on conversations have in common: the walk over the records, batches, compare-and-set."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from django.db import connections, router
from django.db.migrations.operations.base import Operation, OperationCategory
from django.db.models import QuerySet

from fsm_storage.codec import Codec
from fsm_storage.conf import Editor, storages
from fsm_storage.dialects import Write
from fsm_storage.exceptions import MissingDependency, StillInUse, VersionConflict
from fsm_storage.keys import state_text
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP, Patch, Ttl

logger = logging.getLogger("fsm_storage")

BATCH_SIZE = 250
"""Records in one transaction."""
CATCH_UP_SECONDS = 60.0
"""After the first walk; whoever puts the old value in again for so long will not stop by itself."""
_COLUMNS = (
    "alias", "key", "bot_id", "chat_id", "user_id", "thread_id", "business_connection_id", "destiny",
    "state", "version",
)  # fmt: skip
_STAY = Ttl(0.0, keep=True)
"""A part keeps its expiry; if it has expired, it expires again at once."""

Changes = Mapping[str, Any]
"""Arguments of `FSMRecord.edit`."""


class ConversationOperation(Operation):
    """What these operations have in common: the walk over the records, and the batches.

    Never one transaction of its own around all batches, also where the migration is not atomic.
    """

    category = OperationCategory.PYTHON
    reduces_to_sql = False
    atomic = False
    until_none_is_left = True
    """Walk again until a walk finds nothing: a bot with the old code may have written meanwhile."""

    def __init__(self, *, alias: str | None = None, elidable: bool = False) -> None:
        self.alias = alias
        self.elidable = elidable  # type: ignore[misc] # as Django's own operations do

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Conversations are no models of the app: nothing changes."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        self._migrate(app_label, schema_editor, to_state)

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        self.reversed()._migrate(app_label, schema_editor, to_state)

    def _migrate(self, app_label: str, schema_editor: Any, state: Any) -> None:
        using = schema_editor.connection.alias
        # Where the conversations are counts, not where the app's own tables are.
        if not router.allow_migrate_model(using, FSMRecord):
            return
        if ("fsm_storage", "fsmrecord") not in state.models:
            raise MissingDependency(app_label)
        self.apply(using, by=app_label)

    def reversed(self) -> Self:
        """Return the operation that undoes this one. Raises `NotImplementedError` if none can."""
        raise NotImplementedError

    def apply(self, using: str = "default", *, by: str = "") -> int:
        """Do to the conversations in this database what the migration does; return how many changed.

        `by` is the actor of the transitions. Synchronous.
        """
        changed = found = self._walk(using, by, again=False)
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while found and self.until_none_is_left:
            if time.monotonic() > deadline:
                raise StillInUse(self.describe(), changed)
            found = self._walk(using, by, again=True)
            changed += found
        logger.info("%s: %d changed in database %r", self.describe(), changed, using)
        return changed

    def _walk(self, using: str, by: str, *, again: bool) -> int:
        """Go once over all records, by their ids; return how many were changed."""
        records = self._records(using).order_by("pk")
        last, changed = 0, 0
        while True:
            began = time.monotonic()
            ids = list(records.filter(pk__gt=last).values_list("pk", flat=True)[:BATCH_SIZE])
            if not ids:
                return changed
            changed += self._change(records, ids, by, again=again)
            last = ids[-1]
            if not connections[using].in_atomic_block:
                time.sleep(min(time.monotonic() - began, 1.0))  # the bot's turn

    def _change(self, records: QuerySet[FSMRecord], ids: Sequence[int], by: str, *, again: bool) -> int:
        """Change these records; one that the bot wrote meanwhile is read and changed again."""
        changed = 0
        while ids:
            work: dict[str, list[tuple[FSMRecord, Changes]]] = {}
            for record in records.filter(
                pk__in=ids
            ):  # first all changes, so that an error leaves all as it was
                changes = self._changes(record, storages.editor(record.alias), again)
                if changes is not None:
                    work.setdefault(record.alias, []).append((record, changes))
            ids = []
            for alias, edits in work.items():
                done, late = _rewrite(storages.editor(alias), edits, by)
                changed += done
                ids += [record.pk for record in late]
        return changed

    def _records(self, using: str) -> QuerySet[FSMRecord]:
        """Return the records in question; what has expired and was not swept is among them.

        An expiry handler that has the new name would not find them otherwise.
        """
        records = FSMRecord.objects.using(using).only(*_COLUMNS)
        if self.alias is not None:
            records = records.filter(alias=self.alias)
        elsewhere = _aliases_elsewhere(using)  # what is left of them here is read by nobody
        return records.exclude(alias__in=elsewhere) if elsewhere else records

    def _changes(self, record: FSMRecord, editor: Editor, again: bool) -> Changes | None:
        """Return what to change in `record`; None: nothing. `again`: it is not the first walk."""
        raise NotImplementedError


def _aliases_elsewhere(using: str) -> list[str]:
    """Return the storages that keep their conversations in another database than this one."""
    return [alias for alias in storages.settings if getattr(storages[alias], "database", using) != using]


def _rewrite(editor: Any, edits: Sequence[tuple[FSMRecord, Changes]], by: str) -> tuple[int, list[FSMRecord]]:
    """Carry the changes out; return how many were, and the records that were written by somebody else meanwhile."""
    if hasattr(editor, "put"):
        replies = editor.put([_write(editor.codec, *edit) for edit in edits], by=by, source="migration")
        outcomes = zip(edits, replies, strict=True)
        late = [record for (record, _), reply in outcomes if isinstance(reply, VersionConflict)]
        return len(edits) - len(late), late
    if hasattr(editor, "edit_each"):
        replies = editor.edit_each(edits, by=by, source="migration")
        for reply in replies:
            if isinstance(reply, VersionConflict):  # the mirror is behind: the next walk will see
                logger.warning("%s", reply)
        return sum(isinstance(reply, int) for reply in replies), []
    late = []
    for record, changes in edits:
        try:
            editor.edit([record], **changes, if_versions=[record.version], by=by, source="migration")
        except VersionConflict:
            late.append(record)
    return len(edits) - len(late), late


def _write(codec: Codec, record: FSMRecord, changes: Changes) -> Write:
    patch = Patch(
        state_text(changes["state"], record.key) if "state" in changes else KEEP,
        codec.encode(changes["data"], record.key) if "data" in changes else KEEP,
    )
    return Write(record.key, record.storage_key, patch, _STAY, _STAY, record.version)
