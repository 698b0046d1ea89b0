"""Which methods there are. A method is a file; its name is its `PeftType` in lower case; importing it registers it.

Rooms are searched by file name, so listing a method costs no import, and a new one needs no edit anywhere. Packages of
other people register through the entry point group `peft.methods`, whose names are the types of their methods.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib import metadata
from typing import Any

from peft.errors import ConfigError, nearest

ROOMS = ("peft.methods", "peft.insertions", "peft.prompts")

_CONFIGS: dict[str, type] = {}
_METHODS: dict[str, Any] = {}


def register(peft_type: str, config: type, method: Any) -> None:
    """Make a method known. Called by the base classes of methods when a subclass is defined.

    Args:
        peft_type: Its name in files, upper case.
        config: The config class; its `peft_type` becomes this one.
        method: The method itself: a `WeightMethod`, an insertion or a prompt encoder.

    Raises:
        ConfigError: another class has that name. The same one may come again, as cells of notebooks do.
    """
    known = _CONFIGS.get(peft_type)
    if known is not None and _path(known) != _path(config):
        raise ConfigError(
            f"{_path(config)} can't be the method {peft_type!r}: {_path(known)} is already. Choose another peft_type."
        )
    config._peft_type = peft_type  # type: ignore[attr-defined]
    _CONFIGS[peft_type] = config
    _METHODS[peft_type] = method


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def config_class(peft_type: str) -> type:
    """The config class of a method."""
    _load(peft_type)
    return _CONFIGS[peft_type.upper()]


def method(peft_type: str) -> Any:
    """The method of that type."""
    found = _METHODS.get(peft_type)
    if found is None:
        _load(peft_type)
        found = _METHODS[peft_type.upper()]
    return found


def names() -> list[str]:
    """All types of method that can be used here, installed third-party ones included, in alphabetical order."""
    return sorted(set(_files()) | set(_third_party()) | set(_METHODS))


def all_methods() -> dict[str, Any]:
    """Every method, loaded, by type."""
    return {name: method(name) for name in names()}


def is_third_party(peft_type: str) -> bool:
    """Whether another package brings this method."""
    return peft_type in _third_party() or (peft_type in _METHODS and peft_type not in _files())


def module_of(peft_type: str) -> str | None:
    """Dotted name of the module that holds a method."""
    return _files().get(peft_type.upper())


def _load(peft_type: str) -> None:
    name = peft_type.upper()
    if name in _METHODS:
        return
    if name in _files():
        importlib.import_module(_files()[name])
    elif name in _third_party():
        _third_party()[name].load()
    if name not in _METHODS:
        module = _files().get(name) or (_third_party()[name].module if name in _third_party() else None)
        inside = [kind for kind, config in _CONFIGS.items() if config.__module__ == module]
        if inside:
            raise ConfigError(
                f"{module} defines the method {' and '.join(inside)}, not {name}. Files and entry points are named as "
                f"the type of their method, in lower case: {inside[0].lower()}."
            )
        raise ConfigError(f"There is no method {peft_type!r}.{nearest(name, names())} Methods: {', '.join(names())}.")


@cache
def _files() -> dict[str, str]:
    found = {}
    for room in ROOMS:
        try:
            paths = importlib.import_module(room).__path__
        except ModuleNotFoundError as missing:
            if missing.name != room:
                raise
            continue
        for info in pkgutil.iter_modules(paths):
            if not info.name.startswith("_"):
                found[info.name.upper()] = f"{room}.{info.name}"
    return found


@cache
def _third_party() -> dict[str, metadata.EntryPoint]:
    return {point.name.upper(): point for point in metadata.entry_points(group="peft.methods")}
