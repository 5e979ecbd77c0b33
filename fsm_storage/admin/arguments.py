"""What a change of many conversations has to be told: the forms."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fsm_storage.admin.forms import StateSelect, error_html, from_option
from fsm_storage.admin.jsontext import JSONTextError, read_json
from fsm_storage.durations import HINT, parse_duration


class MoveForm(forms.Form):
    """The state to which the conversations shall move."""

    state = forms.CharField(label=gettext_lazy("State"), strip=False, required=False, widget=StateSelect)
    other_state = forms.CharField(
        label=gettext_lazy("Or another state"),
        required=False,
        help_text=gettext_lazy("Goes before the choice above. For a state that no app declares."),
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false", "class": "vTextField"}),
    )

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        other, option = cleaned.get("other_state", ""), cleaned.get("state", "")
        if not other and not option:
            raise ValidationError(_("Choose a state."))
        cleaned["target"] = other or from_option(option)
        return cleaned


class UnsetForm(forms.Form):
    """The key that shall go."""

    name = forms.CharField(
        label=gettext_lazy("Key"),
        strip=False,
        help_text=gettext_lazy("Of the outermost level, spelled exactly."),
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false", "class": "vTextField"}),
    )


class SetForm(UnsetForm):
    """A key, and its new value."""

    value = forms.CharField(
        label=gettext_lazy("Value"),
        strip=False,
        help_text=gettext_lazy('In JSON: 5, true, "a text in double quotes", {"an": "object"}.'),
        widget=forms.Textarea(attrs={"class": "fsm-json", "rows": 3, "spellcheck": "false"}),
    )

    def clean_value(self) -> Any:
        try:
            return read_json(self.cleaned_data["value"])
        except JSONTextError as error:
            raise ValidationError(error_html(error)) from error


class ExtendForm(forms.Form):
    """How long the conversations shall still live."""

    duration = forms.CharField(
        label=gettext_lazy("Keep for at least"),
        initial="24h",
        help_text=HINT,
        widget=forms.TextInput(attrs={"size": 12, "autocomplete": "off", "required": True}),
    )

    def clean_duration(self) -> timedelta:
        try:
            return parse_duration(self.cleaned_data["duration"])
        except ValueError as error:
            raise ValidationError(str(error)) from error
