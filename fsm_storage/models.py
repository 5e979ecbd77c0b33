"""The tables, and the questions that people ask of them. No SQL text, no writing of states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from django.core.checks import CheckMessage
from django.db import connections, models
from django.db.models import Count, Exists, F, Max, OuterRef, Q
from django.db.models.fields.json import KeyTransform
from django.db.models.functions import Coalesce, Now
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
from fsm_storage.tallies import FSMHourlyMove, FSMHourlyPath, FSMRollupMark, FSMRun

if TYPE_CHECKING:
    from aiogram import Bot
    from aiogram.fsm.context import FSMContext
    from aiogram.fsm.state import State, StatesGroup
    from aiogram.fsm.storage.base import StorageKey


__all__ = [
    "FSMHourlyMove",
    "FSMHourlyPath",
    "FSMLease",
    "FSMPeer",
    "FSMRecord",
    "FSMRollupMark",
    "FSMRun",
    "FSMTransition",
    "UtcNow",
]


class UtcNow(Now):
    """The database's clock, in UTC as Django keeps instants. On MariaDB and MySQL `Now` is in the session's zone."""

    def as_mysql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **context)


def _state_is_live() -> Q:
    return Q(state__isnull=False) & (Q(state_expires_at__isnull=True) | Q(state_expires_at__gt=UtcNow()))


def _data_is_live() -> Q:
    return ~Q(data={}) & (Q(data_expires_at__isnull=True) | Q(data_expires_at__gt=UtcNow()))


def _nested(path: Sequence[str], value: Any) -> Any:
    """Return `value` at `path`, as JSON."""
    return _nested(path[:-1], {path[-1]: value}) if path else value


def _is_number(key: str) -> bool:
    return key.lstrip("-").isdecimal()


def state_name(state: State | str | None) -> str | None:
    """Return the text by which a state is stored."""
    return state if state is None or isinstance(state, str) else state.state


class FSMRecordQuerySet(models.QuerySet["FSMRecord"]):
    """Adjectives for records. What has expired is judged by the database's clock."""

    def live(self) -> Self:
        """Records that have a state or data which has not expired."""
        return self.filter(_state_is_live() | _data_is_live())

    def idle(self) -> Self:
        """Records that the bot sees as empty, because nothing is there or all of it expired."""
        return self.exclude(_state_is_live() | _data_is_live())

    def expired(self) -> Self:
        """Records with a part that has expired and has not been swept."""
        return self.filter(Q(state_expires_at__lte=UtcNow()) | Q(data_expires_at__lte=UtcNow()) & ~Q(data={}))

    def state_expired(self) -> Self:
        """Records with a state that has expired and has not been swept."""
        return self.filter(state_expires_at__lte=UtcNow())

    def data_expired(self) -> Self:
        """Records with data that has expired and has not been swept."""
        return self.filter(data_expires_at__lte=UtcNow()).exclude(data={})

    def in_state(self, *states: State | str | None) -> Self:
        """Records that are in one of `states` now; None stands for no state."""
        names = {state_name(state) for state in states}
        named = Q(state__in=sorted(name for name in names if name is not None)) & _state_is_live()
        return self.filter(named | ~_state_is_live()) if None in names else self.filter(named)

    def in_group(self, *groups: type[StatesGroup]) -> Self:
        """Records that are in a state of one of `groups`, child groups included."""
        return self.in_state(*(state for group in groups for state in group.__all_states__))

    def for_chat(self, chat_id: int) -> Self:
        """Records of one chat: in a group, one for each user."""
        return self.filter(chat_id=chat_id)

    def for_user(self, user_id: int) -> Self:
        """Records of one user, in all chats."""
        return self.filter(user_id=user_id)

    def with_key(self, key: StorageKey) -> Self:
        """The records of exactly this key, one for each storage alias."""
        return self.filter(
            bot_id=key.bot_id,
            chat_id=key.chat_id,
            user_id=key.user_id,
            thread_id=key.thread_id,
            business_connection_id=key.business_connection_id,
            destiny=key.destiny,
        )

    def edit(
        self,
        *,
        state: State | str | Keep | None = KEEP,
        data: dict[str, Any] | Keep = KEEP,
        state_ttl: timedelta | float | Keep | None = KEEP,
        data_ttl: timedelta | float | Keep | None = KEEP,
        by: Any = None,
        source: str = "admin",
        batch_size: int = 500,
    ) -> int:
        """Change all these records as `FSMRecord.edit` does one; return how many were written.

        Each batch is a transaction of its own, so the bot goes on meanwhile; an error stops the
        work at the batch in which it came up.
        """
        from fsm_storage.conf import storages

        changed = 0
        for alias in self.order_by().values_list("alias", flat=True).distinct():
            editor = storages.editor(alias)
            ids = list(self.filter(alias=alias).order_by("pk").values_list("pk", flat=True))
            for start in range(0, len(ids), batch_size):
                records = list(
                    self.model.objects.using(self.db).filter(pk__in=ids[start : start + batch_size])
                )
                # The mirror may be behind: whoever has moved on in Redis is left alone.
                mirrored = (
                    [record.version for record in records] if getattr(editor, "mirror", False) else None
                )
                changed += editor.edit(
                    records,
                    if_versions=mirrored,
                    state=state,
                    data=data,
                    state_ttl=state_ttl,
                    data_ttl=data_ttl,
                    by=by,
                    source=source,
                )
        return changed

    def expiring(self, within: timedelta) -> Self:
        """Records with a part that has not expired and will within this time."""
        now, then = UtcNow(), UtcNow() + within
        return self.filter(
            Q(state_expires_at__gt=now, state_expires_at__lte=then)
            | Q(data_expires_at__gt=now, data_expires_at__lte=then)
        )

    def everlasting(self) -> Self:
        """Records that hold something and never expire."""
        return self.live().filter(state_expires_at__isnull=True, data_expires_at__isnull=True)

    def unchanged_for(self, span: timedelta) -> Self:
        """Records whose last change is at least this long ago."""
        return self.filter(updated_at__lte=UtcNow() - span)

    def holding(self, path: Sequence[str], values: Iterable[Any]) -> Self:
        """Records whose live data has one of `values` at `path`, the keys from the outermost inwards."""
        place: Any = F("data")
        for key in path:
            place = KeyTransform(key, place)
        is_one, may_be_one = Q(), Q()
        for value in values:
            is_one |= Q(sought=value)
            may_be_one |= Q(data__contains=_nested(path, value))
        found = self.data_live().alias(sought=place).filter(is_one)
        # Says less, but is what an index on the data can answer. A number in the path may be a place in a list.
        has_contains = connections[self.db].features.supports_json_field_contains
        return found.filter(may_be_one) if has_contains and not any(map(_is_number, path)) else found

    def data_live(self) -> Self:
        """Records whose data has not expired."""
        return self.filter(Q(data_expires_at__isnull=True) | Q(data_expires_at__gt=UtcNow()))

    def live_by_state(self) -> dict[str, int]:
        """Count the records that are in each state now."""
        found = self.filter(_state_is_live()).order_by().values_list("state").annotate(Count("pk"))
        return dict(found)

    def states_in_use(self, limit: int) -> list[str]:
        """The first `limit` different states in the table, expired ones too.

        Walks along the index from one state to the next, so the number of records does not matter.
        """
        found: list[str] = []
        states = self.filter(state__isnull=False).order_by("state").values_list("state", flat=True)
        while len(found) < limit:
            state = (states.filter(state__gt=found[-1]) if found else states).first()
            if state is None:
                break
            found.append(state)
        return found

    def count_in_state(self, state: str, bot_id: int | None, limit: int) -> tuple[int, int]:
        """Count the records in a state now, of one bot or of all, among the first `limit` + 1 that the index has.

        Returns how many were looked at, and how many of them count.
        """
        counts = _state_is_live() if bot_id is None else _state_is_live() & Q(bot_id=bot_id)
        looked_at = self.filter(state=state).order_by()[: limit + 1]
        found = looked_at.aggregate(looked=Count("pk"), live=Count("pk", filter=counts))
        return found["looked"], found["live"]

    def bots_seen(self, sample: int) -> list[int]:
        """The bots among the `sample` records that changed last."""
        return sorted(set(self.order_by("-updated_at").values_list("bot_id", flat=True)[:sample]))

    def clock(self) -> datetime:
        """Return the time by the database's clock. Looks at no record."""
        now = self.filter(pk__lt=0).aggregate(now=Coalesce(Max(UtcNow()), UtcNow()))["now"]
        return now if timezone.is_aware(now) else timezone.make_aware(now)

    def unleased(self) -> Self:
        """Records on which nobody is at work under a lease."""
        leases = FSMLease.objects.filter(
            alias=OuterRef("alias"), key=OuterRef("key"), expires_at__gt=UtcNow()
        )
        return self.filter(~Exists(leases))

    def with_clock(self) -> Self:
        """Add the database's time as `read_at`, by which `current_state` and the like are judged."""
        return self.annotate(read_at=UtcNow())


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
            models.Index(fields=["state"], name="fsm_storage_record_state", condition=Q(state__isnull=False)),
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


class FSMTransitionQuerySet(models.QuerySet["FSMTransition"]):
    """Adjectives for transitions."""

    def of(self, record: FSMRecord) -> Self:
        """The transitions of one record, newest first."""
        return self.filter(alias=record.alias, key=record.key).order_by("-id")

    def within(self, span: timedelta) -> Self:
        """The transitions of this time up to now."""
        return self.filter(at__gte=UtcNow() - span)

    def traffic(self) -> Iterable[tuple[str | None, str | None, int, int]]:
        """Count the changes of state: from, to, how many, and how many of them were expiries."""
        is_expiry = Q(source=FSMTransition.Source.EXPIRY)
        counts = self.order_by().values_list("from_state", "to_state")
        return counts.annotate(Count("pk"), expired=Count("pk", filter=is_expiry))


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
