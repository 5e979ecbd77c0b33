"""Records, people and requests for the tests of the admin. All on the test's own connection."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db.models import JSONField, Value
from django.db.models.functions import Now
from django.test import Client
from django.urls import reverse

from fsm_storage.admin import actions, changelist
from fsm_storage.admin.forms import to_option
from fsm_storage.admin.jsontext import compact, pretty
from fsm_storage.admin.log import note_of
from fsm_storage.models import FSMRecord

LIST = "/admin/fsm_storage/fsmrecord/"
AGENT = [
    "view_fsmrecord", "view_data_fsmrecord", "change_state_fsmrecord", "change_data_fsmrecord", "bulk_fsmrecord",
]  # fmt: skip
XSS = "<script>alert(1)</script>"

_numbers = itertools.count(1000)


@pytest.fixture(autouse=True)
def _time_for_requests() -> Iterator[None]:
    """A machine that stands still for a while must not break off what a test asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changelist, "SEARCH_SECONDS", 60)
        patch.setattr(actions, "WORK_SECONDS", 60.0)
        yield


@pytest.fixture
def make_record(db: None) -> Callable[..., FSMRecord]:
    """Make a record; `state_ttl` and `data_ttl` count from now and may be negative."""

    def make(
        *, state_ttl: timedelta | None = None, data_ttl: timedelta | None = None, **fields: Any
    ) -> FSMRecord:
        number = next(_numbers)
        fields = {
            "bot_id": 42,
            "chat_id": number,
            "user_id": number,
            "version": 7,
            "destiny": "default",
            **fields,
        }
        fields.setdefault("alias", "default")
        fields.setdefault("key", f"{fields['bot_id']}:{fields['chat_id']}:{fields['user_id']}")
        if "data" in fields and fields["data"] is None:
            fields["data"] = Value(None, JSONField())  # JSON's null, not SQL's
        if state_ttl is not None:
            fields["state_expires_at"] = Now() + state_ttl
        if data_ttl is not None:
            fields["data_expires_at"] = Now() + data_ttl
        record = FSMRecord.objects.create(**fields)
        return FSMRecord.objects.with_clock().get(pk=record.pk)

    return make


@pytest.fixture
def make_user(db: None) -> Callable[..., User]:
    def make(*codenames: str, is_staff: bool = True) -> User:
        user = User.objects.create_user(f"user{next(_numbers)}", password="secret", is_staff=is_staff)
        permissions = Permission.objects.filter(codename__in=codenames)
        assert len(permissions) == len(codenames)
        user.user_permissions.add(*permissions)
        return user

    return make


@pytest.fixture
def as_user(make_user: Callable[..., User]) -> Callable[..., Client]:
    """Log a new staff user with these permissions in."""

    def client(*codenames: str, **options: Any) -> Client:
        client = Client()
        client.force_login(make_user(*codenames, **options))
        return client

    return client


@pytest.fixture
def agent(as_user: Callable[..., Client]) -> Client:
    """A support agent, who may see and change conversations."""
    return as_user(*AGENT, "view_fsmtransition")


def page_of(record: FSMRecord) -> str:
    return reverse("admin:fsm_storage_fsmrecord_change", args=[record.pk])


def form_of(record: FSMRecord, **changes: Any) -> dict[str, Any]:
    """Return what a browser would send from the page of `record`, with `changes` typed in."""
    form = {
        "version": record.version,
        "opened_state": to_option(record.current_state),
        "opened_data": compact(record.current_data),
        "state": to_option(record.current_state),
        "other_state": "",
        "state_ttl": "keep",
        "state_ttl_for": "",
        "data_json": pretty(record.current_data).replace("\n", "\r\n"),
        "data_ttl": "keep",
        "data_ttl_for": "",
        "_continue": "1",
    }
    return {**form, **changes}


def note(**filters: Any) -> dict[str, Any]:
    """Return what the one log entry says."""
    return note_of(LogEntry.objects.get(**filters))


def fresh(record: FSMRecord) -> FSMRecord:
    return FSMRecord.objects.with_clock().get(pk=record.pk)


def html_of(response: Any) -> str:
    text: str = response.content.decode()
    return text


def messages_of(response: Any) -> list[str]:
    return [str(message) for message in response.context["messages"]]
