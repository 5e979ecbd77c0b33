"""What chats and users are called: the table, and who looks it up. Written by `chats.KeepNames`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

from django.db import connections, models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils.module_loading import import_string
from django.utils.translation import gettext_lazy as _

from fsm_storage.keys import MAX_NAME_LENGTH, name_key
from fsm_storage.rights import option

logger = logging.getLogger("fsm_storage")


class Name(NamedTuple):
    """What a chat or a user is called: a chat's title or a person's full name, and the user name without @."""

    title: str = ""
    username: str = ""


Lookup = Callable[[Iterable[int]], Mapping[int, Any]]


def names_of(ids: Iterable[int]) -> dict[int, Name]:
    """Return the names of those of `ids` that have one, by `FSM_ADMIN["NAMES"]` or from the table.

    A lookup of the project's own that raises is logged, and nobody has a name.
    """
    wanted, lookup = sorted(set(ids)), option("NAMES")
    if not wanted or lookup is False:
        return {}
    if lookup is None:
        rows = FSMPeer.objects.filter(peer_id__in=wanted).values_list("peer_id", "title", "username")
        return {peer_id: Name(title, username) for peer_id, title, username in rows}
    find: Lookup = import_string(lookup) if isinstance(lookup, str) else lookup
    try:
        return {peer_id: _name(found) for peer_id, found in find(wanted).items()}
    except Exception:
        logger.exception("FSM_ADMIN['NAMES'] failed for %d ids", len(wanted))
        return {}


def _name(found: Any) -> Name:
    return Name(found) if isinstance(found, str) else Name(*found)


class FSMPeerQuerySet(models.QuerySet["FSMPeer"]):
    """Adjectives for chats and users."""

    def called(self, text: str) -> Self:
        """Those whose name, or its second word, or user name begins with `text`; after an @, user names only."""
        key = name_key(text.removeprefix("@"))
        fields = ["username_key"] if text.startswith("@") else ["title_key", "rest_key", "username_key"]
        begins = Q()
        for field in fields:
            begins |= self._begins(field, key)
        return self.filter(begins)

    def _begins(self, field: str, key: str) -> Q:
        begins, vendor = Q(**{f"{field}__startswith": key}), connections[self.db].vendor
        # What an index answers: on PostgreSQL that is this LIKE, on MariaDB one without BINARY, on SQLite a range.
        if vendor == "mysql":
            begins &= Q(**{f"{field}__istartswith": key})
        elif vendor != "postgresql":
            begins &= Q(**{f"{field}__gte": key, f"{field}__lt": f"{key}\U0010ffff"})
        return begins


class FSMPeer(models.Model):
    """What a chat or a user is called. Telegram's ids of chats and of users never meet."""

    peer_id = models.BigIntegerField(_("id"), primary_key=True)
    title = models.CharField(_("title"), max_length=MAX_NAME_LENGTH, blank=True, default="", db_default="")
    username = models.CharField(
        _("user name"), max_length=MAX_NAME_LENGTH, blank=True, default="", db_default=""
    )
    # For the search: in lower case, the title and what comes after its first word.
    title_key = models.CharField(max_length=MAX_NAME_LENGTH, editable=False, default="", db_default="")
    rest_key = models.CharField(max_length=MAX_NAME_LENGTH, editable=False, default="", db_default="")
    username_key = models.CharField(max_length=MAX_NAME_LENGTH, editable=False, default="", db_default="")
    updated_at = models.DateTimeField(_("last change"), db_default=Now())

    objects = FSMPeerQuerySet.as_manager()

    class Meta:
        db_table = "fsm_storage_peer"
        verbose_name = _("name")
        verbose_name_plural = _("names")
        default_permissions = ("view",)
        indexes = [
            models.Index(
                fields=[f"{part}_key"], name=f"fsm_storage_peer_{part}_key", opclasses=["varchar_pattern_ops"]
            )
            for part in ("title", "rest", "username")
        ]

    def __str__(self) -> str:
        return self.title or self.username or str(self.peer_id)
