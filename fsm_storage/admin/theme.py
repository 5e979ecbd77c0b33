"""What our ModelAdmins are built upon: Unfold where the project uses it, else Django's own admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.apps import apps
from django.contrib.admin import ModelAdmin

STYLES = ["admin/css/forms.css", "fsm_storage/admin.css"]

if not TYPE_CHECKING and apps.is_installed("unfold"):
    from unfold.admin import ModelAdmin

    STYLES = ["fsm_storage/admin.css", "fsm_storage/unfold.css"]

__all__ = ["STYLES", "ModelAdmin"]
