"""Changes of many conversations, carried out: each by compare-and-set, in batches, with a result for each.

Nothing here knows of requests. A batch that fails or is done twice at a time leaves no half result:
the items and their records change in one transaction, if they are in one database.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import OperationalError, router, transaction

from fsm_storage.admin.bulk import ACTIONS, UNDO, Action, Impossible, effective, undoing
from fsm_storage.admin.errors import told
from fsm_storage.admin.forms import Changes
from fsm_storage.admin.log import logged, noted
from fsm_storage.admin.timelimit import lock_limit
from fsm_storage.conf import storages
from fsm_storage.exceptions import FSMStorageError, StorageTimeout, StorageUnavailable, VersionConflict
from fsm_storage.models import FSMBulk, FSMBulkItem, FSMRecord, UtcNow
from fsm_storage.patches import KEEP
from fsm_storage.rights import Rights

MOST = 10_000
"""Records that one change takes at most."""
BATCH = 200
KEPT = timedelta(days=30)
"""How long results, and with them the way to undo, are kept. They hold data of conversations."""

Outcome = FSMBulkItem.Outcome


class Stopped(Exception):
    """The database did not take a batch; what waits can be gone on with later."""


class Task(NamedTuple):
    """What to do to one record, decided upon the version in hand."""

    item: FSMBulkItem
    record: FSMRecord
    changes: Changes


class Verdict(NamedTuple):
    """Why nothing is done to a record."""

    outcome: FSMBulkItem.Outcome
    reason: str = ""


class _Taken(Exception):
    """Another request is at work on the same items."""


class _Settled(Exception):
    """Nothing is to be done after all; what the transaction has claimed is to be undone."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def start(
    action: Action, arguments: dict[str, Any], records: Iterable[tuple[int, str]], user: Any
) -> FSMBulk:
    """Write down what shall be done to which records; `work` does it."""
    return _start(action.name, arguments, [FSMBulkItem(record_id=pk, key=key) for pk, key in records], user)


def start_undo(bulk: FSMBulk, user: Any) -> FSMBulk:
    """Write down that what `bulk` changed shall be as before, where nobody has changed it since."""
    changed = bulk.items.filter(outcome=Outcome.CHANGED)
    items = [
        FSMBulkItem(record_id=item.record_id, key=item.key, before=item.before, version=item.version)
        for item in changed
    ]
    return _start(UNDO, {"of": action_of(bulk).name}, items, user, undoes=bulk)


def _start(
    name: str, arguments: dict[str, Any], items: list[FSMBulkItem], user: Any, **fields: Any
) -> FSMBulk:
    with transaction.atomic(using=router.db_for_write(FSMBulk)):
        FSMBulk.objects.filter(created_at__lt=UtcNow() - KEPT).delete()
        bulk = FSMBulk.objects.create(action=name, arguments=arguments, actor=user.get_username(), **fields)
        for item in items:
            item.bulk = bulk
        FSMBulkItem.objects.bulk_create(items, batch_size=BATCH)
    return bulk


def action_of(bulk: FSMBulk) -> Action:
    """Return the action of a change; for an undo, the one that is undone."""
    return ACTIONS[bulk.arguments["of"] if bulk.action == UNDO else bulk.action]


def work(bulk: FSMBulk, arguments: dict[str, Any], user: Any, rights: Rights, seconds: float) -> None:
    """Do what waits, for about `seconds`. Raises `Stopped`."""
    deadline = time.monotonic() + seconds
    worker = Worker(bulk, arguments, user, rights)
    while items := list(bulk.items.filter(outcome=Outcome.WAITING).order_by("id")[:BATCH]):
        try:
            worker.carry_out(items)
        except (OperationalError, StorageTimeout, StorageUnavailable) as error:
            raise Stopped(told(error)) from error
        if time.monotonic() >= deadline:
            return


class Worker:
    """Carries out batches of one change, for one user."""

    def __init__(self, bulk: FSMBulk, arguments: dict[str, Any], user: Any, rights: Rights) -> None:
        self.bulk, self.arguments, self.user, self.rights = bulk, arguments, user, rights
        self.action = action_of(bulk)
        self.database = router.db_for_write(FSMBulkItem)

    def carry_out(self, items: Sequence[FSMBulkItem]) -> None:
        """Do one batch: the records that change alike in one transaction, which is much quicker than one each."""
        groups: dict[str, list[Task]] = {}
        for task in self._decide(items):
            # What is written to Redis is not rolled back, so there each record is a transaction of its own.
            own = task.item.pk if _is_mirrored(task.record.alias) else ""
            groups.setdefault(f"{task.record.alias} {task.changes} {own}", []).append(task)
        for group in groups.values():
            self._change(group)

    def _decide(self, items: Sequence[FSMBulkItem]) -> Iterator[Task]:
        """Yield what is to be done; what is not is noted at once."""
        ids = [item.record_id for item in items]
        records = {record.pk: record for record in FSMRecord.objects.with_clock().filter(pk__in=ids)}
        for item in items:
            verdict = self._judge(item, records.get(item.record_id))
            if isinstance(verdict, Task):
                yield verdict
            else:
                _settle(item, verdict)

    def _judge(self, item: FSMBulkItem, record: FSMRecord | None) -> Task | Verdict:
        """Say what to do to a record, or why nothing."""
        if record is None:
            return Verdict(Outcome.GONE)
        if self.bulk.action == UNDO and record.version != item.version:
            return Verdict(Outcome.MOVED)
        try:
            if self.bulk.action == UNDO:
                changes = undoing(record, item.before or {})
            else:
                changes = self.action.choose(record, self.arguments, self.rights)
        except Impossible as error:
            return Verdict(Outcome.FAILED, told(error))
        changes = effective(record, changes)
        return Task(item, record, changes) if changes else Verdict(Outcome.UNCHANGED)

    def _change(self, tasks: list[Task]) -> None:
        try:
            with transaction.atomic(using=self.database):
                with lock_limit(tasks[0].record.alias):
                    self._claim([task.item for task in tasks])
                self._write(tasks)
        except _Taken:
            return
        except (StorageTimeout, StorageUnavailable):
            raise
        except FSMStorageError as error:
            if len(tasks) > 1:
                for task in tasks:
                    self._change([task])
            elif isinstance(error, VersionConflict):
                self._change_again(tasks[0])
            else:
                _settle(tasks[0].item, Verdict(Outcome.FAILED, told(error)))

    def _change_again(self, task: Task) -> None:
        """Do one that the bot was quicker with: read under its lock, so that it cannot move on once more.

        Where the lock does not hold (a mirrored record, another database) the version still counts.
        """
        item = task.item
        try:
            with transaction.atomic(using=self.database):
                with lock_limit(task.record.alias):
                    self._claim([item])  # on SQLite, this locks the records too
                    records = FSMRecord.objects.with_clock().filter(pk=item.record_id)
                    if router.db_for_write(FSMRecord) == self.database:
                        records = records.using(self.database).select_for_update()
                    record = records.first()
                verdict = self._judge(item, record)
                if isinstance(verdict, Verdict):
                    raise _Settled(verdict)
                self._write([verdict])
        except _Taken:
            return
        except _Settled as settled:
            _settle(item, settled.verdict)
        except VersionConflict:
            _settle(item, Verdict(Outcome.MOVED))
        except (StorageTimeout, StorageUnavailable):
            raise
        except FSMStorageError as error:
            _settle(item, Verdict(Outcome.FAILED, told(error)))

    def _claim(self, items: Sequence[FSMBulkItem]) -> None:
        """Take the items, in the transaction that changes their records. Raises `_Taken` if somebody has."""
        waiting = FSMBulkItem.objects.using(self.database).filter(outcome=Outcome.WAITING)
        if waiting.filter(pk__in=[item.pk for item in items]).update(outcome=Outcome.CHANGED) != len(items):
            raise _Taken

    def _write(self, tasks: list[Task]) -> None:
        """Change the records, with their log entries and what the items need; all or, when it raises, none."""
        changes, alias = tasks[0].changes, tasks[0].record.alias
        with logged(self.user, [(task.record, noted(task.record, changes)) for task in tasks]):
            storages.editor(alias).edit(
                [task.record for task in tasks],
                **changes.as_arguments(),
                if_versions=[task.record.version for task in tasks],
                by=self.user,
            )
        pks = [task.record.pk for task in tasks]
        versions = dict(FSMRecord.objects.filter(pk__in=pks).values_list("pk", "version"))
        for task in tasks:
            # A mirrored record is given the version that it will have.
            task.item.version = max(versions.get(task.record.pk, 0), task.record.version)
            task.item.before = _before(task.record, changes)
        items = [task.item for task in tasks]
        FSMBulkItem.objects.using(self.database).bulk_update(items, ["version", "before"], batch_size=BATCH)


def _is_mirrored(alias: str) -> bool:
    return alias in storages.settings and bool(getattr(storages[alias], "mirror", False))


def _before(record: FSMRecord, changes: Changes) -> dict[str, Any]:
    """Return the parts of `record` that `changes` touch, as they are before."""
    before: dict[str, Any] = {}
    for part in ("state", "data"):
        is_changed = getattr(changes, part) is not KEEP
        if is_changed:
            before[part] = getattr(record, f"current_{part}")
        if is_changed or getattr(changes, f"{part}_ttl") is not KEEP:
            at = getattr(record, f"{part}_expires_at")
            before[f"{part}_expires_at"] = at.isoformat() if at else None
    return before


def _settle(item: FSMBulkItem, verdict: Verdict) -> None:
    """Note the outcome of an item that still waits."""
    waiting = FSMBulkItem.objects.filter(pk=item.pk, outcome=Outcome.WAITING)
    waiting.update(outcome=verdict.outcome, reason=verdict.reason[:255])
