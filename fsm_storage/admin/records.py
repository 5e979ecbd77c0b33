"""The list of conversations: columns, search, permissions. The page of one is in `editing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin import filters
from fsm_storage.admin.actions import ActionsMixin
from fsm_storage.admin.changelist import BoundedPaginator, RecordChangeList, page_asked
from fsm_storage.admin.deleting import DeletingMixin
from fsm_storage.admin.editing import EditingMixin
from fsm_storage.admin.funnels import FunnelMixin
from fsm_storage.admin.mapping import MappingMixin
from fsm_storage.admin.presentation import ago, badge, clock_of, labelled, peer, record_expiry
from fsm_storage.admin.theme import STYLES, ModelAdmin
from fsm_storage.admin.watching import WatchingMixin
from fsm_storage.models import FSMRecord, FSMRecordQuerySet
from fsm_storage.rights import mask_for, rights_of
from fsm_storage.search import HELP, SearchError, search

if TYPE_CHECKING:
    Base = ModelAdmin[FSMRecord]
else:
    Base = ModelAdmin


@admin.register(FSMRecord)
class RecordAdmin(WatchingMixin, EditingMixin, DeletingMixin, ActionsMixin, FunnelMixin, MappingMixin, Base):
    """Find a conversation, see where it is and how it got there, mend it without stepping on the bot."""

    list_display = ["chat", "user", "state_now", "expires", "changed", "bot"]
    list_filter = [
        filters.GroupFilter,
        filters.StateFilter,
        filters.ExpiryFilter,
        filters.IdleFilter,
        filters.BotFilter,
    ]
    list_per_page = 50
    ordering = ["-updated_at"]
    sortable_by = ["changed"]
    search_fields = ["chat_id"]  # only says that there is a search; see get_search_results
    search_help_text = HELP
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    change_form_template = "admin/fsm_storage/fsmrecord/change_form.html"

    class Media:
        css = {"all": STYLES}

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Never: a conversation begins with a message to the bot, not with a key typed by hand."""
        return False

    def has_view_permission(self, request: HttpRequest, obj: FSMRecord | None = None) -> bool:
        return rights_of(request.user).view

    def has_change_permission(self, request: HttpRequest, obj: FSMRecord | None = None) -> bool:
        return rights_of(request.user).change

    def has_delete_permission(self, request: HttpRequest, obj: FSMRecord | None = None) -> bool:
        return rights_of(request.user).delete

    def get_queryset(self, request: HttpRequest) -> FSMRecordQuerySet:
        records: Any = super().get_queryset(request)
        return records.with_clock()  # type: ignore[no-any-return]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[RecordChangeList]:
        return RecordChangeList

    def get_paginator(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Paginator[Any]:
        return BoundedPaginator(*args, **kwargs, page_asked=page_asked(request))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[FSMRecord], search_term: str
    ) -> tuple[QuerySet[FSMRecord], bool]:
        """Search as `search.search` does; what it cannot read finds nothing and says why."""
        try:
            return search(queryset, search_term, mask_for(request.user)), False  # type: ignore[arg-type]
        except SearchError as error:
            self.message_user(request, str(error), messages.ERROR)
            return queryset.none(), False

    @admin.display(description=gettext_lazy("chat"))
    def chat(self, record: FSMRecord) -> SafeString:
        places = [
            (_("topic %(thread)d") % {"thread": record.thread_id}) if record.thread_id is not None else "",
            record.business_connection_id or "",
            record.destiny if record.destiny != "default" else "",
            record.alias if record.alias != "default" else "",
        ]
        extra = format_html_join("", ' <span class="fsm-place">{}</span>', ((p,) for p in places if p))
        return labelled(_("Chat"), format_html("{}{}", peer(record, record.chat_id), extra))

    @admin.display(description=gettext_lazy("user"))
    def user(self, record: FSMRecord) -> SafeString:
        return labelled(_("User"), peer(record, record.user_id))

    @admin.display(description=gettext_lazy("bot"))
    def bot(self, record: FSMRecord) -> SafeString:
        return labelled(_("Bot"), record.bot_id)

    @admin.display(description=gettext_lazy("state"))
    def state_now(self, record: FSMRecord) -> SafeString:
        return labelled(_("State"), badge(record.current_state))

    @admin.display(description=gettext_lazy("expires"))
    def expires(self, record: FSMRecord) -> SafeString:
        return labelled(_("Expires"), record_expiry(record, clock_of(record)))

    @admin.display(description=gettext_lazy("changed"), ordering="updated_at")
    def changed(self, record: FSMRecord) -> SafeString:
        return labelled(_("Changed"), ago(record.updated_at, clock_of(record)))
