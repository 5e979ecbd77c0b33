"""Pages that follow what happens: what their script needs to know, and the mark by which it sees a change."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.messages.storage.base import BaseStorage
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import URLPattern, path, reverse
from django.utils.cache import get_conditional_response
from django.utils.http import quote_etag

from fsm_storage.models import FSMRecord
from fsm_storage.rights import option

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[FSMRecord]
else:
    Base = object

POLL_SECONDS = 5.0
"""Between two looks at the mark, where no websocket tells; a tab in the background looks six times less."""
BACKGROUND = "X-FSM-Background"
"""The header of a request that the page's script makes, not a person."""

GONE = "gone"
"""The mark of a conversation that is not in the database any more."""

LIST_PARTS = "#result_list, .fsm-count"  # the table: Unfold gives each row a tbody of its own
RECORD_PARTS = "#fsm-lease, .fsm-facts, #fsm-state-now, .fsm-expiry-line > .fsm-now, #fsm-data-now, #timeline"
MAP_PARTS = ".fsm-map-frame > .fsm-map, .fsm-tables tbody"
"""Which elements the script renews, by CSS selectors: nothing in which anybody types."""


class WatchingMixin(Base):
    """The address of the marks, for `RecordAdmin`, and pages that are fetched in the background."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.mark_view)
        name = f"{self.opts.app_label}_{self.opts.model_name}_mark"
        return [path("mark/", view, name=name), *super().get_urls()]

    def mark_view(self, request: HttpRequest) -> HttpResponse:
        """Answer the mark of all conversations, or of `record`; 304 if it is the one of `If-None-Match`."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        record = self.get_object(request, request.GET["record"]) if "record" in request.GET else None
        mark = GONE if "record" in request.GET and record is None else mark_of(record)
        etag = quote_etag(mark)
        response = JsonResponse({"mark": mark}, headers={"ETag": etag})
        return get_conditional_response(request, etag=etag, response=response) or response

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        live = {"live": live_parts(self.admin_site.name, request, LIST_PARTS)}
        return super().changelist_view(request, {**(extra_context or {}), **live})


def live_parts(
    site: str, request: HttpRequest, parts: str, record: FSMRecord | None = None
) -> dict[str, Any] | None:
    """Return what `live.html` tells the script of a page; None where pages shall stand still."""
    socket = option("LIVE")
    if socket is False:
        return None
    if BACKGROUND in request.headers:
        # What shall be said to a person waits for a page that a person looks at.
        request._messages = _NoMessages(request)  # type: ignore[attr-defined]
    backend = getattr(settings, "CHANNEL_LAYERS", {}).get("default", {}).get("BACKEND")
    query = "" if record is None else f"?record={record.pk}"
    return {
        "parts": parts,
        "record": record,
        "mark": mark_of(record),
        "mark_url": reverse("admin:fsm_storage_fsmrecord_mark", current_app=site) + query,
        "every": POLL_SECONDS,
        "socket": socket if backend and find_spec("channels") else None,
        "reaches_all": backend != "channels.layers.InMemoryChannelLayer",
    }


def mark_of(record: FSMRecord | None) -> str:
    """Return a text that is another one after a change: of one conversation, or of any."""
    if record is not None:
        return str(record.version)
    newest = FSMRecord.objects.order_by("-updated_at").values_list("updated_at", "version").first()
    return "" if newest is None else f"{newest[0].timestamp():.6f}.{newest[1]}"


class _NoMessages(BaseStorage):
    """Has no messages and keeps none."""

    def _get(self, *args: Any, **kwargs: Any) -> tuple[list[Any], bool]:
        return [], True

    def _store(self, messages: Any, response: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return []
