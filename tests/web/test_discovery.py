import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from aiogram.fsm.state import State, StatesGroup
from django.apps import apps

from fsm_storage.discovery import declared_states, group_of


@pytest.fixture
def states_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A `states.py` of the app `fsm_storage`, which has none."""
    module = ModuleType("fsm_storage.states")
    monkeypatch.setitem(sys.modules, "fsm_storage.states", module)
    declared_states.cache_clear()
    yield module
    monkeypatch.undo()
    declared_states.cache_clear()


class Outer(StatesGroup):
    a = State()

    class Middle(StatesGroup):
        b = State()

        class Inner(StatesGroup):
            c = State()


def test_the_project_declares_its_groups_in_order():
    names = [group.name for group in declared_states().groups]
    assert names == ["Order", "Support", "Feedback", "Lunch"]
    assert "Order:payment" in declared_states()
    assert "Order:nothing" not in declared_states()


def test_nested_groups_have_their_full_names_at_any_depth(states_module):
    states_module.Outer = Outer
    catalog = declared_states()
    assert {"Outer:a", "Outer.Middle:b", "Outer.Middle.Inner:c"} <= set(catalog.states)
    assert catalog.within("Outer.Middle") == ["Outer.Middle:b", "Outer.Middle.Inner:c"]
    assert catalog.within("Out") == []


def test_a_group_that_is_imported_from_elsewhere_is_listed_once(states_module):
    from project.states import Order

    states_module.Order = states_module.Alias = Order
    states_module.Middle = Outer.Middle
    groups = [group.name for group in declared_states().groups]
    assert groups.count("Order") == 1
    assert groups.count("Outer.Middle") == 1
    assert declared_states().states.count("Order:item") == 1


def test_states_outside_a_group_and_things_that_are_no_states(states_module):
    states_module.lone, states_module.any, states_module.unnamed = State("lone"), State("*"), State()
    states_module.StatesGroup, states_module.number = StatesGroup, 1
    assert "@:lone" in declared_states()
    assert "*" not in declared_states()
    assert group_of("lone") == ""


def test_an_error_in_a_states_module_comes_through(monkeypatch, tmp_path):
    (tmp_path / "broken_app").mkdir()
    (tmp_path / "broken_app" / "__init__.py").write_text("")
    (tmp_path / "broken_app" / "states.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    declared_states.cache_clear()
    config = type(apps.get_app_config("project"))("broken_app", __import__("broken_app"))
    monkeypatch.setitem(apps.app_configs, "broken_app", config)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        declared_states()
    monkeypatch.undo()
    declared_states.cache_clear()
    assert "Order:item" in declared_states()
