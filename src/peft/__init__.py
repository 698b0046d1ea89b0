"""Parameter-efficient fine-tuning: an independent implementation of the PEFT API.

Nothing is imported until it is asked for: `import peft` takes milliseconds and loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peft.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    names = import_module("peft._names")
    if name == "__all__":
        return names.names()
    if name.startswith("__"):
        raise AttributeError(name)
    value = names.find(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("peft._names").names()})
