"""Funnels: how many conversations come from step to step, who they are, and the figures as CSV. Reads only."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.urls import URLPattern, path
from django.utils.dateparse import parse_datetime
from django.utils.http import content_disposition_header
from django.utils.timezone import is_aware
from django.utils.translation import gettext as _

from fsm_storage.admin.choosing import Choice, choice_of, offers
from fsm_storage.admin.filters import from_parameter, to_parameter
from fsm_storage.admin.mapping import MappingMixin
from fsm_storage.admin.presentation import badge, instant, local
from fsm_storage.discovery import is_within
from fsm_storage.durations import in_words
from fsm_storage.figures import Funnel, funnel, median, runs_with
from fsm_storage.keys import MAX_STATE_LENGTH
from fsm_storage.models import FSMRecord, FSMRun
from fsm_storage.statemap import groups_of, states_known

MAX_STEPS = 12
PEOPLE_PER_PAGE = 100
_UNSAFE = ("=", "+", "-", "@", "\t", "\r", "\n")


class Row(NamedTuple):
    """A step as it is shown. Rates are parts of one, None where there is nobody to be a part of."""

    state: str
    reached: int
    left: int
    of_before: float | None
    of_first: float | None
    median_seconds: float | None


def rows_of(found: Funnel) -> list[Row]:
    """Return the figures of each step; whoever is in the last one has not left."""
    reached = [step.reached for step in found.steps]
    rows = []
    for at, step in enumerate(found.steps):
        time = median(step.spans)
        rows.append(
            Row(
                step.state,
                reached[at],
                reached[at] - reached[at + 1] if at + 1 < len(reached) else 0,
                _part(reached[at], reached[at - 1]) if at else None,
                _part(reached[at], reached[0]),
                None if time is None else time.total_seconds(),
            )
        )
    return rows


class FunnelMixin(MappingMixin):
    """The pages of the funnel, for `RecordAdmin`."""

    if TYPE_CHECKING:

        def has_export_permission(self, request: HttpRequest) -> bool: ...

    def get_urls(self) -> list[URLPattern]:
        views = {"funnel": self.funnel_view, "people": self.people_view, "csv": self.funnel_csv_view}
        places = {"funnel": "funnel/", "people": "funnel/people/", "csv": "funnel/csv/"}
        own = [
            path(places[name], self.admin_site.admin_view(view), name=self._name(name))
            for name, view in views.items()
        ]
        return [*own, *super().get_urls()]

    def funnel_view(self, request: HttpRequest) -> HttpResponse:
        """Show the funnel through the chosen states, in the chosen order."""
        choice, steps, errors, known = self._asked(request)
        found = funnel(steps, choice.scope) if steps else None
        rows = rows_of(found) if found else []
        states = [state for state in known if choice.group is None or is_within(choice.group, state)]
        context = {
            "title": _("Funnel"),
            "rows": [self._shown(row, at, choice, steps) for at, row in enumerate(rows)],
            "freshness": found.freshness if found else None,
            "map_url": f"{self._url('map')}?{choice.query()}",
            "csv_url": f"{self._url('csv')}?{self._query(choice, steps)}"
            if rows and self.has_export_permission(request)
            else "",
            **offers(choice, known),
            "more_fields": _step_fields(steps, states),
            "errors": (*choice.errors, *errors),
        }
        return self.figures_page(request, "funnel", context)

    def people_view(self, request: HttpRequest) -> HttpResponse:
        """List the conversations behind a number of the funnel, the last one first."""
        choice, steps, errors, _known = self._asked(request)
        at, before = _step_asked(request, len(steps)), _place_asked(request)
        only_left = request.GET.get("who") == "left"
        found = funnel(steps, choice.scope, has_times=False)
        fits = [path for path, depth in found.depths.items() if (depth == at if only_left else depth >= at)]
        runs = runs_with(fits, choice.scope, PEOPLE_PER_PAGE + 1, before) if at else []
        more, runs = len(runs) > PEOPLE_PER_PAGE, runs[:PEOPLE_PER_PAGE]
        query = self._query(choice, steps, at=at, who="left" if only_left else "reached")
        context = {
            "title": self._people_title(steps, at, only_left),
            "people": self._people(request, runs),
            "more_url": f"?{query}&before={quote(runs[-1].started_at.isoformat())}_{runs[-1].pk}"
            if more
            else "",
            "funnel_url": f"{self._url('funnel')}?{self._query(choice, steps)}",
            "freshness": found.freshness,
            "errors": (*choice.errors, *errors),
        }
        return self.figures_page(request, "people", context)

    def funnel_csv_view(self, request: HttpRequest) -> HttpResponse:
        """Give the figures of the funnel as a file."""
        if not self.has_export_permission(request):
            raise PermissionDenied
        choice, steps, _errors, _known = self._asked(request)
        response = HttpResponse(content_type="text/csv; charset=utf-8")
        response["Content-Disposition"] = content_disposition_header(True, "funnel.csv")
        writer = csv.writer(response)
        head = [
            "step",
            "state",
            "reached",
            "left",
            "rate_of_step_before",
            "rate_of_first_step",
            "median_seconds",
        ]
        writer.writerow(head)
        for at, row in enumerate(rows_of(funnel(steps, choice.scope)), 1):
            numbers = [row.reached, row.left, *map(_rounded, row[3:])]
            writer.writerow([at, as_cell(row.state), *numbers])
        return response

    def _asked(self, request: HttpRequest) -> tuple[Choice, list[str], list[str], list[str]]:
        """Return what was chosen, and all known states.

        Without steps, or with those of another group, they are the states of the group, or of the first one.
        """
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        choice, errors = choice_of(request), []
        given = [from_parameter(text) for text in request.GET.getlist("step") if text]
        steps = list(dict.fromkeys(given))
        if len(steps) < len(given):
            errors.append(_("A state can be a step only once; what was named again is left out."))
        if len(steps) > MAX_STEPS or any(len(step) > MAX_STATE_LENGTH for step in steps):
            errors.append(
                _("A funnel has at most %(count)d steps, each the name of a state.") % {"count": MAX_STEPS}
            )
            steps = [step for step in steps if len(step) <= MAX_STATE_LENGTH][:MAX_STEPS]
        known = states_known(steps)
        if choice.group is None:
            choice = choice._replace(group=next(iter(groups_of(known)), None))
        within = [state for state in known if choice.group is not None and is_within(choice.group, state)]
        if not set(steps) & set(within):
            steps = within[:MAX_STEPS]
        return choice, steps, errors, known

    def _query(self, choice: Choice, steps: Sequence[str], **more: Any) -> str:
        return choice.query(step=[to_parameter(step) for step in steps], **more)

    def _shown(self, row: Row, at: int, choice: Choice, steps: Sequence[str]) -> dict[str, Any]:
        people = f"{self._url('people')}?{self._query(choice, steps, at=at + 1)}"
        return {
            "badge": badge(row.state),
            "reached": f"{row.reached:,}",
            "left": f"{row.left:,}" if at + 1 < len(steps) else "",
            "reached_url": f"{people}&who=reached",
            "left_url": f"{people}&who=left",
            "of_before": _percent(row.of_before),
            "lost": _percent(_part(row.left, row.reached)) if at + 1 < len(steps) else "",
            "of_first": _percent(row.of_first),
            "bar": f"{row.of_first or 0:.4f}",
            "median": "–" if row.median_seconds is None else in_words(timedelta(seconds=row.median_seconds)),
        }

    def _people_title(self, steps: Sequence[str], at: int, only_left: bool) -> str:
        if not at:
            return _("Nobody")
        words = _("Came to %(state)s and no further") if only_left else _("Came to %(state)s")
        return words % {"state": steps[at - 1] or '""'}

    def _people(self, request: HttpRequest, runs: Sequence[FSMRun]) -> list[dict[str, Any]]:
        keys = [run.key for run in runs]
        found = FSMRecord.objects.filter(alias__in={run.alias for run in runs}, key__in=keys)
        records = {(alias, key): pk for pk, alias, key in found.values_list("pk", "alias", "key")}
        return [
            {
                "run": run,
                "chat": str(run.chat_id),
                "user": str(run.user_id),
                "started": instant(run.started_at, local(run.started_at)),
                "now": badge(run.state) if run.state is not None else "",
                "url": self._url("change", pk) if (pk := records.get((run.alias, run.key))) else "",
            }
            for run in runs
        ]


def as_cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_UNSAFE) else text


def _part(count: int, of: int) -> float | None:
    return count / of if of else None


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{part:.1%}"


def _rounded(number: float | None) -> float | str:
    return "" if number is None else round(number, 4)


def _step_fields(steps: Sequence[str], states: Sequence[str]) -> str:
    """Return the selects of the steps, one more than there are steps."""
    offered = [(to_parameter(state), state or '""') for state in dict.fromkeys([*states, *steps])]
    chosen = [to_parameter(step) for step in steps]
    places = [*chosen, ""][:MAX_STEPS]
    context = {"offered": offered, "places": list(enumerate(places, 1))}
    return render_to_string("admin/fsm_storage/fsmrecord/funnel_steps.html", context)


def _step_asked(request: HttpRequest, count: int) -> int:
    """Return the number of the step in the address, from 1, and 0 if there is none like it."""
    text = request.GET.get("at", "")
    return int(text) if text.isdecimal() and len(text) < 4 and 1 <= int(text) <= count else 0


def _place_asked(request: HttpRequest) -> tuple[datetime, int] | None:
    """Return where the page begins: the time and the number of the last conversation before it."""
    at, _line, number = request.GET.get("before", "").partition("_")
    try:
        when = parse_datetime(at)
    except ValueError:
        return None
    if when is None or is_aware(when) != settings.USE_TZ:
        return None
    return (when, int(number)) if number.isdecimal() and len(number) < 19 else None
