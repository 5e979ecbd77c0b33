"""The questions that people ask of the tables, as adjectives. What has expired is judged by the database's clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from django.apps import apps
from django.db import connections, models
from django.db.models import Count, Exists, F, Max, OuterRef, Q
from django.db.models.fields.json import KeyTransform
from django.db.models.functions import Coalesce, Now
from django.utils import timezone

from fsm_storage.patches import KEEP, Keep

if TYPE_CHECKING:
    from aiogram.fsm.state import State, StatesGroup
    from aiogram.fsm.storage.base import StorageKey

    from fsm_storage.models import FSMRecord, FSMTransition  # noqa: F401 - the latter in quotes alone


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
        """Count the records in a state now, of one bot or of all, among the first `limit` + 1 in it.

        Returns how many were looked at, and how many of them count.
        """
        looked_at = self.filter(state=state) if bot_id is None else self.filter(state=state, bot_id=bot_id)
        looked_at = looked_at.order_by()[: limit + 1]
        # Of a column that is in the index of states: so the rows themselves are not read.
        found = looked_at.aggregate(looked=Count("bot_id"), live=Count("bot_id", filter=_state_is_live()))
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
        leases = apps.get_model("fsm_storage", "FSMLease")._default_manager.filter(
            alias=OuterRef("alias"), key=OuterRef("key"), expires_at__gt=UtcNow()
        )
        return self.filter(~Exists(leases))

    def with_clock(self) -> Self:
        """Add the database's time as `read_at`, by which `current_state` and the like are judged."""
        return self.annotate(read_at=UtcNow())


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
        is_expiry = Q(source=self.model.Source.EXPIRY)
        counts = self.order_by().values_list("from_state", "to_state")
        return counts.annotate(Count("pk"), expired=Count("pk", filter=is_expiry))
