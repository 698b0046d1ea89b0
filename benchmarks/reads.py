"""Which files are opened for reading. It imports nothing that torch has not, so that imports can be watched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class Reads(list[str]):
    """The paths, one for each time that one was opened."""

    def counts(self) -> dict[str, int]:
        """`files`: how many there are; `opens`: how often they were opened."""
        return {"files": len(set(self)), "opens": len(self)}


_listening: list[Reads] = []


@contextmanager
def reads() -> Iterator[Reads]:
    """What is opened for reading within the block, by `open`, imports (extensions apart) and safetensors."""
    _listen()
    readers = [m for m in map(sys.modules.get, ("safetensors", "safetensors.torch")) if hasattr(m, "safe_open")]
    before: list[Any] = [m.safe_open for m in readers]  # type: ignore[union-attr]
    found = Reads()
    _listening.append(found)
    try:
        for module, real in zip(readers, before, strict=True):
            module.safe_open = _announced(real)  # type: ignore[union-attr]
        yield found
    finally:
        _listening.remove(found)
        for module, real in zip(readers, before, strict=True):
            module.safe_open = real  # type: ignore[union-attr]


def _announced(real: Callable[..., Any]) -> Callable[..., Any]:
    """A reader written in another language, that tells as Python's own does."""

    def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        sys.audit("open", filename, "rb", 0)
        return real(filename, *args, **kwargs)

    return safe_open


@cache  # a hook stays as long as the process
def _listen() -> None:
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _listening:
        path, mode, _ = args
        if isinstance(path, (str, os.PathLike)) and isinstance(mode, str) and mode.startswith("r"):
            for found in _listening:
                found.append(str(path))
