"""`with_ttl`: an `FSMContext` whose writes have a time to live of their own, as handlers write it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StateType

from fsm_storage.backends.arguments import TtlOption, own_ttl
from fsm_storage.exceptions import TtlNotSupported


class TtlContext(FSMContext):
    """An `FSMContext` whose writes live for `ttl`, in place of the storage's own time to live."""

    def __init__(self, context: FSMContext, ttl: TtlOption) -> None:
        super().__init__(context.storage, context.key)
        self.ttl = ttl

    async def set_state(self, state: StateType = None) -> None:
        await self.storage.set_state(self.key, state, ttl=self.ttl)  # type: ignore[call-arg] # not aiogram's own

    async def set_data(self, data: Mapping[str, Any]) -> None:
        await self.storage.set_data(self.key, data, ttl=self.ttl)  # type: ignore[call-arg]

    async def update_data(self, data: Mapping[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        merged = {**kwargs, **(data or {})}
        return await self.storage.update_data(self.key, merged, ttl=self.ttl)  # type: ignore[call-arg]


def with_ttl(context: FSMContext, ttl: TtlOption) -> TtlContext:
    """Return `context` with another time to live for what is written through it.

        await with_ttl(state, timedelta(minutes=15)).set_state(Order.payment)

    `ttl`: seconds or a timedelta; None: for ever. The next write through the context itself has the
    storage's own again. Raises `InvalidTtl`, `InvalidTtlType`, or `TtlNotSupported` for a storage that
    has no time to live for a single write.
    """
    own_ttl(ttl, str(context.key))
    if "ttl" not in inspect.signature(context.storage.set_state).parameters:
        raise TtlNotSupported(type(context.storage).__name__)
    return TtlContext(context, ttl)
