"""What figures are shown about: group, time and bot, as they stand in an address."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.http import HttpRequest, QueryDict
from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin.filters import BOTS_SAMPLE, NO_GROUP, from_parameter, to_parameter
from fsm_storage.figures import WINDOWS, Scope, window_start
from fsm_storage.models import FSMRecord
from fsm_storage.statemap import groups_of

DEFAULT_WINDOW = "24h"
_WORDS: dict[str, str | Promise] = {
    "1h": gettext_lazy("the last hour"),
    "24h": gettext_lazy("24 hours"),
    "7d": gettext_lazy("7 days"),
    "30d": gettext_lazy("30 days"),
}


class Choice(NamedTuple):
    """What was chosen; what could not be read is left out, and named in `errors`."""

    group: str | None
    window: str
    bot: int | None
    errors: tuple[str, ...] = ()

    @property
    def since(self) -> datetime:
        return window_start(self.span)

    @property
    def span(self) -> timedelta:
        return WINDOWS[self.window]

    @property
    def scope(self) -> Scope:
        return Scope(self.since, self.bot)

    def query(self, **more: Any) -> str:
        """Return the choice as the query of an address, with `more`; a list stands for several values."""
        query = QueryDict(mutable=True)
        if self.group is not None:
            query["group"] = group_parameter(self.group)
        query["window"] = self.window
        if self.bot is not None:
            query["bot"] = str(self.bot)
        for name, value in more.items():
            query.setlist(name, [str(one) for one in (value if isinstance(value, list) else [value])])
        return query.urlencode()


def choice_of(request: HttpRequest) -> Choice:
    """Read the choice from a request."""
    errors: list[str] = []
    group, window, bot = (request.GET.get(name, "") for name in ("group", "window", "bot"))
    if window and window not in WINDOWS:
        errors.append(
            _("“%(text)s” is no time: choose one of %(times)s.")
            % {"text": window[:50], "times": ", ".join(WINDOWS)}
        )
    number: int | None = None
    if bot:
        try:
            number = int(bot[:30])
        except ValueError:
            errors.append(_("“%(text)s” is no bot's number.") % {"text": bot[:50]})
        if number is not None and not -(2**63) <= number < 2**63:
            errors.append(_("“%(text)s” is no bot's number.") % {"text": bot[:50]})
            number = None
    return Choice(
        None if not group else "" if group == NO_GROUP else from_parameter(group),
        window if window in WINDOWS else DEFAULT_WINDOW,
        number,
        tuple(errors),
    )


def offers(choice: Choice, states: Iterable[str]) -> dict[str, Any]:
    """Return what the form offers, of the groups of `states`, for its template."""
    bots = {*FSMRecord.objects.bots_seen(BOTS_SAMPLE), *([] if choice.bot is None else [choice.bot])}
    groups = [*groups_of(states), *([] if choice.group is None else [choice.group])]
    chosen_group = "" if choice.group is None else group_parameter(choice.group)
    return {
        "choice": {
            "group": chosen_group,
            "window": choice.window,
            "bot": None if choice.bot is None else str(choice.bot),
        },
        "groups": [
            (group_parameter(group), group or _("(without a group)")) for group in dict.fromkeys(groups)
        ],
        "windows": [(window, _WORDS[window]) for window in WINDOWS],
        "bots": [str(bot) for bot in sorted(bots)],
        "errors": choice.errors,
        "since": choice.since,
    }


def group_parameter(group: str) -> str:
    return to_parameter(group) if group else NO_GROUP
