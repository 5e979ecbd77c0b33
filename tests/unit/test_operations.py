"""Operations as Django's machinery sees them: written into files, described, squashed, refused."""

from __future__ import annotations

from typing import Any

import pytest
from aiogram.fsm.state import State, StatesGroup
from django.db.migrations import Migration
from django.db.migrations.writer import MigrationWriter

from fsm_storage.exceptions import InvalidState
from fsm_storage.operations import RenameDataKey, RenameState, RenameStatesGroup, TransformData


class Form(StatesGroup):
    name = State()


def forwards(data: dict[str, Any]) -> dict[str, Any]:
    return data


ALL = [
    RenameState("Form:name", "Form:full_name"),
    RenameState("Form:name", "Form:full_name", alias="shop", elidable=True),
    RenameStatesGroup("Form", "Signup"),
    RenameDataKey("phone", "tel", states=["Form:name"]),
    RenameDataKey("phone", "tel", group="Form", alias="shop"),
    TransformData(forwards),
    TransformData(forwards, forwards, states="Form:name"),
]


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: type(operation).__name__)
def test_what_is_written_into_a_migration_reads_as_the_same(operation: Any) -> None:
    migration = Migration("0002_it", "shop")
    migration.operations = [operation]
    names: dict[str, Any] = {}
    exec(MigrationWriter(migration).as_string(), names)
    (read,) = names["Migration"].operations
    assert type(read) is type(operation)
    meaning = [{**vars(one), "_constructor_args": None} for one in (read, operation)]
    assert meaning[0] == meaning[1]


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: type(operation).__name__)
def test_it_says_what_it_does(operation: Any) -> None:
    assert "onversations" in operation.describe()
    assert operation.migration_name_fragment.isidentifier()
    assert not operation.reduces_to_sql
    assert operation.atomic is False


def test_only_data_with_a_way_back_is_reversible() -> None:
    assert [operation.reversible for operation in ALL] == [True] * 5 + [False, True]
    assert ALL[0].reversed().reversed().deconstruct()[1] == ("Form:name", "Form:full_name")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: RenameState(Form.name, "b"), TypeError),
        (lambda: RenameState(None, "b"), TypeError),
        (lambda: RenameState("a", "a"), ValueError),
        (lambda: RenameState("a", "b" * 300), InvalidState),
        (lambda: RenameState("a", "b\0"), InvalidState),
        (lambda: RenameStatesGroup("Form:name", "b"), ValueError),
        (lambda: RenameStatesGroup("", "b"), ValueError),
        (lambda: RenameStatesGroup(Form, "b"), TypeError),
        (lambda: RenameDataKey(1, "b"), TypeError),
        (lambda: RenameDataKey("a", "b", states="a", group="b"), ValueError),
        (lambda: TransformData("path.of.function"), TypeError),
        (lambda: TransformData(forwards, reverse=1), TypeError),
    ],
)
def test_wrong_arguments_are_refused_when_the_file_is_read(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()
