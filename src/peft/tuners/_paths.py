"""Modules `peft.tuners.<method>[.config|.layer|.model]` for every registered method, made when they are imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from peft import registry

_ROOT = "peft.tuners"
_PARTS = ("config", "layer", "model")
_ELSEWHERE = {"adamss.asa_callback": "peft.integrations.callbacks"}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what the files of this folder don't give."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not name.startswith(f"{_ROOT}."):
            return None
        method, _, part = name[len(_ROOT) + 1 :].partition(".")
        if f"{method}.{part}" in _ELSEWHERE:
            return importlib.machinery.ModuleSpec(name, self)
        if registry.module_of(method) is None or (part and part not in _PARTS):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=not part)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if other := _ELSEWHERE.get(module.__name__[len(_ROOT) + 1 :]):
            module.__getattr__ = lambda name: getattr(importlib.import_module(other), name)  # type: ignore[attr-defined]
            return
        kind = module.__name__[len(_ROOT) + 1 :].partition(".")[0].upper()
        home = importlib.import_module(str(registry.module_of(kind)))
        module.__doc__ = f"The path of HF PEFT for {home.__name__}."
        module.__getattr__ = lambda name: _lookup(kind, home, name)  # type: ignore[attr-defined]


def _lookup(kind: str, home: ModuleType, name: str) -> Any:
    if name in _PARTS or f"{kind.lower()}.{name}" in _ELSEWHERE:
        return importlib.import_module(f"{_ROOT}.{kind.lower()}.{name}")
    if not name.startswith("__"):
        from peft.layer import layer_class, marker
        from peft.method import WeightMethod
        from peft.tuner import tuner_class

        method = registry.method(kind)
        if isinstance(method, WeightMethod):
            made = {f"{method.class_name}Layer": marker, f"{method.class_name}Model": tuner_class}
            if name in made:
                return made[name](kind)
            if name in ("Linear", f"{method.class_name}Linear"):
                from peft.hosts.linear import LinearHost

                return layer_class((kind,), LinearHost)
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"{home.__name__} has no {name!r}")


def install() -> None:
    """Let these modules be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
