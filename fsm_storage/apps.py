from __future__ import annotations

from importlib.util import find_spec

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import Tags, register
from django.utils.translation import gettext_lazy as _


class FSMStorageConfig(AppConfig):
    name = "fsm_storage"
    verbose_name = _("Conversations")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from fsm_storage.checks import check_admin, check_servers, check_states, check_storages

        register(check_storages, "fsm_storage")
        register(check_admin, "fsm_storage")
        register(check_states, Tags.database)
        register(check_servers, Tags.database)
        if "default" in getattr(settings, "CHANNEL_LAYERS", {}) and find_spec("channels"):
            from fsm_storage import signals
            from fsm_storage.live.broadcasting import broadcaster

            signals.hints.append(broadcaster.hint)
