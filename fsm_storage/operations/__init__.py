"""Operations for a project's own migrations: conversations follow when states or data are renamed.

They work in batches through the storage of each alias, by compare-and-set, while the bot runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, Self

from django.db.models import Q, QuerySet, TextField
from django.db.models.functions import Cast

from fsm_storage.codec import Codec
from fsm_storage.conf import Editor
from fsm_storage.exceptions import CorruptData, TransformFailed
from fsm_storage.keys import state_text
from fsm_storage.models import FSMRecord
from fsm_storage.operations.base import Changes, ConversationOperation

__all__ = ["RenameDataKey", "RenameState", "RenameStatesGroup", "TransformData"]

logger = logging.getLogger("fsm_storage")

MAX_STATES = 100_000

Data = dict[str, Any]


class RenameState(ConversationOperation):
    """Put the conversations that are in state `old` into state `new`.

    Names as they are stored: `"Form:name"`. What expires goes on expiring when it would have.
    """

    def __init__(self, old: str, new: str, *, alias: str | None = None, elidable: bool = False) -> None:
        super().__init__(alias=alias, elidable=elidable)
        self.old, self.new = _different(_state(old), _state(new))

    def reversed(self) -> Self:
        return type(self)(self.new, self.old, alias=self.alias)

    def describe(self) -> str:
        return f"Rename state {self.old} to {self.new} in conversations"

    @property
    def migration_name_fragment(self) -> str:
        return _fragment("rename_state", self.old, self.new)

    def _records(self, using: str) -> QuerySet[FSMRecord]:
        return super()._records(using).filter(state=self.old)

    def _changes(self, record: FSMRecord, editor: Editor, again: bool) -> Changes | None:
        return {"state": self.new}


class RenameStatesGroup(ConversationOperation):
    """Put the conversations in the states of group `old`, nested groups included, into those of `new`.

    Full names: `RenameStatesGroup("Form", "Signup")` makes `Form:name` to `Signup:name` and
    `Form.Address:city` to `Signup.Address:city`.
    """

    def __init__(self, old: str, new: str, *, alias: str | None = None, elidable: bool = False) -> None:
        super().__init__(alias=alias, elidable=elidable)
        self.old, self.new = _different(_group(old), _group(new))

    def reversed(self) -> Self:
        return type(self)(self.new, self.old, alias=self.alias)

    def describe(self) -> str:
        return f"Rename states group {self.old} to {self.new} in conversations"

    @property
    def migration_name_fragment(self) -> str:
        return _fragment("rename_group", self.old, self.new)

    def _records(self, using: str) -> QuerySet[FSMRecord]:
        return super()._records(using).filter(state__in=_states_within(using, self.old))

    def _changes(self, record: FSMRecord, editor: Editor, again: bool) -> Changes | None:
        return {"state": self.new + (record.state or "")[len(self.old) :]}


class _DataOperation(ConversationOperation):
    """Changes data, of all conversations or of those in some states."""

    def __init__(
        self,
        *,
        states: str | Iterable[str] | None = None,
        group: str | None = None,
        alias: str | None = None,
        elidable: bool = False,
    ) -> None:
        super().__init__(alias=alias, elidable=elidable)
        if states is not None and group is not None:
            raise ValueError("give states or a group, not both")
        self.states = None if states is None else [states] if isinstance(states, str) else list(states)
        for state in self.states or ():
            _state(state)
        self.group = None if group is None else _group(group)

    def _records(self, using: str) -> QuerySet[FSMRecord]:
        states = self.states if self.group is None else _states_within(using, self.group)
        # As text: one row that is no JSON would fail the query for all others.
        records = super()._records(using).annotate(text=Cast("data", TextField()))
        records = records.exclude(text="{}")
        return records if states is None else records.filter(state__in=states)

    def _changes(self, record: FSMRecord, editor: Editor, again: bool) -> Changes | None:
        codec: Codec = getattr(editor, "codec", None) or Codec()
        try:
            data = codec.decode(record.text, record.key)  # type: ignore[attr-defined]
        except CorruptData as error:
            logger.warning("left as it is: %s", error)
            return None
        before = codec.encode(data, record.key)
        new = self._new_data(record, data, again)
        return None if codec.encode(new, record.key) == before else {"data": new}

    def _new_data(self, record: FSMRecord, data: Data, again: bool) -> Data:
        raise NotImplementedError


class RenameDataKey(_DataOperation):
    """Rename a key of the data, of the outermost level.

    Where a conversation has both keys, the value under the new one stays, because code that knows
    the new name wrote it, and the other one is dropped. But where the old key turns up again while
    the operation runs, a bot with the old code wrote it after the renaming: then its value stays.
    """

    def __init__(
        self,
        old: str,
        new: str,
        *,
        states: str | Iterable[str] | None = None,
        group: str | None = None,
        alias: str | None = None,
        elidable: bool = False,
    ) -> None:
        super().__init__(states=states, group=group, alias=alias, elidable=elidable)
        self.old, self.new = _different(_text("key", old), _text("key", new))

    def reversed(self) -> Self:
        return type(self)(self.new, self.old, states=self.states, group=self.group, alias=self.alias)

    def describe(self) -> str:
        return f"Rename data key {self.old} to {self.new} in conversations"

    @property
    def migration_name_fragment(self) -> str:
        return _fragment("rename_key", self.old, self.new)

    def _records(self, using: str) -> QuerySet[FSMRecord]:
        # In the text as PostgreSQL and our encoder write it, or as a `json_dumps` that escapes.
        spelled, escaped = (json.dumps(self.old, ensure_ascii=escapes) for escapes in (False, True))
        return super()._records(using).filter(Q(text__contains=spelled) | Q(text__contains=escaped))

    def _new_data(self, record: FSMRecord, data: Data, again: bool) -> Data:
        if self.old not in data:  # but somewhere inside, as a value or as a key
            return data
        rest = {key: value for key, value in data.items() if key != self.old}
        renamed = {self.new: data[self.old]}
        return {**rest, **renamed} if again else {**renamed, **rest}


class TransformData(_DataOperation):
    """Replace the data of each conversation by what `function` makes of it.

    `function` gets the data as handlers get it, and returns the new data. Where it raises, the
    operation stops with `TransformFailed`, which names the conversation; nothing of its batch was
    written. `reverse` undoes it; without one, the migration cannot be reversed.

    Each conversation is given to it once in a run. Outside an atomic migration, a run that was
    broken off starts over from the beginning: let `function` return data that is new already as it is.
    """

    until_none_is_left = False

    def __init__(
        self,
        function: Callable[[Data], Data],
        reverse: Callable[[Data], Data] | None = None,
        *,
        states: str | Iterable[str] | None = None,
        group: str | None = None,
        alias: str | None = None,
        elidable: bool = False,
    ) -> None:
        super().__init__(states=states, group=group, alias=alias, elidable=elidable)
        for argument in (function, reverse):
            if argument is not None and not callable(argument):
                raise TypeError(f"TransformData takes functions, not {argument!r}")
        self.function, self.reverse = function, reverse

    @property
    def reversible(self) -> bool:  # type: ignore[override] # as in RunPython
        return self.reverse is not None

    def reversed(self) -> Self:
        if self.reverse is None:
            raise NotImplementedError("You cannot reverse this operation")
        return type(self)(self.reverse, self.function, states=self.states, group=self.group, alias=self.alias)

    def describe(self) -> str:
        return f"Transform the data of conversations by {_name(self.function)}"

    @property
    def migration_name_fragment(self) -> str:
        return _fragment("transform_data", _name(self.function))

    def _new_data(self, record: FSMRecord, data: Data, again: bool) -> Data:
        try:
            new = self.function(data)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise TransformFailed(_name(self.function), record.key, reason) from error
        if not isinstance(new, dict):
            reason = f"it returned {type(new).__name__}, not a dict"
            raise TransformFailed(_name(self.function), record.key, reason)
        return new


def _states_within(using: str, group: str) -> list[str]:
    """Return the states in the table that belong to `group` or to a group nested in it."""
    return [
        state
        for state in FSMRecord.objects.using(using).states_in_use(MAX_STATES)
        if state.startswith(_inside(group))
    ]


def _inside(group: str) -> tuple[str, str]:
    return f"{group}:", f"{group}."


def _state(state: str) -> str:
    if not isinstance(state, str):  # a State could not be written into a migration
        raise TypeError(f"a state is named by a str, like 'Form:name', not {state!r}")
    state_text(state)
    return state


def _group(group: str) -> str:
    if not _text("group", group) or ":" in group:
        raise ValueError(
            f"{group!r} is no name of a group of states; one looks like 'Form' or 'Form.Address'"
        )
    return group


def _text(what: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {what} is named by a str, not {value!r}")
    return value


def _different(old: str, new: str) -> tuple[str, str]:
    if old == new:
        raise ValueError(f"the old and the new name are the same: {old!r}")
    return old, new


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", repr(function)))


def _fragment(*words: str) -> str:
    """Return a piece of a migration's file name."""
    return "_".join("".join(c if c.isalnum() else "_" for c in word).strip("_").lower() for word in words)
