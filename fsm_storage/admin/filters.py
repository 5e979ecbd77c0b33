"""The filters beside the list. Their choices come from the code, or from a bounded look at the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from django.contrib.admin import SimpleListFilter
from django.contrib.admin.options import IncorrectLookupParameters
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from fsm_storage.discovery import declared_states, group_of, is_within
from fsm_storage.models import FSMRecord

BOTS_SAMPLE = 1000
STATES_LIMIT = 100
_LOW, _HIGH = -(2**63), 2**63 - 1

# A state can have any name. A tilde begins what is no state, and is doubled where a state begins with one.
NO_STATE, UNDECLARED, NO_GROUP = "~none", "~undeclared", "~nogroup"


def to_parameter(state: str) -> str:
    """Return a state as it stands in an address."""
    return f"~~{state}" if not state or state.startswith("~") else state


def from_parameter(text: str) -> str:
    return text.removeprefix("~~")


def undeclared_states(request: HttpRequest) -> list[str]:
    """Return the states in the table that no app declares; asks once a request."""
    states: list[str] | None = getattr(request, "_fsm_undeclared", None)
    if states is None:
        catalog = declared_states()
        found = FSMRecord.objects.states_in_use(STATES_LIMIT + len(catalog.states))
        states = [state for state in found if state not in catalog]
        request._fsm_undeclared = states  # type: ignore[attr-defined]
    return states


class BotFilter(SimpleListFilter):
    """The bots that were at work lately. Another one can be put into the address."""

    title = _("bot")
    parameter_name = "bot"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, Any]]:
        bots = FSMRecord.objects.bots_seen(BOTS_SAMPLE)
        asked = _bot_id(self.value())
        return [(str(bot), str(bot)) for bot in sorted({*bots, *([] if asked is None else [asked])})]

    def has_output(self) -> bool:
        return len(self.lookup_choices) > 1 or self.value() is not None

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        bot = _bot_id(self.value())
        return queryset if bot is None else queryset.filter(bot_id=bot)


def _bot_id(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        number = int(text[:30])
    except ValueError as error:
        raise IncorrectLookupParameters(error) from error
    if not _LOW <= number <= _HIGH:
        raise IncorrectLookupParameters(text)
    return number


class GroupFilter(SimpleListFilter):
    """Groups of states, with the groups nested in them."""

    title = _("state group")
    parameter_name = "group"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterator[tuple[Any, Any]]:
        declared = [group.name for group in declared_states().groups]
        found = [group_of(state) for state in undeclared_states(request)]
        for group in dict.fromkeys([*declared, *found]):
            yield (to_parameter(group), group) if group else (NO_GROUP, _("(without a group)"))

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        value = self.value()
        if value is None:
            return queryset
        group = "" if value == NO_GROUP else from_parameter(value)
        return queryset.in_state(*states_within(request, group))


def states_within(request: HttpRequest, group: str) -> list[str]:
    """Return the states of a group: the declared ones, and what else the table has under its name."""
    undeclared = (state for state in undeclared_states(request) if is_within(group, state))
    return [*declared_states().within(group), *undeclared]


class StateFilter(SimpleListFilter):
    """States: those of the chosen group, if one is chosen."""

    title = _("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterator[tuple[Any, Any]]:
        undeclared = undeclared_states(request)
        yield NO_STATE, _("(no state)")
        if undeclared:
            yield UNDECLARED, _("(not declared)")
        for state in self._states(request, undeclared):
            yield to_parameter(state), state or '""'

    def _states(self, request: HttpRequest, undeclared: list[str]) -> Iterable[str]:
        group = request.GET.get(GroupFilter.parameter_name)
        if group is None:
            return [*declared_states().states, *undeclared]
        return states_within(request, "" if group == NO_GROUP else from_parameter(group))

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        value = self.value()
        if value is None:
            return queryset
        if value == UNDECLARED:
            return queryset.in_state(*undeclared_states(request))
        return queryset.in_state(None if value == NO_STATE else from_parameter(value))


class ExpiryFilter(SimpleListFilter):
    """When the state or the data expires."""

    title = _("expiry")
    parameter_name = "expires"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, Any]]:
        return [
            ("1h", _("within 1 hour")),
            ("24h", _("within 24 hours")),
            ("expired", _("expired")),
            ("never", _("never")),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        match self.value():
            case "1h":
                return queryset.expiring(timedelta(hours=1))
            case "24h":
                return queryset.expiring(timedelta(hours=24))
            case "expired":
                return queryset.expired()
            case "never":
                return queryset.everlasting()
            case None:
                return queryset
            case other:
                raise IncorrectLookupParameters(other)


class IdleFilter(SimpleListFilter):
    """For how long nothing has changed."""

    title = _("no change for")
    parameter_name = "idle"
    spans = {
        "15m": (_("15 minutes"), timedelta(minutes=15)),
        "1h": (_("1 hour"), timedelta(hours=1)),
        "24h": (_("24 hours"), timedelta(hours=24)),
        "7d": (_("7 days"), timedelta(days=7)),
        "30d": (_("30 days"), timedelta(days=30)),
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, Any]]:
        return [(value, words) for value, (words, span) in self.spans.items()]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        value = self.value()
        if value is None:
            return queryset
        if value not in self.spans:
            raise IncorrectLookupParameters(value)
        return queryset.unchanged_for(self.spans[value][1])
