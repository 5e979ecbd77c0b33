"""Deletes conversations through their storages, so that the history tells who ended them: all or none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib import messages
from django.contrib.admin.models import LogEntry
from django.db import OperationalError, router, transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse

from fsm_storage import signals
from fsm_storage.admin.errors import told
from fsm_storage.admin.timelimit import lock_limit
from fsm_storage.conf import storages
from fsm_storage.exceptions import FSMStorageError, NotEditable
from fsm_storage.models import FSMRecord

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[FSMRecord]
else:
    Base = object

BATCH = 500


class NotDeleted(Exception):
    """Nothing was deleted; the message says why."""


class DeletingMixin(Base):
    """What `RecordAdmin` does when Django's own pages delete."""

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        try:
            return super().delete_view(request, object_id, extra_context)
        except NotDeleted as error:
            self.message_user(request, str(error), messages.ERROR)
            page = reverse(
                "admin:fsm_storage_fsmrecord_change", args=[object_id], current_app=self.admin_site.name
            )
            return HttpResponseRedirect(page)

    def response_action(
        self, request: HttpRequest, queryset: QuerySet[FSMRecord], *args: Any, **kwargs: Any
    ) -> HttpResponse | None:
        try:
            return super().response_action(request, queryset, *args, **kwargs)
        except NotDeleted as error:
            self.message_user(request, str(error), messages.ERROR)
            return None

    def log_deletions(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> Any:
        """Do nothing yet: Django asks for it before any transaction. `delete_queryset` logs."""
        return []

    def delete_model(self, request: HttpRequest, obj: FSMRecord) -> None:
        self.delete_queryset(request, self.get_queryset(request).filter(pk=obj.pk))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> None:
        """Delete, with log entries, all or nothing. Raises `NotDeleted`.

        As in `logged`, the entries go first. What is to be deleted is noted before anything changes: cleared
        records may not match the list's filter any more.
        """
        found = list(queryset)
        by_alias: dict[str, list[FSMRecord]] = {}
        for record in sorted(found, key=lambda record: record.key):
            by_alias.setdefault(record.alias, []).append(record)
        database = router.db_for_write(FSMRecord)
        try:
            with (
                transaction.atomic(using=router.db_for_write(LogEntry)),
                transaction.atomic(using=database),
            ):
                super().log_deletions(request, queryset)
                for alias, records in by_alias.items():
                    for start in range(0, len(records), BATCH):
                        _delete(database, alias, records[start : start + BATCH], request.user)
        except (FSMStorageError, OperationalError) as error:
            raise NotDeleted(told(error)) from error


def _delete(database: str, alias: str, records: Sequence[FSMRecord], user: Any) -> None:
    try:
        storage: Any = storages.editor(alias)
        if not hasattr(storage, "delete"):
            raise NotEditable(alias, "it cannot delete")
        storage.delete(records, by=user)
    except NotEditable:  # nobody is there to note it
        with lock_limit(alias):
            FSMRecord.objects.using(database).filter(pk__in=[record.pk for record in records]).delete()
        gone = [(record.key, None) for record in records]
        transaction.on_commit(partial(signals.hint, alias, gone), using=database)
