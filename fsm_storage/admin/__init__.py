"""The Django admin of conversations and their transitions. Queries are in the models' querysets."""

from fsm_storage.admin.records import RecordAdmin
from fsm_storage.admin.transitions import TransitionAdmin

__all__ = ["RecordAdmin", "TransitionAdmin"]
