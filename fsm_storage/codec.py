"""Data to JSON text and back: exact, or refused with the path of the value at fault. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NoReturn

from aiogram.exceptions import DataNotDictLikeError

from fsm_storage.exceptions import CorruptData, InvalidData, InvalidDataType
from fsm_storage.keys import text_flaw
from fsm_storage.patches import EMPTY

Loads = Callable[[str], Any]
Dumps = Callable[[Any], str | bytes]

MAX_DEPTH = 500
"""Levels of nesting. SQLite's own JSON functions stop at 1,000, CPython's decoder a little later."""
MAX_LENGTH = 1024 * 1024
"""Characters of JSON text. Coding holds the interpreter: so many take up to 50 ms, or 250 ms if all are brackets."""


def _encoder(*, ensure_ascii: bool = False, **options: Any) -> Callable[[Any], str]:
    """Return what does the work of `JSONEncoder(…).encode` in half of the time: that makes an encoder at each call.

    No look for circles, which end in a `RecursionError` as well.
    """
    plain = json.JSONEncoder(ensure_ascii=ensure_ascii, check_circular=False, **options)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # another Python than CPython
        return plain.encode
    quote = json.encoder.encode_basestring_ascii if ensure_ascii else json.encoder.encode_basestring
    item, key = plain.item_separator, plain.key_separator
    encode = make(None, plain.default, quote, None, key, item, plain.sort_keys, False, plain.allow_nan)
    return lambda data: "".join(encode(data, 0))


# Sorting costs little and raises TypeError where a dict has keys of several types, which
# is the only way in which two of them can become one in JSON ({1: ..., "1": ...}).
_dumps = _encoder(allow_nan=False, sort_keys=True, separators=(",", ":"))
_dumps_unsorted = _encoder(allow_nan=False, separators=(",", ":"))
# For what came out of JSON text a moment ago, in which nothing can be wrong.
_dumps_again = _encoder(separators=(",", ":"))
# As `json.dumps` does by default, but no NaN.
_dumps_wire = _encoder(ensure_ascii=True, allow_nan=False)
_STEPS = bytes(1 if byte in b"{[" else 0 for byte in range(256))
_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_SCALARS = (str, int, float, bool, type(None))


class Codec:
    """Turns data into the text of a JSON object and back.

    `dumps` and `loads` replace the standard ones, for types that JSON does not have. `dumps` must
    give standard JSON; `loads` gets what the database kept, in which the order of keys, the white
    space and the way a number is written may differ.
    """

    def __init__(self, loads: Loads | None = None, dumps: Dumps | None = None) -> None:
        self._loads: Loads = loads or _loads
        self._dumps: Dumps = dumps or _dumps
        self._is_default = dumps is None

    def encode(self, data: Mapping[str, Any], key: str) -> str:
        """Return the text of `data`.

        Raises `DataNotDictLikeError` (aiogram's) for what is no dict, `InvalidDataType` and
        `InvalidData` for what cannot be kept exactly. Anything else that a custom `dumps` raises
        comes through.
        """
        if not isinstance(data, dict):
            raise DataNotDictLikeError(f"data of {key!r} must be a dict, not {type(data).__name__}")
        if not data:
            return EMPTY
        try:
            text = _dumps(data) if self._is_default else self._dumps_custom(data, key)
        except RecursionError as error:
            raise InvalidData("", f"is nested deeper than {MAX_DEPTH} levels", key) from error
        except (TypeError, ValueError) as error:
            if not self._is_default:
                raise
            text = self._encode_mixed(data, key, error)
        self._check(text, key)
        return text

    def decode(self, text: str, key: str) -> dict[str, Any]:
        """Return the data in `text`. Raises `CorruptData` if it is no JSON object."""
        if text == EMPTY:
            return {}
        try:
            data = self._loads(text)
        except RecursionError as error:
            raise CorruptData(key, "nested too deep") from error
        except (ValueError, TypeError) as error:
            raise CorruptData(key, str(error)) from error
        if not isinstance(data, dict):
            raise CorruptData(key, f"a {type(data).__name__} where an object belongs")
        return data

    def fold(self, key: str, base: str, over: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        """Lay the objects `over` on `base`, key by key; return the text and what is in it.

        A key that stands twice in `base`, which no text of ours has, may go on to. Raises `CorruptData` if
        `base` is no object, `InvalidData` if the result is too long.
        """
        data = self.decode(base, key)
        if _is_deep(base):  # some Pythons read it; no database takes it back
            raise CorruptData(key, f"nested deeper than {MAX_DEPTH} levels")
        is_plain = self._is_default and self._loads is _loads
        text: str | None = (base if data else EMPTY) if is_plain else None
        for added in over:
            new = self._loads(added)
            if text is not None:
                text = _joined(text, data, added, new)
            data.update(new)
        if text is None:
            text = _dumps_again(data) if self._is_default else _as_text(self._dumps(data))
        if len(text) > MAX_LENGTH:
            raise too_long(len(text), key)
        return text, data

    def _dumps_custom(self, data: dict[str, Any], key: str) -> str:
        for path, reason, _ in _flaws(data, only_keys=True):
            raise InvalidData(path, reason, key)
        text = _as_text(self._dumps(data))
        try:
            decoded = _loads(text)
        except ValueError as error:
            raise InvalidData("", f"became something else than JSON: {error}", key) from error
        if not isinstance(decoded, dict):
            raise InvalidData("", f"became a JSON {type(decoded).__name__}, not an object", key)
        return text

    def _encode_mixed(self, data: dict[str, Any], key: str, error: Exception) -> str:
        for path, reason, is_type in _flaws(data):
            raise (InvalidDataType if is_type else InvalidData)(path, reason, key) from error
        try:
            return _dumps_unsorted(data)  # keys of several types, but no two of them alike
        except (TypeError, ValueError) as error:
            raise (InvalidDataType if isinstance(error, TypeError) else InvalidData)(
                "", str(error), key
            ) from error

    def _check(self, text: str, key: str) -> None:
        if len(text) > MAX_LENGTH:
            raise too_long(len(text), key)
        if _is_deep(text):
            raise InvalidData("", f"is nested deeper than {MAX_DEPTH} levels", key)
        # Both show up as escapes, or as text that UTF-8 cannot carry; only then look closer.
        if "\\u0000" in text or "\\ud" in text or "\\uD" in text or (not text.isascii() and text_flaw(text)):
            for path, reason, _ in _flaws(json.loads(text)):
                raise InvalidData(path, reason, key)


class WireCodec(Codec):
    """Writes what aiogram's `RedisStorage` writes, byte for byte; refuses what `Codec` refuses."""

    def __init__(self, loads: Loads | None = None, dumps: Dumps | None = None) -> None:
        is_default = loads is None or loads is json.loads
        super().__init__(_loads_wire if is_default else loads, None if dumps is json.dumps else dumps)

    def encode(self, data: Mapping[str, Any], key: str, *, trusted: bool = False) -> str:
        """Return the text of `data`. `trusted`: it came out of JSON. Raises what `Codec.encode` raises."""
        if not self._is_default or not isinstance(data, dict):
            return super().encode(data, key)
        try:
            text = _dumps_wire(data)
        except (TypeError, ValueError, RecursionError):
            super().encode(data, key)  # says where
            raise
        # A second encoding is a cheap way to look closer, but no free one.
        is_plain = trusted or _is_flat(data)
        if not is_plain or len(text) > MAX_LENGTH or "\\u0000" in text or "\\ud" in text or _is_deep(text):
            super().encode(data, key)
        return text

    def decode_bytes(self, found: bytes | None, key: str) -> dict[str, Any]:
        """Return the data in what Redis has. Raises `CorruptData`."""
        if found is None:
            return {}
        try:
            text = found.decode()
        except UnicodeDecodeError as error:
            raise CorruptData(key, str(error)) from error
        return self.decode(text, key)

    def detached(self, data: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return `data` as JSON gives it back, sharing nothing that can change. Raises what `encode` raises."""
        if self._is_default and isinstance(data, dict) and _is_flat(data):
            has_flaw = any(map(_scalar_flaw, data.values())) or any(map(text_flaw, data))
            if not has_flaw:
                return dict(data)
        return self.decode(self.encode(data, key), key)


def too_long(length: int, key: str) -> InvalidData:
    """Return the error for data whose text has so many characters."""
    return InvalidData("", f"takes {length} characters of JSON, over the limit of {MAX_LENGTH}", key)


def _is_flat(data: Mapping[str, Any]) -> bool:
    """Say whether JSON gives `data` back as it is, with nothing nested in it that could change."""
    return all(type(name) is str and type(value) in _SCALARS for name, value in data.items())


def _joined(base: str, data: dict[str, Any], added: str, new: dict[str, Any]) -> str | None:
    """Return the text of two objects in one, without encoding them anew; None if they have a key in common."""
    if not data or not new:
        return added if new else base
    if base[-1] != "}" or not data.keys().isdisjoint(new):
        return None
    return f"{base[:-1]},{added[1:]}"


def _as_text(dumped: str | bytes) -> str:
    """Return what `dumps` made as text; orjson and its like make bytes."""
    return dumped.decode() if isinstance(dumped, bytes) else dumped


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _loader(decoder: json.JSONDecoder) -> Loads:
    """Return what decodes text; without space around it, in two thirds of the time of `json.loads`."""

    def loads(text: str) -> Any:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:  # or with space in front of it
            return decoder.decode(text)
        return value if end == len(text) else decoder.decode(text)

    return loads


_loads = _loader(json.JSONDecoder(parse_constant=_refuse_constant))
_loads_wire = _loader(json.JSONDecoder())  # aiogram writes NaN, and reads it


def is_json(text: str) -> bool:
    """Say whether `text` is JSON that every database and Python can read."""
    try:
        _loads(text)
    except (ValueError, RecursionError):
        return False
    return not _is_deep(text)


def outside_strings(text: str) -> list[str]:
    """Cut JSON `text` at its quotation marks: the strings are at the odd places."""
    return text.replace("\\\\", "\\_").replace('\\"', "\\_").split('"')


def _is_deep(text: str) -> bool:
    return (
        len(text) > MAX_DEPTH and text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH
    )


def _depth(text: str) -> int:
    """Return the levels of nesting in JSON `text`, without recursion and fast, because it may be large."""
    skeleton = "".join(outside_strings(text)[::2]).encode()
    steps = skeleton.translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(1 if step else -1 for step in steps), default=0)


def _flaws(root: Any, *, only_keys: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yield what in `root` JSON cannot keep: path, reason, and whether the type is at fault."""
    stack: list[tuple[str, Any, int]] = [("", root, 1)]
    while stack:
        path, value, level = stack.pop()
        if level > MAX_DEPTH:
            yield "", f"is nested deeper than {MAX_DEPTH} levels, or contains itself", False
            return
        if isinstance(value, dict):
            yield from _key_flaws(path, value)
            children = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            children = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        else:
            flaw = None if only_keys else _scalar_flaw(value)
            if flaw:
                yield (path, *flaw)
            continue
        stack.extend((child, item, level + 1) for child, item in reversed(children))


def _key_flaws(path: str, value: dict[Any, Any]) -> Iterator[tuple[str, str, bool]]:
    seen: dict[str, Any] = {}
    for key in value:
        if not isinstance(key, str | int | float | bool | None):
            yield path, f"has a key of type {type(key).__name__}", True
            continue
        if isinstance(key, float) and not math.isfinite(key):
            yield path, f"has the key {key}, which JSON does not have", False
            continue
        text = key if isinstance(key, str) else _dumps(key)
        if text in seen:
            yield path, f"has the keys {seen[text]!r} and {key!r}, which are one in JSON", False
        seen[text] = key
        flaw = text_flaw(text)
        if flaw:
            yield path, f"has a key that {flaw}", False


def _scalar_flaw(value: Any) -> tuple[str, bool] | None:
    if not isinstance(value, _SCALARS):
        return f"is a {type(value).__name__}, which JSON does not have", True
    if isinstance(value, str):
        flaw = text_flaw(value)
        return (flaw, False) if flaw else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, which JSON does not have", False
    if isinstance(value, int):
        try:
            int.__repr__(value)
        except ValueError as error:
            return str(error), False
    return None
