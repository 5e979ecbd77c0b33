"""Data as other storages keep it. Pure."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any, NoReturn

MOST = 1_000_000
"""Values in the data of one conversation. A small pickle can stand for more than any memory holds."""


def data_of(content: Any) -> dict[str, Any]:
    """Return the data in `content`: JSON text, or None for none. Raises `ValueError` or `TypeError`."""
    if isinstance(content, Exception):
        raise content
    if content is None:
        return {}
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is no JSON: no UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    return _object(data)


def unpickled_data_of(content: bytes) -> dict[str, Any]:
    """Return the data in a pickle of plain values. Raises `ValueError` or `TypeError`.

    Nothing in a pickle is ever called or imported: one that names a class or a function is refused.
    """
    try:
        data = _PlainUnpickler(io.BytesIO(content)).load()
    except (TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"is no pickle of plain values: {type(error).__name__}") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"is no pickle of plain values: {error}") from error
    _count(data)
    return _object(data)


class _PlainUnpickler(pickle.Unpickler):
    """Makes dicts, lists, texts and numbers, for which a pickle needs no name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded from a file")


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"is a {type(data).__name__} where an object belongs")
    return data


def _count(data: Any) -> None:
    """Raise `ValueError` if data has too many values, each counted as often as it would be written."""
    seen, stack = 0, [data]
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list | tuple):
            seen += len(value)
            stack.extend(value.values() if isinstance(value, dict) else value)
        if seen > MOST:
            raise ValueError(f"has more than {MOST} values")
