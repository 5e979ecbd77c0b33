"""The tables of a mirrored storage, as its mirror writes them."""

from __future__ import annotations

from collections.abc import Sequence

from fsm_storage import signals
from fsm_storage.backends.django import DjangoStorage
from fsm_storage.backends.redis import RedisStorage
from fsm_storage.dialects import Cause, Write, WriteReply


class MirrorTable(DjangoStorage):
    """What its mirror writes of a `RedisStorage`, which is the sender of the signals."""

    def __init__(self, storage: RedisStorage) -> None:
        super().__init__(storage.alias, database=storage.database, history=storage.history)
        self.sender = type(storage)

    def replay(self, writes: Sequence[Write], cause: Cause) -> Sequence[WriteReply]:
        """Carry out writes to different keys, made elsewhere, in one transaction; answer each, with an error too.

        Waits for locked rows. Raises `StorageUnavailable` if they stay locked. Synchronous.
        """
        scope = self._scope._replace(cause=cause, tells=signals.is_heard())
        replies = self._session.write_patiently(writes, scope)
        if scope.tells or signals.hints:
            signals.announce(self.sender, self.alias, writes, replies, cause)
        return replies
