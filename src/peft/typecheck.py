"""Whether plain data fits the annotations of a dataclass: configs from files are data, and may be anything."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

from peft.errors import ConfigError

LARGEST = 2**53
"""Whole numbers beyond this are no sizes, and JSON readers disagree about them."""


def fitted(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of a dataclass, after checking that they are of the annotated types.

    As JSON needs it: a list will do for a set or tuple, a dict for a dataclass, a string for an enum, a whole float for
    an int, and null for a field that is not set.

    Args:
        cls: The dataclass.
        values: By field name; other names are passed on.

    Raises:
        ConfigError: says which field, what it holds, and what it should.
    """
    hints = _hints(cls)
    result = {}
    for name, value in values.items():
        if name not in hints:
            result[name] = value
        elif value is None and not _accepts_none(hints[name]):
            continue
        else:
            result[name] = _fit(value, hints[name], f"{cls.__name__}.{name}", name.endswith("alpha"))
    return result


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _accepts_none(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _fit(value: Any, hint: Any, where: str, any_number: bool = False) -> Any:
    for choice in sorted(_choices(hint), key=lambda choice: choice is not type(value)):  # 1.0 stays a float beside int
        if choice in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
            raise ConfigError(f"{where} is {str(value)[:30]}…, which is beyond all sizes.")
        done, fitting = _try(value, choice, where, any_number)
        if done:
            return fitting
    raise ConfigError(f"{where} is {_shown(value)}; it must be {_named(hint)}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _try(value: Any, hint: Any, where: str, any_number: bool) -> tuple[bool, Any]:
    """Whether a value fits one alternative of an annotation, and what it is then."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or value is None:
        return hint is Any or hint is type(None), value
    if origin is typing.Literal:
        return isinstance(value, (str, bool, int)), value  # which ones are allowed, the config says itself
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return _items(value, inner, where)
    if origin is dict or hint is dict:
        return _table(value, inner, where)
    if hint is int and isinstance(value, float) and math.isfinite(value):
        return (True, int(value)) if value.is_integer() else (any_number, value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return not isinstance(value, float) or math.isfinite(value), value
    if hint is int and isinstance(value, bool):
        return False, value
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, hint)), value  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (str, hint)), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _items(value: Any, inner: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        return False, value
    kinds = inner if Ellipsis not in inner else inner[:1]
    if len(kinds) > 1 and len(kinds) != len(value):
        return False, value
    fits = [_quietly(item, kinds[i if len(kinds) > 1 else 0], where) for i, item in enumerate(value)] if kinds else []
    if not all(ok for ok, _ in fits):
        return False, value
    return True, type(value)(item for _, item in fits) if kinds else value


def _table(value: Any, inner: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    if not inner:
        return True, value
    fits = [(key, *_quietly(item, inner[1], where)) for key, item in value.items()]
    return all(ok for _, ok, _ in fits), {key: item for key, _, item in fits}


def _quietly(value: Any, hint: Any, where: str) -> tuple[bool, Any]:
    try:
        return True, _fit(value, hint, where, any_number=True)
    except ConfigError:
        return False, value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}… ({type(value).__name__})"


def _named(hint: Any) -> str:
    names = [_one(choice) for choice in _choices(hint)]
    return " or ".join(dict.fromkeys(names))


def _one(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
