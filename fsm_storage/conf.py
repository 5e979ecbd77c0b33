"""`FSM_STORAGES`, and the storages made from it. Backends are loaded by their dotted paths only."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from django.conf import settings as django_settings
from django.core.signals import setting_changed
from django.utils.connection import BaseConnectionHandler
from django.utils.module_loading import import_string

from fsm_storage.exceptions import InvalidStorageError, NotEditable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiogram.fsm.storage.base import BaseStorage

    from fsm_storage.models import FSMRecord

DEFAULT = {"default": {"BACKEND": "fsm_storage.DjangoStorage"}}


class Editor(Protocol):
    """A storage whose records can be changed from Django."""

    def edit(self, records: Sequence[FSMRecord], **changes: Any) -> int: ...


class StorageHandler(BaseConnectionHandler):  # type: ignore[type-arg] # generic only in the stubs
    """The storages of `settings.FSM_STORAGES`, by alias: one object per alias and process.

    `BaseConnectionHandler` by itself keeps one per thread. A storage that was closed, as aiogram's
    Dispatcher does when polling ends, is made anew at the next call.
    """

    settings_name = "FSM_STORAGES"
    exception_class = InvalidStorageError

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._storages: dict[str, BaseStorage] = {}
        self._lock = threading.RLock()

    def configure_settings(self, settings: Any) -> Any:
        if settings is None:
            settings = getattr(django_settings, self.settings_name, DEFAULT)
        if not isinstance(settings, Mapping):
            raise InvalidStorageError(f"FSM_STORAGES must be a dict of aliases, not {settings!r}")
        if not settings:
            raise InvalidStorageError(
                "FSM_STORAGES is empty; leave it out for the default, or name a storage"
            )
        return settings

    def __getitem__(self, alias: str) -> BaseStorage:
        storage = self._storages.get(alias)
        if storage is not None and not getattr(storage, "closed", False):
            return storage
        with self._lock:
            storage = self._storages.get(alias)
            if storage is None or getattr(storage, "closed", False):
                storage = self._storages[alias] = self.create_connection(alias)
            return storage

    def __setitem__(self, alias: str, storage: BaseStorage) -> None:
        self._storages[alias] = storage

    def __delitem__(self, alias: str) -> None:
        del self._storages[alias]

    def create_connection(self, alias: str) -> BaseStorage:
        """Make the storage of `alias`. Raises `InvalidStorageError`, which names what is wrong."""
        from aiogram.fsm.storage.base import BaseStorage

        backend, options = self.configured(alias)
        if not issubclass(backend, BaseStorage):
            raise InvalidStorageError(f"FSM_STORAGES[{alias!r}]['BACKEND'] is no aiogram storage")
        arguments = {**options, "alias": alias} if takes_alias(backend) else options
        try:
            return backend(**arguments)
        except TypeError as error:
            raise InvalidStorageError(f"FSM_STORAGES[{alias!r}]: {error}") from error

    def configured(self, alias: str) -> tuple[type, dict[str, Any]]:
        """Return the class and the options of `alias`. Raises `InvalidStorageError`."""
        try:
            entry = self.settings[alias]
        except KeyError:
            known = ", ".join(map(repr, self.settings)) or "nothing"
            raise InvalidStorageError(f"FSM_STORAGES has no {alias!r}; it has {known}") from None
        if not isinstance(entry, Mapping) or not isinstance(entry.get("BACKEND"), str):
            raise InvalidStorageError(
                f"FSM_STORAGES[{alias!r}] needs a 'BACKEND', the dotted path of a storage"
            )
        unknown = sorted(set(entry) - {"BACKEND", "OPTIONS"}, key=str)
        if unknown:
            raise InvalidStorageError(
                f"FSM_STORAGES[{alias!r}] has {unknown[0]!r}; it takes 'BACKEND' and 'OPTIONS'"
            )
        if not isinstance(entry.get("OPTIONS", {}), Mapping):
            raise InvalidStorageError(f"FSM_STORAGES[{alias!r}]['OPTIONS'] must be a dict")
        try:
            backend = import_string(entry["BACKEND"])
        except ImportError as error:
            raise InvalidStorageError(
                f"FSM_STORAGES[{alias!r}]['BACKEND']: {entry['BACKEND']!r} cannot be imported: {error}"
            ) from error
        if not isinstance(backend, type):
            raise InvalidStorageError(f"FSM_STORAGES[{alias!r}]['BACKEND']: {entry['BACKEND']!r} is no class")
        return backend, dict(entry.get("OPTIONS", {}))

    def editor(self, alias: str) -> Editor:
        """Return the storage of `alias` if its records can be edited. Raises `NotEditable`."""
        if alias not in self.settings:
            raise NotEditable(alias, "FSM_STORAGES does not have it")
        storage = self[alias]
        if not callable(getattr(storage, "edit", None)):
            raise NotEditable(alias, f"{type(storage).__name__} keeps nothing in Django")
        return cast(Editor, storage)

    def close_all(self) -> None:
        """Finish and close every storage that was made and can be closed from synchronous code."""
        with self._lock:
            storages, self._storages = self._storages, {}
        for storage in storages.values():
            shut = getattr(storage, "shut", None)
            if shut is not None:
                shut()

    def reset(self) -> None:
        """Forget the settings and the storages made from them."""
        self.close_all()
        self.__dict__.pop("settings", None)
        self._settings = None


def takes_alias(backend: type) -> bool:
    """Say whether a storage wants to know its alias; aiogram's own do not."""
    return "alias" in parameters(backend)


def parameters(backend: type) -> list[str]:
    """Return the names that the constructors of a class and of its bases take, *args and **kwargs aside."""
    names: dict[str, None] = {}
    for base in backend.__mro__:
        if "__init__" in vars(base) and base is not object:
            found = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            names.update({p.name: None for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)})
    return list(names)


storages = StorageHandler()


def _settings_changed(*, setting: str, **_: Any) -> None:
    if setting == StorageHandler.settings_name:
        storages.reset()


setting_changed.connect(_settings_changed, dispatch_uid="fsm_storage")


def _start_anew() -> None:
    """In the child of a fork: the thread that held the lock is not there."""
    storages._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
