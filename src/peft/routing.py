"""Which adapters run, per call: a context, so threads and async tasks don't see each other's choice."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

BASE = "__base__"
"""The name, in `adapter_names`, of rows that run without adapter."""


@dataclass(frozen=True)
class Route:
    """Adapters for this call: `names` for all samples, or `rows`, one name per sample of the batch."""

    names: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None


NONE = Route()
"""The route on which the base model runs alone."""

_route: ContextVar[Route | None] = ContextVar("peft_route", default=None)
_open = 0  # routes in effect in any thread; while there is none, torch.compile need not look into a context variable
_lock = threading.Lock()


def current() -> Route | None:
    """The route of this call; None means that each layer's own active adapters run."""
    return _route.get() if _open else None


@contextmanager
def route(value: Route | None) -> Iterator[None]:
    """Run the body with a route."""
    token = _route.set(value)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _route.reset(token)


def _count(change: int) -> None:
    global _open
    with _lock:
        _open += change


def use(names: str | Sequence[str] | None) -> Route:
    """The route that runs these adapters, in this order; None runs the base model."""
    if names is None:
        return NONE
    return Route((names,) if isinstance(names, str) else tuple(names))
