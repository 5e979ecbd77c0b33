"""`DjangoStorage` against aiogram's `MemoryStorage` with an explicit clock: any sequence of operations."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from django.db.models import F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fsm_storage import DjangoStorage, storages
from fsm_storage.models import FSMRecord, FSMTransition

KEYS = [
    StorageKey(1, 10, 10),
    StorageKey(1, 10, 11),
    StorageKey(1, 10, 10, thread_id=0),
    StorageKey(2, 10, 10),
    StorageKey(1, 10, 10, destiny="é:%"),
]
keys = st.sampled_from(KEYS)
states = st.sampled_from([None, "", "a", "b", "Form:name"])
names = st.sampled_from(["x", "y", "z", "é"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé🛒'\"\\%", max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(names, children, max_size=3),
    max_leaves=5,
)
data = st.dictionaries(names, values, max_size=3)
STEPS = [300, 600, 1010]
"""Seconds that pass at a time: never so that something expires within the test's own running time."""


class Oracle:
    """`MemoryStorage`, whose parts expire by a clock that only `advance` moves."""

    def __init__(self, state_ttl: float | None, data_ttl: float | None) -> None:
        self.memory = MemoryStorage()
        self.ttl = {"state": state_ttl, "data": data_ttl}
        self.expires_at: dict[tuple[str, StorageKey], float] = {}
        self.now = 0.0

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        for (part, key), instant in list(self.expires_at.items()):
            if instant <= self.now:
                await (self.memory.set_state(key, None) if part == "state" else self.memory.set_data(key, {}))
                del self.expires_at[part, key]

    def wrote(self, part: str, key: StorageKey) -> None:
        ttl = self.ttl[part]
        if ttl is not None:
            self.expires_at[part, key] = self.now + ttl

    async def set_state(self, key: StorageKey, state: str | None) -> None:
        await self.memory.set_state(key, state)
        self.wrote("state", key)

    async def set_data(self, key: StorageKey, data: dict[str, Any]) -> None:
        await self.memory.set_data(key, data)
        self.wrote("data", key)

    async def update_data(self, key: StorageKey, data: dict[str, Any]) -> dict[str, Any]:
        self.wrote("data", key)
        return await self.memory.update_data(key, data)


class Machine(RuleBasedStateMachine):
    database = ""
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()

    @initialize(
        state_ttl=st.sampled_from([None, 500, 1000]),
        data_ttl=st.sampled_from([None, 500, 1000]),
        history=st.sampled_from(["off", "states", "full"]),
        batch_size=st.sampled_from([1, 2, 256]),
    )
    def open(self, state_ttl: Any, data_ttl: Any, history: Any, batch_size: int) -> None:
        self.alias = (
            f"{self.database}-{next(self.numbers)}"  # records of its own, so no table need be cleared
        )
        self.history = history
        self.storage = DjangoStorage(
            self.alias, database=self.database, state_ttl=state_ttl, data_ttl=data_ttl, history=history,
            batch_size=batch_size,
        )  # fmt: skip
        self.oracle = Oracle(state_ttl, data_ttl)
        storages.settings[self.alias] = {"BACKEND": "fsm_storage.DjangoStorage"}
        storages[self.alias] = self.storage

    def run(self, *operations: Coroutine[Any, Any, Any]) -> list[Any]:
        async def main() -> list[Any]:
            return await asyncio.wait_for(asyncio.gather(*operations), 20)

        return self.runner.run(main())

    @property
    def rows(self) -> Any:
        return FSMRecord.objects.using(self.database).filter(alias=self.alias)

    @rule(key=keys, state=states)
    def set_state(self, key: StorageKey, state: str | None) -> None:
        self.run(self.storage.set_state(key, state), self.oracle.set_state(key, state))

    @rule(key=keys, data=data)
    def set_data(self, key: StorageKey, data: dict[str, Any]) -> None:
        self.run(self.storage.set_data(key, data), self.oracle.set_data(key, data))

    @rule(key=keys, data=data)
    def update_data(self, key: StorageKey, data: dict[str, Any]) -> None:
        ours, theirs = self.run(self.storage.update_data(key, data), self.oracle.update_data(key, data))
        assert ours == theirs

    @rule(
        writes=st.lists(
            st.tuples(keys, st.sampled_from(["set_state", "set_data", "update_data"]), states, data),
            min_size=2,
            max_size=6,
            unique_by=lambda write: (write[0], write[1] == "set_state"),
        )
    )
    def write_together(self, writes: list[tuple[StorageKey, str, str | None, dict[str, Any]]]) -> None:
        """At most one write of each part of each key, so that their order makes no difference."""
        for storage in (self.storage, self.oracle):
            self.run(
                *(
                    getattr(storage, name)(key, state if name == "set_state" else data)
                    for key, name, state, data in writes
                )
            )

    @rule(key=keys, patches=st.lists(data, min_size=2, max_size=5))
    def merge_in_one_go(self, key: StorageKey, patches: list[dict[str, Any]]) -> None:
        """Updates of one key are carried out in the order in which they were asked for."""
        ours = self.run(*(self.storage.update_data(key, patch) for patch in patches))
        for mine, patch in zip(ours, patches, strict=True):
            assert mine == self.run(self.oracle.update_data(key, patch))[0]

    @rule(seconds=st.sampled_from(STEPS))
    def let_time_pass(self, seconds: float) -> None:
        for part in ("state_expires_at", "data_expires_at"):
            due = self.rows.filter(**{f"{part}__isnull": False})
            due.update(**{part: F(part) - timedelta(seconds=seconds)})
        self.run(self.oracle.advance(seconds))

    @rule()
    def sweep(self) -> None:
        while self.storage.sweep(3) != (0, 0, 0):
            pass
        assert not self.rows.expired().exists()

    @rule(key=keys, state=states, data=data, which=st.sampled_from(["state", "data", "both"]))
    def edit(self, key: StorageKey, state: str | None, data: dict[str, Any], which: str) -> None:
        """An edit keeps the time to expiry of a part that lives."""
        record = self.rows.with_key(key).first()
        if record is None:
            return
        changes = {"state": {"state": state}, "data": {"data": data}, "both": {"state": state, "data": data}}[
            which
        ]
        record.edit(**changes, if_version=record.version)
        if "state" in changes:
            before = self.run(self.oracle.memory.get_state(key))[0]
            self.run(self.oracle.memory.set_state(key, state))
            if before is None:
                self.oracle.wrote("state", key)
        if "data" in changes:
            had = self.run(self.oracle.memory.get_data(key))[0]
            self.run(self.oracle.memory.set_data(key, data))
            if not had:
                self.oracle.wrote("data", key)

    @invariant()
    def reads_agree(self) -> None:
        if not hasattr(self, "storage"):
            return
        for key in KEYS:
            ours = self.run(self.storage.get_state(key), self.storage.get_data(key))
            theirs = self.run(self.oracle.memory.get_state(key), self.oracle.memory.get_data(key))
            assert ours == theirs

    def teardown(self) -> None:
        if not hasattr(self, "storage"):
            self.runner.close()
            return
        try:
            self.check_history()
        finally:
            self.run(self.storage.close())
            del storages.settings[self.alias], storages[self.alias]
            self.runner.close()

    def check_history(self) -> None:
        """Each transition begins where the one before it ended, and the last one ends at the state."""
        for row in self.rows:
            steps = list(FSMTransition.objects.using(self.database).of(row).order_by("id"))
            if self.history == "off":
                assert steps == []
                continue
            if self.history == "full":
                # A change of data says what the bot saw then, which may be an expiry that is noted later.
                steps = [step for step in steps if step.from_state != step.to_state]
            at: str | None = None
            for step in steps:
                assert step.from_state == at
                at = step.to_state
                assert step.from_state != step.to_state
            assert at == row.state


@pytest.mark.timeout(300)
def test_any_sequence_of_operations_does_what_the_oracle_does(database: str) -> None:
    machine = type("MachineOn" + database, (Machine,), {"database": database})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )
