"""What the page of one conversation shows, ready for its templates. Nothing is decided or written here."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from fsm_storage.admin.comparing import data_changes
from fsm_storage.admin.forms import Changes
from fsm_storage.admin.jsontext import pretty
from fsm_storage.admin.log import noted, told_ttls
from fsm_storage.admin.presentation import ago, badge, clock_of, expiry
from fsm_storage.admin.timeline import Cursor, timeline
from fsm_storage.conf import storages
from fsm_storage.discovery import declared_states
from fsm_storage.exceptions import FSMStorageError
from fsm_storage.models import FSMLease, FSMRecord, UtcNow
from fsm_storage.patches import KEEP
from fsm_storage.peers import names_of
from fsm_storage.rights import mask_for

BEFORE = "before"
"""The parameter with the place in the timeline from which on older changes are shown."""


def facts(request: HttpRequest, record: FSMRecord) -> dict[str, Any]:
    now, state, mask = clock_of(record), record.current_state, mask_for(request.user)
    before = Cursor.read(request.GET.get(BEFORE, ""))
    names = names_of((record.chat_id, record.user_id))
    return {
        "chat_name": names.get(record.chat_id),
        "user_name": names.get(record.user_id),
        "state_badge": badge(state),
        "is_undeclared": state is not None and state not in declared_states(),
        "state_expiry": expiry(record.state_expires_at, now) if record.state is not None else "",
        "expired_state": badge(record.state) if state is None and record.state is not None else "",
        "data_expiry": "" if record.data == {} else expiry(record.data_expires_at, now),
        "data_text": pretty(mask.over(record.current_data)),
        "is_masked": bool(mask),
        "data_is_object": isinstance(record.current_data, dict),
        "created": ago(record.created_at, now),
        "updated": ago(record.updated_at, now),
        "timeline": timeline(record, mask, before),
        "is_older": before.at is not None,
        "is_leased": _is_leased(record),
        "can_see_transitions": request.user.has_perm("fsm_storage.view_fsmtransition"),
    }


def _is_leased(record: FSMRecord) -> bool:
    """Say whether a handler is at work on it: under a lease in Django's table, or where its storage has them."""
    leases = FSMLease.objects.using(record._state.db).filter(alias=record.alias, key=record.key)
    if leases.filter(expires_at__gt=UtcNow()).exists():
        return True
    try:
        storage = storages.editor(record.alias)
    except FSMStorageError:  # the page says elsewhere that it is read only
        return False
    look = getattr(storage, "is_leased", None)
    return look is not None and look(record.storage_key)


def preview(record: FSMRecord, changes: Changes, told: str = "") -> dict[str, Any]:
    """Return what `changes` would do to `record`; only for those who may see its data."""
    state = None
    if changes.state is not KEEP:
        state = badge(record.current_state), badge(changes.state)
    return {
        "state": state,
        "data": [] if changes.data is KEEP else data_changes(record.current_data, changes.data),
        "ttls": list(
            told_ttls(noted(record, Changes(state_ttl=changes.state_ttl, data_ttl=changes.data_ttl)))
        ),
        "told": told,
    }
