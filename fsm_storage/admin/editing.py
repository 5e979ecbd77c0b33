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

from fsm_storage.admin.comparing import data_differences
from fsm_storage.admin.forms import RecordForm
from fsm_storage.admin.jsontext import pretty
from fsm_storage.admin.log import logged, told
from fsm_storage.admin.presentation import ago, badge, clock_of, expiry
from fsm_storage.admin.transitions import timeline
from fsm_storage.discovery import declared_states
from fsm_storage.exceptions import (
    FSMStorageError,
    InvalidData,
    InvalidDataType,
    InvalidState,
    VersionConflict,
)
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[FSMRecord]
else:
    Base = object

OVERWRITE = "_overwrite"
TIMELINE_LENGTH = 50


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
        form = RecordForm(record, request.POST)
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
        return self._gone(request, object_id) if record is None else self._render(request, record)

    def _save(self, request: HttpRequest, record: FSMRecord, form: RecordForm) -> HttpResponse:
        changes, version = form.changes, _version_meant(request, form)
        if record.version != version:
            return self._conflict(request, record, form)
        try:
            with logged(request.user, [(record, told(record, changes))]):
                record.edit(**changes.as_arguments(), if_version=version, by=request.user)
        except VersionConflict:
            return self._conflict(request, self._find(request, str(record.pk)), form)
        except FSMStorageError as error:
            form.add_error(_field_at_fault(error), str(error))
            return self._render(request, record, form)
        except OperationalError as error:
            form.add_error(None, _("The database did not take the change: %(error)s") % {"error": error})
            return self._render(request, record, form)
        self._warn_if_undeclared(request, changes.state)
        return self.response_change(request, record)

    def _conflict(self, request: HttpRequest, record: FSMRecord | None, form: RecordForm) -> HttpResponse:
        """Show the page again with yours, theirs and what you opened; nothing was written."""
        if record is None:
            return self._gone(request, "")
        opened_state, opened_data = form.opened
        yours = opened_data if form.changes.data is KEEP else form.changes.data
        conflict = {
            "opened_state": badge(opened_state),
            "their_state": badge(record.current_state),
            "your_state": badge(form.yours),
            "state_by_them": record.current_state != opened_state,
            "state_by_you": form.changes.state is not KEEP,
            "keys": data_differences(opened_data, record.current_data, yours),
            "version": record.version,
            "changed": ago(record.updated_at, clock_of(record)),
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
        can_change = self.has_change_permission(request, record)
        form = form or RecordForm(record)
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
            **self._facts(request, record),
            **(extra or {}),
        }
        return self.render_change_form(request, context, change=True, obj=record)

    def _facts(self, request: HttpRequest, record: FSMRecord) -> dict[str, Any]:
        now, state = clock_of(record), record.current_state
        rows = timeline(record, TIMELINE_LENGTH + 1)
        return {
            "state_badge": badge(state),
            "is_undeclared": state is not None and state not in declared_states(),
            "state_expiry": expiry(record.state_expires_at, now) if record.state is not None else "",
            "expired_state": badge(record.state) if state is None and record.state is not None else "",
            "data_expiry": "" if record.data == {} else expiry(record.data_expires_at, now),
            "data_text": pretty(record.current_data),
            "data_is_object": isinstance(record.current_data, dict),
            "created": ago(record.created_at, now),
            "updated": ago(record.updated_at, now),
            "timeline": rows[:TIMELINE_LENGTH],
            "has_older": len(rows) > TIMELINE_LENGTH,
            "can_see_transitions": request.user.has_perm("fsm_storage.view_fsmtransition"),
        }

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
            return HttpResponseRedirect(request.get_full_path())
        return self.response_post_save_change(request, record)


def _version_meant(request: HttpRequest, form: RecordForm) -> int:
    """Return the version to write upon: the one that was opened, or the one that is to be overwritten."""
    shown = request.POST.get(OVERWRITE, "")
    return int(shown) if shown.isdecimal() and len(shown) < 20 else int(form.cleaned_data["version"])


def _field_at_fault(error: FSMStorageError) -> str | None:
    if isinstance(error, InvalidState):
        return "other_state"
    return "data_json" if isinstance(error, InvalidData | InvalidDataType) else None
