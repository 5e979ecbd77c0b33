"""The tables. What people ask of them is in `querysets`. No SQL text, no writing of states."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from fsm_storage.keys import (
    MAX_ACTOR_LENGTH,
    MAX_ALIAS_LENGTH,
    MAX_KEY_LENGTH,
    MAX_OWNER_LENGTH,
    MAX_STATE_LENGTH,
)
from fsm_storage.patches import KEEP, Keep
from fsm_storage.peers import FSMPeer
from fsm_storage.querysets import FSMRecordQuerySet, FSMTransitionQuerySet, UtcNow
from fsm_storage.tallies import FSMHourlyMove, FSMHourlyPath, FSMRollupMark, FSMRun

if TYPE_CHECKING:
    from aiogram import Bot
    from aiogram.fsm.context import FSMContext
    from aiogram.fsm.state import State
    from aiogram.fsm.storage.base import StorageKey


__all__ = [
    "FSMBulk",
    "FSMBulkItem",
    "FSMHourlyMove",
    "FSMHourlyPath",
    "FSMLease",
    "FSMPeer",
    "FSMRecord",
    "FSMRecordQuerySet",
    "FSMRollupMark",
    "FSMRun",
    "FSMTransition",
    "FSMTransitionQuerySet",
    "UtcNow",
]


_MADE_BY_A_MIGRATION = ("models.W037", "models.W043")  # indexes with a condition, and on an expression


class FSMRecord(models.Model):
    """The state and the data of one key, and when each expires.

    Write with `edit()` or through a storage. `save()` would step on the bot: it knows no version.
    """

    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    key = models.CharField(_("key"), max_length=MAX_KEY_LENGTH)
    bot_id = models.BigIntegerField(_("bot"))
    chat_id = models.BigIntegerField(_("chat"))
    user_id = models.BigIntegerField(_("user"))
    thread_id = models.BigIntegerField(_("thread"), null=True, blank=True)
    business_connection_id = models.CharField(  # noqa: DJ001 - None and "" are different keys
        _("business connection"), max_length=MAX_KEY_LENGTH, null=True, blank=True
    )
    destiny = models.CharField(_("destiny"), max_length=MAX_KEY_LENGTH, blank=True)
    state = models.CharField(  # noqa: DJ001 - None is no state, "" is a state
        _("state"), max_length=MAX_STATE_LENGTH, null=True, blank=True
    )
    data = models.JSONField(_("data"), default=dict, blank=True)
    state_expires_at = models.DateTimeField(_("state expires at"), null=True, blank=True)
    data_expires_at = models.DateTimeField(_("data expires at"), null=True, blank=True)
    version = models.BigIntegerField(_("version"))
    created_at = models.DateTimeField(_("created at"), db_default=Now())
    updated_at = models.DateTimeField(_("last change"), db_default=Now())

    objects = FSMRecordQuerySet.as_manager()

    class Meta:
        db_table = "fsm_storage_record"
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        constraints = [
            models.UniqueConstraint(fields=["alias", "key"], name="fsm_storage_record_key"),
        ]
        indexes = [
            models.Index(fields=["chat_id", "user_id"], name="fsm_storage_record_chat"),
            models.Index(fields=["user_id"], name="fsm_storage_record_user"),
            models.Index(F("updated_at").desc(), name="fsm_storage_record_updated"),
            # All that the map's counts ask for: on ten million records they took 0.3 ms each, without the
            # last two columns 30 ms.
            models.Index(
                fields=["state", "bot_id", "state_expires_at"],
                name="fsm_storage_record_state",
                condition=Q(state__isnull=False),
            ),
            models.Index(
                fields=["state_expires_at"],
                name="fsm_storage_record_state_exp",
                condition=Q(state_expires_at__isnull=False),
            ),
            models.Index(
                fields=["data_expires_at"],
                name="fsm_storage_record_data_exp",
                condition=Q(data_expires_at__isnull=False),
            ),
        ]
        # There is no "add": a conversation begins with a message to the bot. Instead of "change" there are two.
        default_permissions = ("view", "delete")
        permissions = [
            ("view_data_fsmrecord", "Can view the data of conversations"),
            ("change_state_fsmrecord", "Can change the state of conversations"),
            ("change_data_fsmrecord", "Can change the data of conversations"),
            ("bulk_fsmrecord", "Can change many conversations at once"),
            ("export_fsmrecord", "Can export conversations"),
        ]

    def __str__(self) -> str:
        return self.key

    @classmethod
    def check(cls, **kwargs: Any) -> list[CheckMessage]:
        """Run Django's checks, without the indexes that MariaDB "does not support": `0007_mariadb` makes plain ones."""
        return [message for message in super().check(**kwargs) if message.id not in _MADE_BY_A_MIGRATION]

    @property
    def storage_key(self) -> StorageKey:
        """aiogram's key of this record."""
        from aiogram.fsm.storage.base import StorageKey

        return StorageKey(
            bot_id=self.bot_id,
            chat_id=self.chat_id,
            user_id=self.user_id,
            thread_id=self.thread_id,
            business_connection_id=self.business_connection_id,
            destiny=self.destiny,
        )

    def context(self, bot: Bot | None = None) -> FSMContext:
        """Return the `FSMContext` of this conversation, as the bot's handlers get it.

        With `bot`, raises `ValueError` if the record belongs to another bot.
        """
        from aiogram.fsm.context import FSMContext

        from fsm_storage.conf import storages

        if bot is not None and bot.id != self.bot_id:
            raise ValueError(f"record {self.key!r} belongs to bot {self.bot_id}, not to bot {bot.id}")
        return FSMContext(storage=storages[self.alias], key=self.storage_key)

    def _is_past(self, instant: datetime | None) -> bool:
        return instant is not None and instant <= getattr(self, "read_at", timezone.now())

    @property
    def current_state(self) -> str | None:
        """The state as the bot sees it: None once it expired, swept or not."""
        return None if self._is_past(self.state_expires_at) else self.state

    @property
    def current_data(self) -> Any:
        """The data as the bot sees it: {} once it expired, swept or not."""
        return {} if self._is_past(self.data_expires_at) else self.data

    def edit(
        self,
        *,
        state: State | str | Keep | None = KEEP,
        data: dict[str, Any] | Keep = KEEP,
        state_ttl: timedelta | float | Keep | None = KEEP,
        data_ttl: timedelta | float | Keep | None = KEEP,
        if_version: int | None = None,
        by: Any = None,
        source: str = "admin",
    ) -> None:
        """Change this conversation as the bot would, and load what came of it into this object.

        `state` and `data` replace what is there. A part keeps its time to expiry; a part that had
        none because it was empty gets the storage's. `state_ttl` and `data_ttl` (from now; seconds,
        timedelta, or None for never) change the expiry, of a part that is left alone too.

        With `if_version`, raises `VersionConflict` if the record is not at that version, and
        nothing is written. `by`, a user or a name, is the actor of the transition.
        Raises what the storage's own operations raise; `NotEditable` if there is no such storage.
        Runs in the caller's transaction if there is one, else in one of its own. Synchronous.
        """
        from fsm_storage.conf import storages

        editor = storages.editor(self.alias)
        editor.edit(
            [self],
            state=state,
            data=data,
            state_ttl=state_ttl,
            data_ttl=data_ttl,
            if_versions=None if if_version is None else [if_version],
            by=by,
            source=source,
        )
        self._load_anew(getattr(editor, "database", None) or self._state.db)

    def _load_anew(self, using: str | None) -> None:
        """Load this key's record: another row than before, if the sweep had deleted that one."""
        found = type(self)._base_manager.using(using).filter(alias=self.alias, key=self.key)
        self.pk = found.values_list("pk", flat=True).first()
        if self.pk is not None:
            self.refresh_from_db(using=using)
        else:  # there was nothing, and nothing was written
            self.state, self.data = None, {}
            self.state_expires_at = self.data_expires_at = None


class FSMTransition(models.Model):
    """One change of a record, written in the transaction of the change. It outlives its record.

    Under history "states" there is one for each real change of state; under "full" one for
    each change of state or data, with the data before and after.
    """

    class Source(models.TextChoices):
        BOT = "bot", _("bot")
        ADMIN = "admin", _("admin")
        EXPIRY = "expiry", _("expiry")
        IMPORT = "import", _("import")
        MIGRATION = "migration", _("migration")
        MOVE = "move", _("chat moved")
        MIRROR = "mirror", _("mirror")

    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    key = models.CharField(_("key"), max_length=MAX_KEY_LENGTH)
    bot_id = models.BigIntegerField(_("bot"))
    chat_id = models.BigIntegerField(_("chat"))
    user_id = models.BigIntegerField(_("user"))
    from_state = models.CharField(_("from"), max_length=MAX_STATE_LENGTH, null=True)  # noqa: DJ001
    to_state = models.CharField(_("to"), max_length=MAX_STATE_LENGTH, null=True)  # noqa: DJ001
    at = models.DateTimeField(_("at"), db_default=Now())
    source = models.CharField(_("source"), max_length=10, choices=Source, default=Source.BOT)
    actor = models.CharField(_("actor"), max_length=MAX_ACTOR_LENGTH, blank=True, default="", db_default="")
    data_before = models.JSONField(_("data before"), null=True)
    data_after = models.JSONField(_("data after"), null=True)

    objects = FSMTransitionQuerySet.as_manager()

    class Meta:
        db_table = "fsm_storage_transition"
        verbose_name = _("transition")
        verbose_name_plural = _("transitions")
        indexes = [
            models.Index(fields=["alias", "key", "id"], name="fsm_storage_transition_key"),
        ]

    def __str__(self) -> str:
        return f"{self.key}: {self.from_state} → {self.to_state}"


class FSMLease(models.Model):
    """The right to work on a key, held by one owner until it gives it back or the time is up.

    There is a row for each key that is held now, and for one whose holder died until it is swept.
    `token` only grows, over all holders of a key: whoever has a smaller one has lost the lease.
    """

    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    key = models.CharField(_("key"), max_length=MAX_KEY_LENGTH)
    owner = models.CharField(_("owner"), max_length=MAX_OWNER_LENGTH)
    token = models.BigIntegerField(_("token"))
    expires_at = models.DateTimeField(_("expires at"))

    class Meta:
        db_table = "fsm_storage_lease"
        verbose_name = _("lease")
        verbose_name_plural = _("leases")
        default_permissions = ("view",)
        constraints = [
            models.UniqueConstraint(fields=["alias", "key"], name="fsm_storage_lease_key"),
        ]

    def __str__(self) -> str:
        return self.key


class FSMBulk(models.Model):
    """A change of many conversations at once by the staff: what was asked, and by whom."""

    action = models.CharField(_("action"), max_length=20)
    arguments = models.JSONField(_("arguments"), default=dict)
    actor = models.CharField(_("actor"), max_length=MAX_ACTOR_LENGTH)
    created_at = models.DateTimeField(_("created at"), db_default=Now())
    undoes = models.ForeignKey("self", models.SET_NULL, null=True, related_name="undone_by")

    class Meta:
        db_table = "fsm_storage_bulk"
        verbose_name = _("change of many")
        verbose_name_plural = _("changes of many")
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.action} #{self.pk}"


class FSMBulkItem(models.Model):
    """One record of a change of many: what became of it, and what undoing it needs."""

    class Outcome(models.TextChoices):
        WAITING = "waiting", _("waiting")
        CHANGED = "changed", _("changed")
        UNCHANGED = "unchanged", _("nothing to change")
        MOVED = "moved", _("moved on meanwhile, left alone")
        GONE = "gone", _("not there any more")
        FAILED = "failed", _("failed")

    bulk = models.ForeignKey(FSMBulk, models.CASCADE, related_name="items", db_index=False)
    record_id = models.BigIntegerField(_("conversation"))  # no foreign key: it outlives the record
    key = models.CharField(_("key"), max_length=MAX_KEY_LENGTH)
    outcome = models.CharField(_("outcome"), max_length=10, choices=Outcome, default=Outcome.WAITING)
    reason = models.CharField(_("reason"), max_length=255, blank=True, default="")
    before = models.JSONField(_("before"), null=True)
    """The parts that were changed, as they had been; in an undo that waits, what is to be brought back."""
    version = models.BigIntegerField(_("version"), null=True)
    """The record's version after the change; in an undo that waits, the only one upon which it may be done."""

    class Meta:
        db_table = "fsm_storage_bulk_item"
        verbose_name = _("changed conversation")
        verbose_name_plural = _("changed conversations")
        default_permissions = ()
        indexes = [
            models.Index(fields=["bulk", "outcome", "id"], name="fsm_storage_bulk_outcome"),
        ]

    def __str__(self) -> str:
        return f"{self.key}: {self.outcome}"
