"""What can be asked of many conversations at once: its words, its arguments, and what it means for one of them.

Nothing is written here; see `bulkwork`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from django import forms
from django.utils.dateparse import parse_datetime
from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin.arguments import ExtendForm, MoveForm, SetForm, UnsetForm
from fsm_storage.admin.forms import Changes
from fsm_storage.admin.jsontext import compact
from fsm_storage.admin.presentation import clock_of
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP
from fsm_storage.rights import Rights

UNDO = "undo"


class Impossible(ValueError):
    """What was asked cannot be done to a record; the message says why."""


class Action(NamedTuple):
    """Something to do to many conversations. `choose` says what it means for one; it may raise `Impossible`."""

    name: str
    title: str | Promise
    explanation: str | Promise
    button: str | Promise
    choose: Callable[[FSMRecord, dict[str, Any], Rights], Changes]
    form: type[forms.Form] | None = None
    needs_state: bool = False
    needs_data: bool = False

    def is_allowed(self, rights: Rights) -> bool:
        """Say whether these rights are enough. What needs neither part in particular needs one of them."""
        if not rights.bulk or not rights.change:
            return False
        return (rights.change_state or not self.needs_state) and (rights.change_data or not self.needs_data)


def _move(record: FSMRecord, arguments: dict[str, Any], rights: Rights) -> Changes:
    return Changes(state=arguments["target"])


def _set(record: FSMRecord, arguments: dict[str, Any], rights: Rights) -> Changes:
    return Changes(data={**_object(record), arguments["name"]: arguments["value"]})


def _unset(record: FSMRecord, arguments: dict[str, Any], rights: Rights) -> Changes:
    return Changes(data={key: value for key, value in _object(record).items() if key != arguments["name"]})


def _object(record: FSMRecord) -> dict[str, Any]:
    if not isinstance(record.current_data, dict):
        raise Impossible(_("The data is no object, so it has no keys."))
    return record.current_data


def _extend(record: FSMRecord, arguments: dict[str, Any], rights: Rights) -> Changes:
    """Let each part of `record` that may be changed live for the duration at least."""
    now, duration = clock_of(record), arguments["duration"]

    def is_due(expires_at: datetime | None) -> bool:
        return expires_at is not None and now < expires_at < now + duration

    return Changes(
        state_ttl=duration if rights.change_state and is_due(record.state_expires_at) else KEEP,
        data_ttl=duration if rights.change_data and is_due(record.data_expires_at) else KEEP,
    )


def undoing(record: FSMRecord, before: dict[str, Any]) -> Changes:
    """Return what brings the changed parts back to how they were, with the time to expiry that was left then.

    What would have expired meanwhile does not come back.
    """
    now = clock_of(record)
    changes: dict[str, Any] = {}
    for part, nothing in (("state", None), ("data", {})):
        if f"{part}_expires_at" not in before:
            continue
        text = before[f"{part}_expires_at"]
        at = None if text is None else parse_datetime(text)
        is_past = at is not None and at <= now
        if part in before:
            changes[part] = nothing if is_past else before[part]
        if changes.get(part, KEEP) != nothing and not is_past:
            changes[f"{part}_ttl"] = None if at is None else at - now
    return Changes(**changes)


ACTIONS = {
    action.name: action
    for action in (
        Action(
            "move_state",
            gettext_lazy("Move to a state"),
            gettext_lazy("The bot will go on from there at the next message. It sends nothing by itself."),
            gettext_lazy("Yes, move them"),
            _move,
            MoveForm,
            needs_state=True,
        ),
        Action(
            "set_key",
            gettext_lazy("Set one key of the data"),
            gettext_lazy("All other keys stay as they are, also what the bot writes meanwhile."),
            gettext_lazy("Yes, set the key"),
            _set,
            SetForm,
            needs_data=True,
        ),
        Action(
            "unset_key",
            gettext_lazy("Remove one key of the data"),
            gettext_lazy("All other keys stay as they are, also what the bot writes meanwhile."),
            gettext_lazy("Yes, remove the key"),
            _unset,
            UnsetForm,
            needs_data=True,
        ),
        Action(
            "extend_ttl",
            gettext_lazy("Extend the time to expiry"),
            gettext_lazy(
                "What would expire sooner will expire in this time from now. Nothing is shortened or revived."
            ),
            gettext_lazy("Yes, extend"),
            _extend,
            ExtendForm,
        ),
        Action(
            "clear_state",
            gettext_lazy("Clear the state"),
            gettext_lazy(
                "The bot will treat these people as if they had not started anything. Their data stays."
            ),
            gettext_lazy("Yes, clear the state"),
            lambda record, arguments, rights: Changes(state=None),
            needs_state=True,
        ),
        Action(
            "clear_all",
            gettext_lazy("Clear state and data"),
            gettext_lazy(
                "The bot will forget these conversations. It can be undone only until the sweep removes what is empty."
            ),
            gettext_lazy("Yes, clear everything"),
            lambda record, arguments, rights: Changes(state=None, data={}),
            needs_state=True,
            needs_data=True,
        ),
    )
}


def effective(record: FSMRecord, changes: Changes) -> Changes:
    """Return `changes` without the parts that `record` has already."""
    state = KEEP if changes.state == record.current_state else changes.state
    data = (
        KEEP
        if changes.data is not KEEP and compact(changes.data) == compact(record.current_data)
        else changes.data
    )
    return Changes(state, data, changes.state_ttl, changes.data_ttl)
