"""The tables of figures, which `rollup` keeps and `figures` reads: runs of conversations, and hourly counts."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from django.db import models
from django.db.models import F, Sum
from django.utils.translation import gettext_lazy as _

from fsm_storage.keys import MAX_ALIAS_LENGTH, MAX_KEY_LENGTH, MAX_STATE_LENGTH


class FSMRun(models.Model):
    """A conversation from its entry, where it had no state, until it is gone, and has none again.

    Its id is that of the transition which began it. `entries` are the states that it came into, each
    the first time only, with the seconds since the start; `path` is the number of this list of states.
    """

    id = models.BigIntegerField(primary_key=True)
    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    key = models.CharField(_("key"), max_length=MAX_KEY_LENGTH)
    bot_id = models.BigIntegerField(_("bot"))
    chat_id = models.BigIntegerField(_("chat"))
    user_id = models.BigIntegerField(_("user"))
    started_at = models.DateTimeField(_("started at"))
    state = models.CharField(_("state"), max_length=MAX_STATE_LENGTH, null=True)  # noqa: DJ001 - None: gone
    moved_at = models.DateTimeField(_("last move"))
    path = models.UUIDField(_("path"))
    entries = models.JSONField(_("first entries"))

    class Meta:
        db_table = "fsm_storage_run"
        verbose_name = _("run of a conversation")
        verbose_name_plural = _("runs of conversations")
        default_permissions = ()
        indexes = [
            models.Index(fields=["alias", "key"], name="fsm_storage_run_key"),
            models.Index(fields=["path", "started_at"], name="fsm_storage_run_path"),
            models.Index(fields=["started_at"], name="fsm_storage_run_started"),
        ]

    def __str__(self) -> str:
        return self.key


class HourlyQuerySet(models.QuerySet["FSMHourlyMove"]):
    """Sums over hours."""

    def within(self, since: datetime, bot: int | None) -> Self:
        """The counts from the hour that begins at `since`, of one bot or of all."""
        found = self.filter(hour__gte=since)
        return found if bot is None else found.filter(bot_id=bot)

    def summed(self) -> models.QuerySet[FSMHourlyMove, tuple[str, str | None, str | None, int, int]]:
        """Return kind, from, to, span and the sum of the counts."""
        found = self.order_by().values("kind", "from_state", "to_state", "span")
        return found.annotate(total=Sum(F("count"))).values_list(
            "kind", "from_state", "to_state", "span", "total"
        )


class FSMHourlyMove(models.Model):
    """How often something happened in an hour, by how long it took.

    A move or an expiry counts in the hour in which it was, and its span is the time in `from_state`. A
    reach counts in the hour in which the run began, and its span is the time between the first entries
    of two states. The id is made from all but the count, so that a row is found without an index on them.
    """

    class Kind(models.TextChoices):
        MOVE = "move", _("move")
        EXPIRY = "expiry", _("expiry")
        REACH = "reach", _("reach")

    id = models.UUIDField(primary_key=True)
    kind = models.CharField(_("kind"), max_length=6, choices=Kind)
    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    bot_id = models.BigIntegerField(_("bot"))
    hour = models.DateTimeField(_("hour"))
    from_state = models.CharField(_("from"), max_length=MAX_STATE_LENGTH, null=True)  # noqa: DJ001
    to_state = models.CharField(_("to"), max_length=MAX_STATE_LENGTH, null=True)  # noqa: DJ001
    span = models.SmallIntegerField(_("span"))
    count = models.BigIntegerField(_("count"))

    objects = HourlyQuerySet.as_manager()

    class Meta:
        db_table = "fsm_storage_hourly_move"
        verbose_name = _("hourly count of moves")
        verbose_name_plural = _("hourly counts of moves")
        default_permissions = ()
        indexes = [models.Index(fields=["kind", "hour"], name="fsm_storage_hourly_move_hour")]

    def __str__(self) -> str:
        return f"{self.from_state} → {self.to_state}"


class FSMHourlyPath(models.Model):
    """How many runs that began in an hour have gone this path so far. The id is made from all but the count."""

    id = models.UUIDField(primary_key=True)
    alias = models.CharField(_("storage"), max_length=MAX_ALIAS_LENGTH)
    bot_id = models.BigIntegerField(_("bot"))
    hour = models.DateTimeField(_("hour"))
    path = models.UUIDField(_("path"))
    states = models.JSONField(_("states"))
    count = models.BigIntegerField(_("count"))

    class Meta:
        db_table = "fsm_storage_hourly_path"
        verbose_name = _("hourly count of paths")
        verbose_name_plural = _("hourly counts of paths")
        default_permissions = ()
        indexes = [models.Index(fields=["hour"], name="fsm_storage_hourly_path_hour")]

    def __str__(self) -> str:
        return str(self.path)


class FSMRollupMark(models.Model):
    """How far the transitions are counted; there is one row.

    All ids up to `upto` are counted, but for those in `gaps`: ranges that were missing when their turn
    came, because their transaction was still open, or failed.
    """

    upto = models.BigIntegerField(_("up to"), default=0)
    gaps = models.JSONField(_("gaps"), default=list)
    rolled_at = models.DateTimeField(_("rolled up at"), null=True)

    class Meta:
        db_table = "fsm_storage_rollup_mark"
        verbose_name = _("mark of the roll-ups")
        verbose_name_plural = _("marks of the roll-ups")
        default_permissions = ()

    def __str__(self) -> str:
        return str(self.upto)
