"""A chat's conversations under the id that it got when it became a supergroup. In the caller's transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from aiogram.fsm.storage.base import StorageKey
from asgiref.sync import sync_to_async
from django.db.models import F, TextField
from django.db.models.functions import Cast

from fsm_storage import signals
from fsm_storage.dialects import Scope, Write
from fsm_storage.exceptions import CorruptData, StorageClosed
from fsm_storage.patches import EMPTY, KEEP, Keep, Patch

if TYPE_CHECKING:
    from fsm_storage.backends.session import Session
    from fsm_storage.models import FSMRecord, FSMRecordQuerySet


class ChatMove(NamedTuple):
    """What Telegram told: this bot's chat `old` is chat `new` now."""

    bot_id: int
    old: int
    new: int

    def key(self, key: StorageKey) -> StorageKey:
        """Return a key of the old chat under the new id; some strategies have the chat in place of the user too."""
        user_id = self.new if key.user_id == self.old else key.user_id
        return replace(key, chat_id=self.new, user_id=user_id)


class MovesChats:
    """What `DjangoStorage` does when a chat gets another id."""

    if TYPE_CHECKING:
        database: str
        in_transaction: bool
        _scope: Scope
        _session: Session

        @property
        def closed(self) -> bool: ...

        def key_text(self, key: StorageKey) -> str: ...

        def put(self, writes: Sequence[Write], *, by: Any = None, source: str = "import") -> Any: ...

    async def move_chat(self, bot_id: int, old: int, new: int) -> int:
        """Give this bot's conversations in chat `old` to chat `new`, all in one transaction; return how many.

        To be called again at will: nothing is left to move. What happens where both chats have a
        conversation of one user is said in `Mover.move`. A cancelled caller stops waiting.
        """
        if self.closed:
            raise StorageClosed
        move_here = sync_to_async(self._move_here, thread_sensitive=self.in_transaction)
        return await asyncio.shield(move_here(ChatMove(bot_id, old, new)))

    def _move_here(self, move: ChatMove) -> int:
        mover = Mover(self.database, self._scope, self.key_text, partial(self.put, source="move"))
        try:
            moved = self._session.atomically(partial(mover.move, move))
            if mover.readdressed and signals.hints:
                self._session.after_commit(partial(signals.hint, self._scope.alias, mover.readdressed))
            return moved
        finally:
            if not self.in_transaction:
                self._session.release()


class Mover:
    """Moves the records of one storage. `key_text` is its key builder, `write` how it writes."""

    def __init__(
        self,
        database: str,
        scope: Scope,
        key_text: Callable[[StorageKey], str],
        write: Callable[[Sequence[Write]], Any],
    ) -> None:
        from fsm_storage.models import FSMRecord  # not earlier: a storage is imported before Django is set up

        self._record = FSMRecord
        self._records = FSMRecord.objects.using(database).filter(alias=scope.alias)
        self._codec, self._key_text, self._write = scope.codec, key_text, write
        self.readdressed: list[tuple[str, int | None]] = []
        """The records that kept their key, because the key builder leaves the chat out, and their versions."""

    def move(self, move: ChatMove) -> int:
        """Move what is live; return how many records that were. Again is no harm: nothing is left to move.

        Where there is a record under the new id already, the newer of both states wins, and the newer
        data is laid over the older. Each part takes its time to expiry along.
        """
        old = self._records.live().filter(bot_id=move.bot_id, chat_id=move.old)
        # The transaction begins with a write, or SQLite may refuse the one that comes after a read.
        if not old.update(version=F("version") + 1):
            return 0
        found = self._loaded(old)
        pairs = {self._key_text(move.key(row.storage_key)): row for row in found}
        self.readdressed = [(key, row.version) for key, row in pairs.items() if key == row.key]
        for key, row in list(pairs.items()):
            if key == row.key:
                self._records.filter(pk=row.pk).update(**_parts(move.key(row.storage_key)))
                del pairs[key]
        targets = self._targets(pairs, move)
        writes = [write for key, row in pairs.items() for write in self._moved(row, targets[key], move)]
        if writes:
            self._write(writes)
        for key, row in pairs.items():
            expiries = self._expiries(row, targets[key])
            if expiries:
                self._records.filter(key=key).update(**expiries)
        return len(found)

    def _loaded(self, records: FSMRecordQuerySet) -> list[FSMRecord]:
        """Return the records, locked; the data as text, because one that is no JSON would fail for all."""
        texts = records.with_clock().defer("data").annotate(text=Cast("data", TextField()))
        return list(texts.select_for_update().order_by("key"))

    def _targets(self, pairs: dict[str, FSMRecord], move: ChatMove) -> dict[str, FSMRecord]:
        """Return the records under the new id, all of them locked; where there was none, an empty one."""
        self._records.bulk_create(
            (
                self._record(
                    alias=row.alias,
                    key=key,
                    version=int(row.read_at.timestamp() * 1_000_000),  # type: ignore[attr-defined]
                    **_parts(move.key(row.storage_key)),
                )
                for key, row in pairs.items()
            ),
            ignore_conflicts=True,
        )
        targets = self._records.filter(key__in=pairs)
        targets.update(version=F("version") + 1)
        return {row.key: row for row in self._loaded(targets)}

    def _moved(self, row: FSMRecord, target: FSMRecord, move: ChatMove) -> list[Write]:
        """Return the write under the new key, and the one that ends the record under the old key."""
        state: str | Keep | None = row.current_state if _gives_state(row, target) else KEEP
        here, there = _live_text(row), _live_text(target)
        patch = Patch(state)
        if EMPTY not in (here, there) and self._is_readable(here):
            older, newer = (there, here) if _is_newer(row, target) else (here, there)
            patch = Patch(state, older, (newer,)) if self._is_readable(there) else Patch(state, here)
        elif there == EMPTY and here != EMPTY:
            patch = Patch(state, here)
        end = Patch(KEEP if row.current_state is None else None, KEEP if here == EMPTY else EMPTY)
        writes = [Write(row.key, row.storage_key, end)]
        if patch != Patch():
            writes.append(Write(target.key, move.key(row.storage_key), patch))
        return writes

    def _is_readable(self, text: str) -> bool:
        try:
            self._codec.decode(text, "")
        except CorruptData:
            return False
        return True

    def _expiries(self, row: FSMRecord, target: FSMRecord) -> dict[str, Any]:
        """Return the instants of the parts that were written: a write counts from now, a move does not."""
        expiries: dict[str, Any] = {}
        if _gives_state(row, target):
            expiries["state_expires_at"] = row.state_expires_at
        here, there = _live_text(row), _live_text(target)
        if here != EMPTY:
            from_row = there == EMPTY or _is_newer(row, target)
            expiries["data_expires_at"] = (row if from_row else target).data_expires_at
        return expiries


def _is_newer(row: FSMRecord, target: FSMRecord) -> bool:
    return row.updated_at > target.updated_at


def _gives_state(row: FSMRecord, target: FSMRecord) -> bool:
    """Say whether the state of `row` wins: where only one has a state, it does."""
    if row.current_state is None:
        return False
    return target.current_state is None or _is_newer(row, target)


def _live_text(row: FSMRecord) -> str:
    """Return the data as text; of expired data, none."""
    is_gone = row.data_expires_at is not None and row.data_expires_at <= row.read_at  # type: ignore[attr-defined]
    return EMPTY if is_gone else row.text  # type: ignore[attr-defined]


def _parts(key: StorageKey) -> dict[str, Any]:
    return {**vars(key)}
