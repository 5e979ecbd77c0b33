"""Data that other storages kept: read exactly, or refused; nothing in it is ever run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from datetime import datetime
from typing import Any

import pytest

from fsm_storage.sources import values
from fsm_storage.sources.values import data_of, unpickled_data_of

DATA = {"n": 1, "big": 2**70, "f": 0.1, "t": "é", "none": None, "yes": True, "deep": [{"x": [1, 2]}]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_plain_values_is_read(protocol: int) -> None:
    assert unpickled_data_of(pickle.dumps(DATA, protocol)) == DATA


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("must-not-be-there",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_runs_nothing(
    protocol: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"names (posix|nt|os)\.mkdir"):
        unpickled_data_of(pickle.dumps({"a": Evil()}, protocol))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [OrderedDict(a=1), {"at": datetime(2026, 1, 1)}, {"e": Evil}])
def test_objects_are_refused_by_the_name_of_their_class(value: Any) -> None:
    with pytest.raises(ValueError, match="it names"):
        unpickled_data_of(pickle.dumps(value))


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", pickle.dumps(DATA)[:-3], b"\x80\x04\x95", b"cos\nsystem\n"]
)
def test_a_broken_pickle_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no pickle of plain values"):
        unpickled_data_of(content)


def test_a_small_pickle_that_stands_for_too_much_is_refused() -> None:
    bomb: Any = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    content = pickle.dumps({"a": bomb})
    assert len(content) < 1000
    with pytest.raises(ValueError, match=str(values.MOST)):
        unpickled_data_of(content)


@pytest.mark.parametrize("content", [b"[1]", b"null", b'"text"', pickle.dumps([1])])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    read = unpickled_data_of if content.startswith(b"\x80") else data_of
    with pytest.raises(TypeError, match="where an object belongs"):
        read(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is no JSON"),
        (b"\x80\x04", "no UTF-8"),
        (b"", "is no JSON"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        data_of(content)


def test_no_data_is_an_empty_object() -> None:
    assert data_of(None) == {}
