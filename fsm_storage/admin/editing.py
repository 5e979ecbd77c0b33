"""The page of one conversation: shows it, and saves what was typed by compare-and-set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from django.contrib import messages
from django.contrib.admin import helpers
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied, RequestDataTooBig
from django.db import OperationalError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.decorators import method_decorator
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_exempt, csrf_protect

from fsm_storage.admin.errors import told
from fsm_storage.admin.forms import Changes, RecordForm
from fsm_storage.admin.jsontext import compact
from fsm_storage.admin.log import logged, noted
from fsm_storage.admin.merging import Merge
from fsm_storage.admin.page import facts, preview
from fsm_storage.admin.presentation import ago, badge, clock_of, local
from fsm_storage.admin.watching import RECORD_PARTS, live_parts
from fsm_storage.discovery import declared_states
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidData,
    InvalidDataType,
    InvalidState,
    VersionConflict,
)
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.patches import KEEP
from fsm_storage.rights import rights_of

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[FSMRecord]
else:
    Base = object

PREVIEW = "_preview"
RESTORE = "restore"
TRIES = 3
"""How often a change is laid over a conversation that moves on meanwhile, before a person is asked."""


class EditingMixin(Base):
    """The change view of `RecordAdmin`."""

    # The data may be longer than what Django takes in a request; reading the request to look for the
    # token would then end in a bare error page. So the token is checked here, after the size.
    @method_decorator(csrf_exempt)
    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        if request.method != "POST":
            return self._page(request, object_id)
        try:
            request.POST  # noqa: B018 - reads the request
        except RequestDataTooBig:
            return self._too_big(request, object_id)
        return self._checked_post(request, object_id)

    @method_decorator(csrf_protect)
    def _checked_post(self, request: HttpRequest, object_id: str) -> HttpResponse:
        record = self._find(request, object_id)
        if not self.has_change_permission(request, record):
            raise PermissionDenied
        if record is None:
            return self._gone(request, object_id)
        form = RecordForm(record, rights_of(request.user), request.POST)
        if not form.is_valid():
            return self._render(request, record, form)
        if not form.changes:
            self.message_user(request, _("Nothing was changed."), messages.INFO)
            return self._done(request, record)
        return self._save(request, record, form)

    @method_decorator(csrf_protect)
    def _page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        record = self._find(request, object_id)
        if not self.has_view_or_change_permission(request, record):
            raise PermissionDenied
        if record is None:
            return self._gone(request, object_id)
        if RESTORE in request.GET and rights_of(request.user).change:
            return self._restore(request, record)
        return self._render(request, record)

    def _restore(self, request: HttpRequest, record: FSMRecord) -> HttpResponse:
        """Show the form filled in with an earlier point, and what saving it would change."""
        rights, asked = rights_of(request.user), request.GET[RESTORE]
        point = None
        if asked.isascii() and asked.isdigit() and len(asked) < 19:
            point = FSMTransition.objects.of(record).filter(pk=int(asked), data_after__isnull=False).first()
        data = point.data_after if point else None
        if point is None or not isinstance(data, dict) or not (rights.change_state and rights.change_data):
            text = _(
                "This point cannot be restored: the history does not have its data, or you may not change it."
            )
            return self._render(request, record, extra={"page_error": text})
        changes = Changes(
            KEEP if point.to_state == record.current_state else point.to_state,
            KEEP if compact(data) == compact(record.current_data) else data,
        )
        told = _("This brings back how it was at %(time)s.") % {"time": local(point.at)}
        form = RecordForm(record, rights, earlier=(point.to_state, data))
        return self._render(request, record, form, {"preview": preview(record, changes, told)})

    def _save(
        self, request: HttpRequest, record: FSMRecord, form: RecordForm, tries: int = TRIES
    ) -> HttpResponse:
        """Save upon the version in hand: what was typed, or, if that is a newer one, both changes together."""
        merge = Merge(form, record, request.POST)
        if merge.clashes or not tries:
            return self._conflict(request, record, form, merge)
        if PREVIEW in request.POST:
            shown = preview(record, merge.changes, merge.told() if merge.is_needed else "")
            return self._render(request, record, form, {"preview": shown})
        if not merge.changes:
            self.message_user(request, _("The conversation is already as you want it."), messages.INFO)
            return self._done(request, record)
        try:
            with logged(request.user, [(record, noted(record, merge.changes))]):
                record.edit(**merge.changes.as_arguments(), if_version=record.version, by=request.user)
        except VersionConflict:
            newer = self._find(request, str(record.pk))
            return self._gone(request, "") if newer is None else self._save(request, newer, form, tries - 1)
        except (FSMStorageError, OperationalError) as error:
            form.add_error(_field_at_fault(error, form), told(error))
            return self._render(request, record, form)
        if merge.is_needed:
            self.message_user(request, merge.told(), messages.INFO)
        self._warn_if_undeclared(request, merge.changes.state)
        return self.response_change(request, record)

    def _conflict(
        self, request: HttpRequest, record: FSMRecord, form: RecordForm, merge: Merge
    ) -> HttpResponse:
        """Show the page again with yours, theirs and what you opened; nothing was written."""
        conflict = {
            "merge": merge,
            "version": record.version,
            "changed": ago(record.updated_at, clock_of(record)),
        }
        if merge.state:
            conflict |= {
                "opened_state": badge(form.opened_state_value),
                "their_state": badge(record.current_state),
                "your_state": badge(form.your_state),
            }
        response = self._render(request, record, form, {"conflict": conflict})
        response.status_code = 409
        return response

    def _render(
        self,
        request: HttpRequest,
        record: FSMRecord,
        form: RecordForm | None = None,
        extra: dict[str, Any] | None = None,
    ) -> HttpResponse:
        rights = rights_of(request.user)
        can_change = rights.change
        form = form or RecordForm(record, rights)
        action = _("Change %s") if can_change else _("View %s")
        context = {
            **self.admin_site.each_context(request),
            "title": action % self.opts.verbose_name,
            "subtitle": str(record),
            "adminform": helpers.AdminForm(cast(Any, form), [], {}, (), model_admin=self),
            "form": form,
            "object_id": str(record.pk),
            "original": record,
            "is_popup": False,
            "to_field": None,
            "media": self.media,
            "inline_admin_formsets": [],
            "errors": helpers.AdminErrorList(cast(Any, form), []),
            "preserved_filters": self.get_preserved_filters(request),
            "can_change": can_change,
            "rights": rights,
            **facts(request, record),
            "live": live_parts(self.admin_site.name, request, RECORD_PARTS, record),
            **(extra or {}),
        }
        return self.render_change_form(request, context, change=True, obj=record)

    def _find(self, request: HttpRequest, object_id: str) -> FSMRecord | None:
        return self.get_object(request, unquote(object_id))

    def _gone(self, request: HttpRequest, object_id: str) -> HttpResponse:
        text = _("This conversation is not in the database any more, so nothing was saved.")
        if request.method != "POST":
            text = (
                _("There is no conversation with the number %s. Perhaps it ended and was swept.") % object_id
            )
        self.message_user(request, text, messages.WARNING)
        return HttpResponseRedirect(
            reverse("admin:fsm_storage_fsmrecord_changelist", current_app=self.admin_site.name)
        )

    def _too_big(self, request: HttpRequest, object_id: str) -> HttpResponse:
        record = self._find(request, object_id)
        if not self.has_change_permission(request, record):
            raise PermissionDenied
        if record is None:
            return self._gone(request, object_id)
        text = _("That was more data than this server takes in one request, so nothing was saved.")
        response = self._render(request, record, extra={"page_error": text})
        response.status_code = 413
        return response

    def _warn_if_undeclared(self, request: HttpRequest, state: Any) -> None:
        if isinstance(state, str) and state not in declared_states():
            text = _("No app declares the state “%(state)s”: look whether it is spelled right.")
            self.message_user(request, text % {"state": state}, messages.WARNING)

    def _done(self, request: HttpRequest, record: FSMRecord) -> HttpResponse:
        if "_continue" in request.POST:
            return HttpResponseRedirect(request.path)
        return self.response_post_save_change(request, record)


def _field_at_fault(error: Exception, form: RecordForm) -> str | None:
    field = None
    if isinstance(error, InvalidState):
        field = "other_state"
    elif isinstance(error, InvalidData | InvalidDataType):
        field = "data_json"
    return field if field in form.fields else None
