"""The list of all changes of all conversations. Nothing is changed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin.changelist import BoundedPaginator, TransitionChangeList, page_asked
from fsm_storage.admin.presentation import instant, labelled, local
from fsm_storage.admin.theme import STYLES, ModelAdmin
from fsm_storage.admin.timeline import change
from fsm_storage.models import FSMTransition
from fsm_storage.rights import rights_of

if TYPE_CHECKING:
    Base = ModelAdmin[FSMTransition]
else:
    Base = ModelAdmin


@admin.register(FSMTransition)
class TransitionAdmin(Base):
    """A list to read, newest first; of one conversation when it is opened from there."""

    list_display = ["when", "conversation", "what", "cause"]
    list_display_links = None
    list_filter = ["source"]
    list_per_page = 100
    ordering = ["-id"]
    sortable_by = ()
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = None

    class Media:
        css = {"all": STYLES}

    def has_view_permission(self, request: HttpRequest, obj: FSMTransition | None = None) -> bool:
        """Whoever may not see conversations does not see their keys, states and people here either."""
        return super().has_view_permission(request, obj) and rights_of(request.user).view

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: FSMTransition | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: FSMTransition | None = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: FSMTransition | None = None) -> Any:
        fields = [str(field) for field in super().get_fields(request, obj)]
        if rights_of(request.user).view_data:
            return fields
        return [name for name in fields if name not in ("data_before", "data_after")]

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        return lookup in {"alias", "key", "source__exact"}

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[TransitionChangeList]:
        return TransitionChangeList

    def get_paginator(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Paginator[Any]:
        return BoundedPaginator(*args, **kwargs, page_asked=page_asked(request))

    @admin.display(description=gettext_lazy("when"))
    def when(self, transition: FSMTransition) -> SafeString:
        return labelled(_("When"), instant(transition.at, local(transition.at)))

    @admin.display(description=gettext_lazy("conversation"))
    def conversation(self, transition: FSMTransition) -> SafeString:
        url = reverse("admin:fsm_storage_fsmrecord_changelist", current_app=self.admin_site.name)
        link = format_html('<a href="{}?q={}">{}</a>', url, transition.chat_id, transition.key)
        return labelled(_("Conversation"), link)

    @admin.display(description=gettext_lazy("change"))
    def what(self, transition: FSMTransition) -> SafeString:
        return change(transition)

    @admin.display(description=gettext_lazy("by"))
    def cause(self, transition: FSMTransition) -> SafeString:
        text = format_html("{} <b>{}</b>", transition.get_source_display(), transition.actor)
        return labelled(_("By"), text)
