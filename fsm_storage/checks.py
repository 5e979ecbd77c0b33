"""System checks of `FSM_STORAGES` and `FSM_ADMIN`. Each backend brings those of its own options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from aiogram.fsm.storage.base import BaseStorage
from django.apps import AppConfig
from django.core.checks import CheckMessage, Error

from fsm_storage.conf import storages, takes_alias
from fsm_storage.exceptions import InvalidStorageError
from fsm_storage.rights import InvalidAdminError, check_options


def check_storages(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check every configured alias."""
    try:
        aliases = list(storages.settings)
    except InvalidStorageError as error:
        return [Error(str(error), hint=f"For example FSM_STORAGES = {_EXAMPLE}", id="fsm_storage.E001")]
    messages: list[CheckMessage] = []
    for alias in aliases:
        # Two aliases on one database need not be told the same twice.
        messages += [message for message in _check_alias(alias) if message not in messages]
    return messages


_EXAMPLE = '{"default": {"BACKEND": "fsm_storage.DjangoStorage", "OPTIONS": {}}}'


def _check_alias(alias: str) -> list[CheckMessage]:
    try:
        backend, options = storages.configured(alias)
    except InvalidStorageError as error:
        code = "E002" if isinstance(error.__cause__, ImportError) else "E001"
        return [Error(str(error), hint=f"For example FSM_STORAGES = {_EXAMPLE}", id=f"fsm_storage.{code}")]
    if not isinstance(backend, type) or not issubclass(backend, BaseStorage):
        return [
            Error(
                f"FSM_STORAGES[{alias!r}]['BACKEND'] is no aiogram storage.",
                hint="Name a class that derives from aiogram.fsm.storage.base.BaseStorage.",
                id="fsm_storage.E002",
            )
        ]
    own = getattr(backend, "check", None)
    if callable(own) and takes_alias(backend):
        messages: list[CheckMessage] = own(alias, options)
        return messages
    try:
        inspect.signature(backend).bind(**options)
    except TypeError as error:
        text = f"FSM_STORAGES[{alias!r}]['OPTIONS'] do not fit {backend.__name__}: {error}."
        return [Error(text, hint="They are its keyword arguments.", id="fsm_storage.E003")]
    return []


def check_admin(app_configs: Sequence[AppConfig] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check `FSM_ADMIN`."""
    try:
        check_options()
    except InvalidAdminError as error:
        hint = 'For example FSM_ADMIN = {"MASK": ["phone", "*email*"], "READ_ONLY": False}'
        return [Error(str(error), hint=hint, id="fsm_storage.E020")]
    return []
