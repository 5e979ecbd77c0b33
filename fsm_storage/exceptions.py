"""Every error that this package raises on purpose. Sentences are built here, from facts kept as attributes."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured


class FSMStorageError(Exception):
    """The root of this package's errors."""


class InvalidStorageError(FSMStorageError, ImproperlyConfigured):
    """`FSM_STORAGES`, or the arguments of a storage, are wrong."""


class NotMigrated(FSMStorageError, ImproperlyConfigured):
    """The tables of this app are not in the database, or are older than the code."""

    def __init__(self, database: str) -> None:
        super().__init__(
            f"the tables of fsm_storage are missing or out of date in database {database!r}: "
            f"run `manage.py migrate fsm_storage --database {database}`"
        )
        self.database = database


class StorageTimeout(FSMStorageError, TimeoutError):
    """An operation was not answered within the storage's `timeout`.

    A write that had been handed to the database may still be carried out, whole; a read may
    simply be asked again.
    """

    def __init__(self, waited: float, reason: str) -> None:
        super().__init__(f"no answer within {waited:.1f} s: {reason}")
        self.waited, self.reason = waited, reason


class StorageUnavailable(FSMStorageError, ConnectionError):
    """The database refused or lost the operation, and trying again within `timeout` did not help."""

    def __init__(self, database: str, cause: BaseException) -> None:
        super().__init__(f"database {database!r} failed: {type(cause).__name__}: {str(cause).strip()}")
        self.database = database


class RedisUnavailable(StorageUnavailable):
    """Redis refused or lost the operation, and trying again within `timeout` did not help.

    A write that had been sent may still have been carried out, whole. `__cause__` is redis-py's error.
    """

    def __init__(self, alias: str, cause: BaseException) -> None:
        said = str(cause).strip() or "no answer"
        Exception.__init__(self, f"Redis of storage {alias!r} failed: {type(cause).__name__}: {said}")
        self.alias, self.database = alias, ""
        self.__cause__ = cause


class StorageClosed(FSMStorageError, RuntimeError):
    """The storage, or the event isolation, was closed; make a new one."""

    def __init__(self, what: str = "storage") -> None:
        super().__init__(f"the {what} is closed")


class LeaseTimeout(FSMStorageError, TimeoutError):
    """The key stayed locked by other handlers for the whole timeout. This one did not run."""

    def __init__(self, key: str, waited: float) -> None:
        super().__init__(f"lease on {key!r} not granted within {waited:.1f} s: other handlers hold it")
        self.key, self.waited = key, waited


class LeaseLost(FSMStorageError):
    """The lease could not be renewed in time, so another handler may work on the key by now."""

    def __init__(self, key: str) -> None:
        super().__init__(f"lease on {key!r} lost: it ran out, or another handler has it")
        self.key = key


class InvalidKey(FSMStorageError, ValueError):
    """A part of the storage key cannot be kept exactly."""

    def __init__(self, part: str, value: object, reason: str) -> None:
        super().__init__(f"{part}={_short(value)} of the storage key {reason}")
        self.part, self.value, self.reason = part, value, reason


class InvalidKeyType(FSMStorageError, TypeError):
    """A part of the storage key has a type that Telegram never sends."""

    def __init__(self, part: str, value: object, expected: str) -> None:
        super().__init__(
            f"{part} of the storage key must be {expected}, not {type(value).__name__} ({_short(value)})"
        )
        self.part, self.value, self.expected = part, value, expected


class InvalidState(FSMStorageError, ValueError):
    """A state that cannot be kept exactly."""

    def __init__(self, state: str, reason: str, key: str | None = None) -> None:
        super().__init__(f"state {_short(state)}{_of(key)} {reason}")
        self.state, self.reason, self.key = state, reason, key


class InvalidStateType(FSMStorageError, TypeError):
    """A state that is no `str`, `State` or `None`."""

    def __init__(self, state: object, key: str | None = None) -> None:
        super().__init__(f"a state{_of(key)} is a str, a State or None, not {_short(state)}")
        self.state, self.key = state, key


class InvalidTtl(FSMStorageError, ValueError):
    """A time to live that is not above 0 and at most 100 years."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(f"the ttl{_of(key)} {reason}")
        self.reason, self.key = reason, key


class InvalidTtlType(FSMStorageError, TypeError):
    """A time to live that is neither seconds nor a timedelta nor None."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(f"the ttl{_of(key)} {reason}")
        self.reason, self.key = reason, key


class TtlNotSupported(FSMStorageError, TypeError):
    """A storage that has no time to live for a single write."""

    def __init__(self, storage: str) -> None:
        super().__init__(f"{storage} takes no ttl for a single write; DjangoStorage does")
        self.storage = storage


class InvalidData(FSMStorageError, ValueError):
    """Data that cannot be kept exactly. `path` leads to the value, as in `cart[2].price`."""

    def __init__(self, path: str, reason: str, key: str | None = None) -> None:
        super().__init__(f"data{_of(key)} cannot be stored: {path or 'the whole'} {reason}")
        self.path, self.reason, self.key = path, reason, key


class InvalidDataType(FSMStorageError, TypeError):
    """Data with a type that JSON does not have. `path` leads to the value."""

    def __init__(self, path: str, reason: str, key: str | None = None) -> None:
        super().__init__(f"data{_of(key)} cannot be stored: {path or 'the whole'} {reason}")
        self.path, self.reason, self.key = path, reason, key


class CorruptData(FSMStorageError, ValueError):
    """What is stored for a key is not a JSON object, or not a state. `set_data`, `set_state` replace it."""

    def __init__(self, key: str, reason: str, part: str = "data") -> None:
        super().__init__(f"the stored {part} of {key!r} is unreadable ({reason}); set_{part}() replaces it")
        self.key, self.reason, self.part = key, reason, part


class InvalidOutboxRecord(FSMStorageError, ValueError):
    """Something in the outbox of a `RedisStorage` that is no record of it."""

    def __init__(self, found: object, reason: str) -> None:
        super().__init__(f"{_short(found)} is no record of the outbox: {reason}")
        self.found, self.reason = found, reason


class VersionConflict(FSMStorageError):
    """The record changed, or went, after it was read; nothing was written."""

    def __init__(self, key: str, expected: int, found: int | None) -> None:
        now = "it is gone" if found is None else f"it is at version {found}"
        super().__init__(f"{key!r} changed meanwhile: expected version {expected}, {now}")
        self.key, self.expected, self.found = key, expected, found


class RedisConflict(VersionConflict):
    """Redis holds something else than the record that was read: the mirror is behind, or the bot was faster."""

    def __init__(self, key: str, expected: int) -> None:
        super().__init__(key, expected, None)
        self.args = (f"{key!r} changed meanwhile: Redis holds something else than version {expected}",)


class NotEditable(FSMStorageError):
    """The record's alias is not configured, or its storage cannot be edited from Django."""

    def __init__(self, alias: str, reason: str) -> None:
        super().__init__(f"records of storage {alias!r} cannot be edited: {reason}")
        self.alias, self.reason = alias, reason


class MissingDependency(FSMStorageError, ImproperlyConfigured):
    """A migration changes conversations, but may run before their tables are there."""

    def __init__(self, app_label: str) -> None:
        super().__init__(
            f"a migration of {app_label!r} changes conversations: "
            "add ('fsm_storage', '0001_initial') to its dependencies"
        )
        self.app_label = app_label


class TransformFailed(FSMStorageError):
    """The function of a `TransformData` failed for one conversation; nothing of its batch was written."""

    def __init__(self, function: str, key: str, reason: str) -> None:
        super().__init__(f"{function}() failed for {key!r}: {reason}; nothing of its batch was written")
        self.function, self.key, self.reason = function, key, reason


class StillInUse(FSMStorageError):
    """Old states or data came up again and again while they were being renamed."""

    def __init__(self, description: str, changed: int) -> None:
        super().__init__(
            f"{description}: {changed} were changed, and more come up all the time. A bot that runs the "
            "old code writes them: stop it, and run the migration again, which goes on from here"
        )
        self.description, self.changed = description, changed


def _of(key: str | None) -> str:
    return "" if key is None else f" of {key!r}"


def _short(value: Any, limit: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
