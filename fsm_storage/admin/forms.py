"""The forms: what was typed, read exactly, and what of it is a change. Nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from django import forms
from django.core.exceptions import ValidationError
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin.jsontext import JSONTextError, compact, pretty, read_json, read_object
from fsm_storage.discovery import declared_states
from fsm_storage.durations import HINT, parse_duration
from fsm_storage.models import FSMRecord
from fsm_storage.patches import KEEP, Keep
from fsm_storage.rights import Rights

NONE = "none"
KEEP_TTL, NO_TTL, NEW_TTL = "keep", "never", "after"

Ttl = timedelta | Keep | None


def to_option(state: str | None) -> str:
    """Return a state as the value of an option: no state and a state named so stay apart."""
    return NONE if state is None else f"={state}"


def from_option(text: str) -> str | None:
    return None if text == NONE else text.removeprefix("=")


@dataclass(frozen=True)
class Changes:
    """What a form asks for; `KEEP` for what it leaves alone."""

    state: str | Keep | None = KEEP
    data: dict[str, Any] | Keep = KEEP
    state_ttl: Ttl = KEEP
    data_ttl: Ttl = KEEP

    def __bool__(self) -> bool:
        return any(part is not KEEP for part in (self.state, self.data, self.state_ttl, self.data_ttl))

    def as_arguments(self) -> dict[str, Any]:
        return dict(vars(self))


class StateSelect(forms.Select):
    """The declared states by group; what else is selected, under a heading of its own."""

    def optgroups(self, name: str, value: list[str], attrs: Any = None) -> Any:
        declared = declared_states()
        groups = [(group.name or "-", [(to_option(s), s) for s in group.states]) for group in declared.groups]
        options: list[Any] = [(NONE, _("— no state —")), *groups]
        selected = from_option(value[0]) if value and value[0] else None
        if selected is not None and selected not in declared:
            options.append((_("Not declared by any app"), [(to_option(selected), selected or '""')]))
        self.choices = options
        return super().optgroups(name, value, attrs)


def _read_expiry(form: forms.Form, name: str) -> Ttl:
    """Return what a choice and the duration beside it mean together."""
    choice, text = form.cleaned_data.get(name), form.cleaned_data.get(f"{name}_for", "")
    if choice == NO_TTL and text:
        form.add_error(f"{name}_for", _("Choose “never”, or type a duration; not both."))
        return KEEP
    if choice == NO_TTL:
        return None
    if text:
        try:
            return parse_duration(text)
        except ValueError as error:
            form.add_error(f"{name}_for", str(error))
    elif choice == NEW_TTL:
        form.add_error(f"{name}_for", _("Type how long, for example 2h."))
    return KEEP


def _expiry_choice(label: Any) -> forms.ChoiceField:
    choices = [
        (KEEP_TTL, gettext_lazy("Keep it as it is")),
        (NEW_TTL, gettext_lazy("From now on, in…")),
        (NO_TTL, gettext_lazy("Never")),
    ]
    return forms.ChoiceField(label=label, choices=choices, initial=KEEP_TTL, required=False)


def _duration(label: Any) -> forms.CharField:
    attrs = {"placeholder": "2h", "size": 8, "autocomplete": "off", "aria-label": label}
    return forms.CharField(label=label, required=False, widget=forms.TextInput(attrs=attrs), help_text=HINT)


STATE_FIELDS = ("opened_state", "state", "other_state", "state_ttl", "state_ttl_for")
DATA_FIELDS = ("opened_data", "data_json", "data_patch", "data_ttl", "data_ttl_for")


class RecordForm(forms.Form):
    """One conversation. `changes` says what differs from the version that was opened.

    That version's state and data travel in the form, so that what the user left alone can be left
    alone, also when it expired meanwhile, and a conflict can be shown from all three sides.
    What the user has no right to change has no fields, and what is sent for it is not read.
    """

    version = forms.IntegerField(widget=forms.HiddenInput, min_value=0, max_value=2**63 - 1)
    opened_state = forms.CharField(widget=forms.HiddenInput, strip=False)
    opened_data = forms.CharField(widget=forms.HiddenInput, strip=False)
    state = forms.CharField(
        label=gettext_lazy("State"), strip=False, required=False, widget=StateSelect(attrs={"id": "id_state"})
    )
    other_state = forms.CharField(
        label=gettext_lazy("Or another state"),
        required=False,
        help_text=gettext_lazy("Goes before the choice above. For a state that no app declares."),
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false", "class": "vTextField"}),
    )
    state_ttl = _expiry_choice(gettext_lazy("State expires"))
    state_ttl_for = _duration(gettext_lazy("State expires in"))
    data_json = forms.CharField(
        label=gettext_lazy("Data"),
        strip=False,
        required=False,
        widget=forms.Textarea(attrs={"class": "fsm-json", "spellcheck": "false", "autocomplete": "off"}),
    )
    data_ttl = _expiry_choice(gettext_lazy("Data expires"))
    data_ttl_for = _duration(gettext_lazy("Data expires in"))

    data_patch = forms.CharField(widget=forms.HiddenInput, required=False, strip=False)

    changes = Changes()

    def __init__(
        self,
        record: FSMRecord,
        rights: Rights,
        data: Any = None,
        earlier: tuple[str | None, Any] | None = None,
    ) -> None:
        """`earlier` is a state and data to be filled in instead of those that are there."""
        self.record, self.rights = record, rights
        opened = record.current_state, record.current_data
        state, content = earlier or opened
        text = pretty(content)
        initial = {
            "version": record.version,
            "opened_state": to_option(opened[0]),
            "opened_data": compact(opened[1]) if rights.change_data else "",
            "state": to_option(state),
            "data_json": text if rights.change_data else "",
        }
        super().__init__(data, initial=initial)
        for name in (*STATE_FIELDS * (not rights.change_state), *DATA_FIELDS * (not rights.change_data)):
            del self.fields[name]
        if rights.change_data:
            shown = data.get("data_json", text) if data else text
            self.fields["data_json"].widget.attrs["rows"] = min(max(shown.count("\n") + 2, 6), 30)
            self.fields["data_json"].widget.attrs["aria-describedby"] = "id_data_json_helptext"

    @property
    def opened_state_value(self) -> str | None:
        return from_option(self.cleaned_data["opened_state"])

    @property
    def your_state(self) -> str | None:
        """The state that the user wants, or the one that was opened."""
        return self.opened_state_value if isinstance(self.changes.state, Keep) else self.changes.state

    @property
    def your_data(self) -> Any:
        """The data that the user wants, or what was opened."""
        return self.cleaned_data["opened_data"] if self.changes.data is KEEP else self.changes.data

    def clean_opened_data(self) -> Any:
        try:
            return read_json(self.cleaned_data["opened_data"])
        except JSONTextError as error:
            raise ValidationError(str(error)) from error

    def clean_data_json(self) -> Any:
        text = self.cleaned_data["data_json"]
        if self.data.get("data_patch"):
            return KEEP  # an editor was at work, and sends what it changed
        try:
            if compact(read_json(text)) == compact(self.cleaned_data.get("opened_data")):
                return KEEP  # also where it is no object: what is not changed need not be right
            return read_object(text)
        except JSONTextError as error:
            raise ValidationError(error_html(error)) from error

    def clean_data_patch(self) -> Any:
        """Return the opened data with the edited keys replaced: the others never left the server's hands."""
        text, opened = self.cleaned_data["data_patch"], self.cleaned_data.get("opened_data")
        if not text:
            return KEEP
        try:
            patch = read_object(text)
        except JSONTextError as error:
            self.add_error("data_json", self._flaw_in_text(error))
            return KEEP
        set_, unset = patch.get("set"), patch.get("unset")
        if not (isinstance(set_, dict) and isinstance(unset, list) and isinstance(opened, dict)):
            raise ValidationError(_("This page is incomplete. Open the conversation again."))
        data = {key: value for key, value in opened.items() if key not in unset} | set_
        return KEEP if compact(data) == compact(opened) else data

    def _flaw_in_text(self, error: JSONTextError) -> str:
        """Return what is wrong with the data as a whole: places in a patch mean nothing to people."""
        try:
            read_object(self.data.get("data_json", ""))
        except JSONTextError as in_text:
            return error_html(in_text)
        return str(error)

    def clean(self) -> dict[str, Any]:
        cleaned = cast("dict[str, Any]", super().clean())
        if self.errors.keys() & {"version", "opened_state", "opened_data", "data_patch"}:
            raise ValidationError(_("This page is incomplete. Open the conversation again."))
        patched = cleaned.get("data_patch", KEEP)
        self.changes = Changes(
            self._state(cleaned),
            cleaned.get("data_json", KEEP) if patched is KEEP else patched,
            _read_expiry(self, "state_ttl") if self.rights.change_state else KEEP,
            _read_expiry(self, "data_ttl") if self.rights.change_data else KEEP,
        )
        self._check_expiries()
        return cleaned

    def _state(self, cleaned: dict[str, Any]) -> str | Keep | None:
        if not self.rights.change_state:
            return KEEP
        opened, chosen = cleaned["opened_state"], cleaned.get("other_state", "")
        option = f"={chosen}" if chosen else cleaned.get("state") or opened
        return KEEP if option == opened else from_option(option)

    def _check_expiries(self) -> None:
        """Refuse an expiry for what is not there: it would be dropped without a word."""
        changes, record = self.changes, self.record
        state = record.current_state if changes.state is KEEP else changes.state
        data = record.current_data if changes.data is KEEP else changes.data
        if changes.state_ttl is not KEEP and state is None:
            self.add_error("state_ttl", _("There is no state that could expire."))
        if changes.data_ttl is not KEEP and data == {}:
            self.add_error("data_ttl", _("There is no data that could expire."))


def error_html(error: JSONTextError) -> str:
    if not error.excerpt:
        return str(error)
    return format_html('{}<pre class="fsm-excerpt">{}</pre>', str(error), error.excerpt)
