"""What can be done to many conversations at once. Each change goes through the storage, in batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from asgiref.sync import sync_to_async
from django.contrib import admin, messages
from django.contrib.admin import helpers
from django.core.handlers.asgi import ASGIRequest
from django.db import OperationalError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from fsm_storage.admin.forms import Changes, ExtendForm
from fsm_storage.admin.log import logged, noted
from fsm_storage.admin.presentation import badge, clock_of, record_expiry
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP
from fsm_storage.rights import Rights, mask_for, rights_of
from fsm_storage.transfer.lines import conversation_lines

if TYPE_CHECKING:
    Base = admin.ModelAdmin[FSMRecord]
else:
    Base = object

MOST = 10_000
"""Records that one action changes at most: what a request can do while its browser waits."""
BATCH = 200
SHOWN = 20

Choose = Callable[[FSMRecord], Changes]


class Bulk(NamedTuple):
    """An action that asks before it changes anything: its words."""

    name: str
    title: str
    explanation: str
    button: str


class ActionsMixin(Base):
    """The actions of `RecordAdmin`."""

    actions = ["clear_state", "clear_all", "extend_ttl", "export_jsonl"]

    # Django asks these by name: see `permissions` of the actions.

    def has_bulk_state_permission(self, request: HttpRequest) -> bool:
        rights = rights_of(request.user)
        return rights.bulk and rights.change_state

    def has_bulk_data_permission(self, request: HttpRequest) -> bool:
        rights = rights_of(request.user)
        return rights.bulk and rights.change_data

    def has_bulk_both_permission(self, request: HttpRequest) -> bool:
        return self.has_bulk_state_permission(request) and self.has_bulk_data_permission(request)

    def has_export_permission(self, request: HttpRequest) -> bool:
        return rights_of(request.user).export

    @admin.action(
        description=gettext_lazy("Clear the state of selected conversations"), permissions=["bulk_state"]
    )
    def clear_state(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponse | None:
        bulk = Bulk(
            "clear_state",
            _("Clear the state"),
            _("The bot will treat these people as if they had not started anything. Their data stays."),
            _("Yes, clear the state"),
        )
        return self._ask_and_apply(request, queryset, bulk, lambda record: Changes(state=None))

    @admin.action(
        description=gettext_lazy("Clear state and data of selected conversations"), permissions=["bulk_both"]
    )
    def clear_all(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponse | None:
        bulk = Bulk(
            "clear_all",
            _("Clear state and data"),
            _("The bot will forget these conversations. This cannot be undone."),
            _("Yes, clear everything"),
        )
        return self._ask_and_apply(request, queryset, bulk, lambda record: Changes(state=None, data={}))

    @admin.action(
        description=gettext_lazy("Extend the time to expiry of selected conversations"),
        permissions=["bulk_state", "bulk_data"],
    )
    def extend_ttl(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponse | None:
        bulk = Bulk(
            "extend_ttl",
            _("Extend the time to expiry"),
            _("What would expire sooner will expire in this time from now. Nothing is shortened or revived."),
            _("Extend"),
        )
        rights = rights_of(request.user)
        form = ExtendForm(request.POST if "post" in request.POST else None)
        return self._ask_and_apply(
            request,
            queryset,
            bulk,
            lambda record: _extension(record, form.cleaned_data["duration"], rights),
            form,
        )

    @admin.action(
        description=gettext_lazy("Export selected conversations as JSON lines"), permissions=["export"]
    )
    def export_jsonl(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponseBase:
        mask = mask_for(request.user)
        lines = conversation_lines(queryset, look=mask.over if mask else None)
        is_async = isinstance(request, ASGIRequest)
        return StreamingHttpResponse(
            _in_threads(lines) if is_async else lines,
            content_type="application/x-ndjson",
            headers={"Content-Disposition": 'attachment; filename="conversations.jsonl"'},
        )

    def _ask_and_apply(
        self,
        request: HttpRequest,
        queryset: QuerySet[FSMRecord],
        bulk: Bulk,
        choose: Choose,
        form: ExtendForm | None = None,
    ) -> HttpResponse | None:
        found = queryset.order_by()[: MOST + 1].count()
        if found > MOST:
            text = _("More than %(most)d conversations are selected. Narrow the list with filters.")
            self.message_user(request, text % {"most": MOST}, messages.ERROR)
            return None
        if "post" not in request.POST or not (form is None or form.is_valid()):
            return self._ask(request, queryset, bulk, form)
        if request.POST.get("expected") != str(found):
            text = _("The number of conversations changed while you were looking: please look again.")
            self.message_user(request, text, messages.WARNING)
            return self._ask(request, queryset, bulk, form)
        self._apply(request, queryset, choose)
        return None

    def _ask(
        self, request: HttpRequest, queryset: QuerySet[FSMRecord], bulk: Bulk, form: ExtendForm | None
    ) -> HttpResponse:
        selected = request.POST.getlist(helpers.ACTION_CHECKBOX_NAME)
        is_across = request.POST.get("select_across") == "1"
        shown = list(queryset.defer("data")[:SHOWN])
        count = queryset.order_by()[: MOST + 1].count()
        rows = [(r, badge(r.current_state), record_expiry(r, clock_of(r))) for r in shown]
        context = {
            **self.admin_site.each_context(request),
            "title": bulk.title,
            "bulk": bulk,
            "form": form,
            "rows": rows,
            "count": count,
            "more": count - len(rows),
            "is_across": is_across,
            "selected": selected[:1] if is_across else selected,
            "checkbox_name": helpers.ACTION_CHECKBOX_NAME,
            "opts": self.opts,
            "media": self.media,
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/fsm_storage/fsmrecord/action_confirmation.html", context)

    def _apply(self, request: HttpRequest, queryset: QuerySet[FSMRecord], choose: Choose) -> None:
        ids = list(queryset.order_by("pk").values_list("pk", flat=True))
        changed = 0
        try:
            for start in range(0, len(ids), BATCH):
                changed += self._apply_batch(request, ids[start : start + BATCH], choose)
        except (FSMStorageError, OperationalError) as error:
            self.message_user(request, _("Stopped: %(error)s") % {"error": error}, messages.ERROR)
        text = ngettext(
            "%(count)d conversation was changed.", "%(count)d conversations were changed.", changed
        )
        level = messages.SUCCESS if changed else messages.WARNING
        self.message_user(request, text % {"count": changed}, level)
        if changed < len(ids):
            text = _("%(count)d had nothing to change.") % {"count": len(ids) - changed}
            self.message_user(request, text, messages.INFO)

    def _apply_batch(self, request: HttpRequest, ids: list[int], choose: Choose) -> int:
        """Change one batch; return how many were changed.

        A transaction with its log entries for each kind of change, not one for all: rows are locked
        in one order within a statement only, and a bot that writes meanwhile must not deadlock.
        """
        groups: dict[str, list[tuple[FSMRecord, Changes]]] = {}
        for record in FSMRecord.objects.with_clock().filter(pk__in=ids):
            changes = _effective(record, choose(record))
            if changes:
                groups.setdefault(_kind(changes), []).append((record, changes))
        for group in groups.values():
            with logged(request.user, [(record, noted(record, changes)) for record, changes in group]):
                records = FSMRecord.objects.filter(pk__in=[record.pk for record, _changes in group])
                records.edit(**group[0][1].as_arguments(), by=request.user)
        return sum(map(len, groups.values()))


def _effective(record: FSMRecord, changes: Changes) -> Changes:
    """Return `changes` without the parts that `record` has already."""
    state = KEEP if changes.state == record.current_state else changes.state
    data = KEEP if changes.data == record.current_data else changes.data
    return Changes(state, data, changes.state_ttl, changes.data_ttl)


def _kind(changes: Changes) -> str:
    """Return what changes have in common that one statement can carry out together."""
    return ",".join(name for name, value in vars(changes).items() if value is not KEEP)


def _extension(record: FSMRecord, duration: timedelta, rights: Rights) -> Changes:
    """Return what lets each part of `record` that may be changed live for `duration` at least."""
    now = clock_of(record)

    def is_due(expires_at: datetime | None) -> bool:
        return expires_at is not None and now < expires_at < now + duration

    return Changes(
        state_ttl=duration if rights.change_state and is_due(record.state_expires_at) else KEEP,
        data_ttl=duration if rights.change_data and is_due(record.data_expires_at) else KEEP,
    )


def _next(lines: Iterator[str]) -> str | None:
    return next(lines, None)


async def _in_threads(lines: Iterator[str]) -> AsyncIterator[str]:
    while (line := await sync_to_async(_next)(lines)) is not None:
        yield line
