"""The map of the states, and the way of one conversation on it. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.translation import gettext as _

from fsm_storage.admin.choosing import Choice, choice_of, offers
from fsm_storage.admin.filters import NO_STATE, to_parameter
from fsm_storage.admin.presentation import ago, badge, clock_of
from fsm_storage.admin.watching import MAP_PARTS, live_parts
from fsm_storage.durations import in_words
from fsm_storage.models import FSMRecord, FSMTransition
from fsm_storage.picture import NO_WALK, Walk, live_text, name_of, picture
from fsm_storage.statemap import STAYS, Kind, Place, StateMap, state_map, states_known, way_of

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[FSMRecord]
else:
    Base = object

LONGEST_WAY = 300
STEPS_SHOWN = 15


class MappingMixin(Base):
    """The page of the map, for `RecordAdmin`."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.map_view)
        return [path("map/", view, name=self._name("map")), *super().get_urls()]

    def map_view(self, request: HttpRequest) -> HttpResponse:
        """Show the map of a group, a time and a bot; with `record`, the way of that conversation."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        live = live_parts(self.admin_site.name, request, MAP_PARTS)  # first: no change falls between
        choice = choice_of(request)
        replay = self._replay(request, choice) if "record" in request.GET else None
        way = replay["way"] if replay else []
        known = states_known()
        shown = state_map(choice.scope, known, None if replay else choice.group, [w for _row, w in way])
        walk = replay["walk"] if replay else NO_WALK
        context = {
            "title": _("Map"),
            "shown": shown,
            "picture": picture(shown, lambda place: self._place_url(place, choice), walk),
            "replay": replay,
            "legend": list(enumerate(_legend())),
            "freshness": shown.freshness,
            "funnel_url": f"{self._url('funnel')}?{choice.query()}",
            "offers_all_groups": True,
            **self._tables(shown, choice),
            **offers(choice, known),
            "live": live,
        }
        if replay:
            context["kept"] = [("record", replay["record"].pk), ("step", replay["at"])]
            context["errors"] = (*context["errors"], *replay["errors"])
        return self.figures_page(request, "map", context)

    def figures_page(self, request: HttpRequest, page: str, context: dict[str, Any]) -> HttpResponse:
        """Render a page of figures within the admin."""
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request,
            f"admin/fsm_storage/fsmrecord/{page}.html",
            {**self.admin_site.each_context(request), "opts": self.opts, "media": self.media, **context},
        )

    def _name(self, page: str) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_{page}"

    def _url(self, page: str, *args: Any) -> str:
        return reverse(f"admin:{self._name(page)}", args=args, current_app=self.admin_site.name)

    def _place_url(self, place: Place, choice: Choice) -> str:
        """Return the list of the conversations in a place."""
        bot = {} if choice.bot is None else {"bot": choice.bot}
        match place.kind:
            case Kind.STATE:
                query: dict[str, Any] = {"state": to_parameter(place.state)}
            case Kind.CLEARED:
                query = {"state": NO_STATE}
            case Kind.EXPIRED:
                query = {"expires": "expired"}
            case _other:
                query = {}
        return f"{self._url('changelist')}?{urlencode({**query, **bot})}"

    def _tables(self, shown: StateMap, choice: Choice) -> dict[str, Any]:
        states = [
            {
                "badge": badge(node.place.state),
                "url": self._place_url(node.place, choice),
                "live": live_text(node),
                "stay": in_words(node.stay) if node.stay is not None else "–",
            }
            for node in shown.nodes
            if node.place.kind is Kind.STATE
        ]
        ways = [
            {"source": name_of(source), "target": name_of(target), "count": f"{count:,}"}
            for (source, target), count in shown.arrows.most_common()
        ]
        return {"states": states, "ways": ways}

    def _replay(self, request: HttpRequest, choice: Choice) -> dict[str, Any] | None:
        record = self.get_object(request, request.GET["record"])
        if record is None or not self.has_view_or_change_permission(request, record):
            self.message_user(request, _("This conversation is not in the database any more."), "warning")
            return None
        way, errors = _way(record), []
        at = len(way)
        try:
            at = int(request.GET.get("step", at))
        except ValueError:
            errors.append(_("“%(text)s” is no step.") % {"text": request.GET["step"][:50]})
        at = max(min(at, len(way)), min(1, len(way)))
        first = max(0, min(at - STEPS_SHOWN // 2, len(way) - STEPS_SHOWN))
        urls = [f"?{choice.query(record=record.pk, step=step)}" for step in range(1, len(way) + 1)]
        now = clock_of(record)
        shown = [
            {"source": name_of(source), "target": name_of(target), "when": ago(row.at, now)}
            | {"url": urls[place], "is_here": place + 1 == at}
            for place, (row, (source, target)) in enumerate(way[first : first + STEPS_SHOWN], first)
        ]
        return {
            "record": record,
            "way": way,
            "walk": Walk(frozenset(w for _row, w in way[:at]), way[at - 1][1][1] if at else None),
            "errors": errors,
            "steps": way,
            "shown": shown,
            "first": first + 1,
            "at": at,
            "previous_url": urls[at - 2] if at > 1 else "",
            "next_url": urls[at] if at < len(way) else "",
            "record_url": self._url("change", record.pk),
            "leave_url": f"?{choice.query()}",
        }


def _way(record: FSMRecord) -> Sequence[tuple[FSMTransition, tuple[Place, Place]]]:
    """Return the record's last moves, oldest first, and the ways that they took."""
    found = FSMTransition.objects.of(record).defer("data_before", "data_after")[:LONGEST_WAY]
    moves = [row for row in reversed(found) if row.from_state != row.to_state]
    return [
        (row, way_of(row.from_state, row.to_state, row.source == FSMTransition.Source.EXPIRY))
        for row in moves
    ]


def _legend() -> list[str]:
    words = [in_words(border) for border in STAYS]
    pairs = pairwise(words)
    return [
        _("under %(time)s") % {"time": words[0]},
        *(_("%(from)s to %(to)s") % {"from": low, "to": high} for low, high in pairs),
        _("over %(time)s") % {"time": words[-1]},
    ]
