"""What was typed upon one version of a conversation, laid over a newer one. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.utils.translation import gettext as _

from fsm_storage.admin.comparing import Difference, data_differences, merged_data
from fsm_storage.admin.forms import Changes, RecordForm, to_option
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP, Keep

STATE_CHOICE = "choice-state"
MERGING = "merging"


class Merge:
    """Both changes together: what to write, and where a person has to say which side wins.

    Upon the version that was opened there is nothing to merge. A time to expiry is always the one
    that was typed. What a user may not see or change takes no part.
    """

    def __init__(self, form: RecordForm, record: FSMRecord, post: Mapping[str, str]) -> None:
        self.is_needed = form.cleaned_data["version"] != record.version
        self.changes = form.changes
        self.state: Difference | None = None
        self.keys: list[Difference] = []
        # A choice holds for the version on which it was shown.
        self._choices = post if post.get(MERGING) == str(record.version) else {}
        if self.is_needed:
            state = self._state(form, record) if form.rights.change_state else KEEP
            data = self._data(form, record) if form.rights.change_data else KEEP
            self.changes = Changes(state, data, form.changes.state_ttl, form.changes.data_ttl)

    @property
    def clashes(self) -> list[Difference]:
        """Where both sides changed the same thing, and nobody has chosen."""
        found = [*([self.state] if self.state else []), *self.keys]
        return [one for one in found if one.clashes and self._choice(one) not in ("yours", "theirs")]

    @property
    def rows(self) -> list[tuple[Difference, str]]:
        """The keys that differ, each with the side that was chosen."""
        return [(one, self._choice(one)) for one in self.keys]

    @property
    def state_choice(self) -> str:
        return self._choices.get(STATE_CHOICE, "")

    def told(self) -> str:
        """Say which changes were put together."""
        differing = [*([self.state] if self.state else []), *self.keys]
        names = [_("the state") if one is self.state else one.name or _("the data") for one in differing]
        theirs = [
            name for name, one in zip(names, differing, strict=True) if one.by_them and not self._wins(one)
        ]
        yours = [name for name, one in zip(names, differing, strict=True) if self._wins(one)]
        told = _("The conversation moved on while you were editing, and both changes were put together.")
        if theirs:
            told += " " + _("Kept from there: %(names)s.") % {"names": ", ".join(theirs)}
        if yours:
            told += " " + _("Yours: %(names)s.") % {"names": ", ".join(yours)}
        return told

    def _state(self, form: RecordForm, record: FSMRecord) -> str | Keep | None:
        sides = form.opened_state_value, record.current_state, form.your_state
        if len({to_option(state) for state in sides}) == 1:
            return KEEP
        self.state = Difference(STATE_CHOICE, *(to_option(state) for state in sides))
        return form.your_state if self._wins(self.state) else KEEP

    def _data(self, form: RecordForm, record: FSMRecord) -> dict[str, Any] | Keep:
        sides = form.cleaned_data["opened_data"], record.current_data, form.your_data
        self.keys = data_differences(*sides)
        return merged_data(*sides, self._choices)

    def _wins(self, one: Difference) -> bool:
        """Say whether your side of a difference is what will be written."""
        if not one.by_you or one.theirs == one.yours:
            return False
        return not one.clashes or self._choice(one) == "yours"

    def _choice(self, one: Difference) -> str:
        return self._choices.get(STATE_CHOICE if one is self.state else one.field, "")
