"""What can be done to many conversations at once: asked for in the list, shown first, done, and undone.

The way goes from the list's action to a dry run, which carries what was selected signed, from there
to the work, and to a page with what became of each record, from which it can be undone.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core import signing
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import Count, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect, QueryDict
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin import bulkwork
from fsm_storage.admin.bulk import ACTIONS, UNDO, Action, Impossible, effective
from fsm_storage.admin.comparing import data_changes
from fsm_storage.admin.export import export
from fsm_storage.admin.forms import Changes, from_option
from fsm_storage.admin.log import noted, told_ttls
from fsm_storage.admin.presentation import ago, badge, clock_of, record_expiry
from fsm_storage.models import FSMBulk, FSMBulkItem, FSMRecord
from fsm_storage.patches import KEEP
from fsm_storage.rights import mask_for, rights_of

if TYPE_CHECKING:
    Base = admin.ModelAdmin[FSMRecord]
else:
    Base = object

SALT = "fsm_storage.bulk"
VALID_SECONDS = 3600
"""How long what a dry run has shown can still be carried out."""
SAMPLE = 20
WORK_SECONDS = 5.0
"""How long a request works before it shows how far it came."""
RESULTS_PER_PAGE = 100


class Selection(NamedTuple):
    """What is to be done to which conversations, as it stands in the signed text that the dry run carries."""

    user: int
    action: str
    filter: str | None
    """The list's address after the "?": all that match it; or None."""
    ids: list[int]
    number: int
    arguments: dict[str, str] | None
    """What was typed, once the dry run has shown what comes of it."""

    def signed(self) -> str:
        return signing.dumps(list(self), salt=SALT, compress=True)


class ActionsMixin(Base):
    """The actions of `RecordAdmin`, and the pages to which they lead."""

    actions = [*ACTIONS, "export_jsonl"]

    def get_urls(self) -> list[URLPattern]:
        view, name = self.admin_site.admin_view, "fsm_storage_fsmrecord_bulk"
        return [
            path("bulk/", view(self.bulk_view), name=name),
            path("bulk/<int:bulk_id>/", view(self.bulk_result_view), name=f"{name}_result"),
            path("bulk/<int:bulk_id>/undo/", view(self.bulk_undo_view), name=f"{name}_undo"),
            *super().get_urls(),
        ]

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """Offer what the user may do. Django says since 6.1 for which place."""
        place = {} if action_location is None else {"action_location": action_location}
        rights, actions = rights_of(request.user), super().get_actions(request, **place)
        return {
            name: action
            for name, action in actions.items()
            if name not in ACTIONS or ACTIONS[name].is_allowed(rights)
        }

    def has_export_permission(self, request: HttpRequest) -> bool:
        return rights_of(request.user).export

    @admin.action(
        description=gettext_lazy("Export selected conversations as JSON lines"), permissions=["export"]
    )
    def export_jsonl(self, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponseBase:
        return export(request, queryset)

    def _ask_about(
        self, request: HttpRequest, queryset: QuerySet[FSMRecord], name: str
    ) -> HttpResponse | None:
        """Begin an action of the list: show what is selected."""
        count = _count(queryset)
        if count > bulkwork.MOST:
            text = _("More than %(most)d conversations are selected. Narrow the list with filters.")
            self.message_user(request, text % {"most": bulkwork.MOST}, messages.ERROR)
            return None
        is_across = request.POST.get("select_across") == "1"
        ids = [] if is_across else [int(pk) for pk in queryset.order_by("pk").values_list("pk", flat=True)]
        selection = Selection(
            int(request.user.pk or 0), name, request.GET.urlencode() if is_across else None, ids, count, None
        )
        return self._dry_run(request, selection, queryset)

    def bulk_view(self, request: HttpRequest) -> HttpResponse:
        """Show what was asked would do, or, when it has been shown, do it."""
        if not rights_of(request.user).bulk:
            raise PermissionDenied
        if request.method != "POST":
            return HttpResponseRedirect(self._list_url())
        selection = self._read_selection(request)
        if selection is None:
            text = _(
                "What this page showed is too old, or was changed on its way. Nothing was done: select again."
            )
            return self._back_to_list(request, text)
        action = ACTIONS[selection.action]
        if not action.is_allowed(rights_of(request.user)):
            raise PermissionDenied
        try:
            queryset = self._selected(request, selection)
        except IncorrectLookupParameters:
            return self._back_to_list(request, _("The filter means nothing any more. Nothing was done."))
        count = _count(queryset)
        if count != selection.number:
            text = _(
                "%(before)d conversations were selected, now it would be %(now)d. Nothing was done: look again."
            )
            self.message_user(request, text % {"before": selection.number, "now": count}, messages.WARNING)
            response = self._dry_run(request, selection._replace(number=count, arguments=None), queryset)
            response.status_code = 409
            return response
        if selection.arguments is None or "run" not in request.POST:
            return self._dry_run(request, selection, queryset)
        return self._start(request, action, selection.arguments, queryset)

    def _start(
        self, request: HttpRequest, action: Action, typed: dict[str, str], queryset: QuerySet[FSMRecord]
    ) -> HttpResponse:
        found = queryset.order_by("pk").values_list("pk", "key")[: bulkwork.MOST]
        return self._work(request, bulkwork.start(action, typed, found, request.user))

    def _dry_run(
        self, request: HttpRequest, selection: Selection, queryset: QuerySet[FSMRecord]
    ) -> TemplateResponse:
        """Show a sample of what is selected, and, when the arguments are there, what would become of it."""
        action = ACTIONS[selection.action]
        form = action.form(request.POST if "ask" in request.POST else None) if action.form else None
        is_ready = form is None or (form.is_bound and form.is_valid())
        arguments = form.cleaned_data if form and is_ready else {}
        typed = {name: request.POST.get(name, "") for name in form.fields} if form else {}
        selection = selection._replace(arguments=typed if is_ready else None)
        rows = [self._row(request, action, arguments, is_ready, record) for record in queryset[:SAMPLE]]
        context = {
            "title": action.title,
            "action": action,
            "form": form,
            "typed": [(form[name].label, _as_read(name, text)) for name, text in typed.items() if text]
            if form
            else [],
            "is_ready": is_ready,
            "token": selection.signed(),
            "rows": rows,
            "count": selection.number,
            "more": selection.number - len(rows),
            "list_query": selection.filter or "",
        }
        return self._show(request, "bulk.html", context)

    def _row(
        self,
        request: HttpRequest,
        action: Action,
        arguments: dict[str, Any],
        is_ready: bool,
        record: FSMRecord,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "key": record.key,
            "state": badge(record.current_state),
            "expiry": record_expiry(record, clock_of(record)),
        }
        if not is_ready:
            return row
        try:
            changes = effective(record, action.choose(record, arguments, rights_of(request.user)))
        except Impossible as error:
            return {**row, "problem": str(error)}
        mask = mask_for(request.user)
        if changes.state is not KEEP:
            row["new_state"] = badge(changes.state)
        if changes.data is not KEEP:
            row["changes"] = data_changes(record.current_data, changes.data, mask)
        ttls = Changes(state_ttl=changes.state_ttl, data_ttl=changes.data_ttl)
        return {**row, "ttls": list(told_ttls(noted(record, ttls))), "is_same": not changes}

    def bulk_result_view(self, request: HttpRequest, bulk_id: int) -> HttpResponse:
        """Show what became of each record; go on with what waits."""
        bulk = self._find_bulk(request, bulk_id)
        if request.method == "POST":
            return self._work(request, bulk)
        counts = dict(bulk.items.values_list("outcome").annotate(number=Count("pk")))
        outcome = request.GET.get("outcome", "")
        items = bulk.items.order_by("id")
        shown = items.filter(outcome=outcome) if outcome in FSMBulkItem.Outcome.values else items
        pages = Paginator(shown, RESULTS_PER_PAGE)
        action = bulkwork.action_of(bulk)
        context = {
            "title": _("Undo: %(action)s") % {"action": action.title}
            if bulk.action == UNDO
            else action.title,
            "bulk": bulk,
            "at": ago(bulk.created_at, timezone.now()),
            "total": sum(counts.values()),
            "waiting": counts.get(FSMBulkItem.Outcome.WAITING, 0),
            "done": sum(counts.values()) - counts.get(FSMBulkItem.Outcome.WAITING, 0),
            "changed": counts.get(FSMBulkItem.Outcome.CHANGED, 0),
            "counts": [(one, counts[one]) for one in FSMBulkItem.Outcome if counts.get(one)],
            "outcome": outcome,
            "page": pages.get_page(request.GET.get("p")),
            "undone_by": bulk.undone_by.order_by("-id").first(),
        }
        return self._show(request, "bulk_result.html", context)

    def bulk_undo_view(self, request: HttpRequest, bulk_id: int) -> HttpResponse:
        bulk = self._find_bulk(request, bulk_id)
        if request.method != "POST":
            return HttpResponseRedirect(self._bulk_url("_result", bulk.pk))
        return self._work(request, bulkwork.start_undo(bulk, request.user))

    def _work(self, request: HttpRequest, bulk: FSMBulk) -> HttpResponse:
        action, arguments = bulkwork.action_of(bulk), {}
        if action.form and bulk.action != UNDO:
            form = action.form(bulk.arguments)
            form.is_valid()  # as it was when the dry run was shown
            arguments = form.cleaned_data
        try:
            bulkwork.work(bulk, arguments, request.user, rights_of(request.user), WORK_SECONDS)
        except bulkwork.Stopped as error:
            text = _("Stopped: %(error)s. Go on when it works again.")
            self.message_user(request, text % {"error": error}, messages.ERROR)
        return HttpResponseRedirect(self._bulk_url("_result", bulk.pk))

    def _find_bulk(self, request: HttpRequest, bulk_id: int) -> FSMBulk:
        """Return a change of many, for those who may do what it did."""
        bulk = FSMBulk.objects.filter(pk=bulk_id).first()
        if not rights_of(request.user).bulk:
            raise PermissionDenied
        if bulk is None:
            raise Http404(_("There is no such change of many. They are kept for 30 days."))
        if not bulkwork.action_of(bulk).is_allowed(rights_of(request.user)):
            raise PermissionDenied
        return bulk

    def _read_selection(self, request: HttpRequest) -> Selection | None:
        try:
            found = signing.loads(request.POST.get("token", ""), salt=SALT, max_age=VALID_SECONDS)
        except signing.BadSignature:
            return None
        selection = Selection(*found)
        return selection if selection.user == request.user.pk else None

    def _selected(self, request: HttpRequest, selection: Selection) -> QuerySet[FSMRecord]:
        """Return what is selected, as of now. Raises `IncorrectLookupParameters`."""
        if selection.filter is None:
            return self.get_queryset(request).filter(pk__in=selection.ids)
        listed = copy(request)
        listed.GET = QueryDict(selection.filter)
        changelist = self.get_changelist_instance(listed)
        return changelist.get_queryset(listed)

    def _back_to_list(self, request: HttpRequest, text: str) -> HttpResponse:
        self.message_user(request, text, messages.ERROR)
        return HttpResponseRedirect(self._list_url())

    def _list_url(self) -> str:
        return reverse("admin:fsm_storage_fsmrecord_changelist", current_app=self.admin_site.name)

    def _bulk_url(self, suffix: str, *args: int) -> str:
        return reverse(
            f"admin:fsm_storage_fsmrecord_bulk{suffix}", args=args, current_app=self.admin_site.name
        )

    def _show(self, request: HttpRequest, template: str, context: dict[str, Any]) -> TemplateResponse:
        request.current_app = self.admin_site.name
        whole = {**self.admin_site.each_context(request), "opts": self.opts, "media": self.media, **context}
        return TemplateResponse(request, f"admin/fsm_storage/fsmrecord/{template}", whole)


def _as_read(name: str, text: str) -> str:
    """Return what was typed or chosen as people read it: an option of the list of states is no state's name."""
    return text if name != "state" else badge(from_option(text))


def _count(queryset: QuerySet[FSMRecord]) -> int:
    return int(queryset.order_by()[: bulkwork.MOST + 1].count())


def _list_action(name: str) -> Any:
    """Return the function that Django calls when an action is chosen in the list."""

    @admin.action(description=cast(str, ACTIONS[name].title))
    def begin(self: ActionsMixin, request: HttpRequest, queryset: QuerySet[FSMRecord]) -> HttpResponse | None:
        return self._ask_about(request, queryset, name)

    return begin


for _name in ACTIONS:
    setattr(ActionsMixin, _name, _list_action(_name))
