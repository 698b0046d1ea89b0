"""Which adapters run, per call: a context, so threads and async tasks don't see each other's choice.

Gradient checkpointing runs a part of the forward pass again during backward: after the context was left, and on GPUs in
a thread of its own. `kept` binds the route of now to such a part. `PeftModel` does so for models of transformers; with
`torch.utils.checkpoint` give `context_fn=peft.routing.context_fn`. A layer that is run again on another route than
before says so (`StateError`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version

BASE = "__base__"
"""The name, in `adapter_names`, of rows that run without adapter."""


@dataclass(frozen=True)
class Route:
    """Adapters for this call: `names` for all samples, or `rows`, one name per sample of the batch."""

    names: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    _index: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    _groups: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def index(self, size: int, device: torch.device) -> torch.Tensor:
        """For each of `size` samples, the place of its adapter among the distinct `rows`; made once per call."""
        found = self._index.get((size, device))
        if found is None:
            rows = self.rows or ()
            place = {name: i for i, name in enumerate(dict.fromkeys(rows))}
            each = [place[name] for name in rows for _ in range(size // len(rows))]
            found = self._index[size, device] = torch.tensor(each, device=device)
        return found

    def groups(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples of each of the distinct `rows`, (names, longest), padded with any; and the place of each sample
        among them (size,). Made once per call."""
        found = self._groups.get((size, device))
        if found is None:
            each = self.index(size, torch.device("cpu")).tolist()
            groups: list[list[int]] = [[] for _ in dict.fromkeys(self.rows or ())]
            places = []
            for sample, group in enumerate(each):
                places.append((group, len(groups[group])))
                groups[group].append(sample)
            longest = max(map(len, groups))
            order = torch.tensor([(group + [0] * longest)[:longest] for group in groups], device=device)
            back = torch.tensor([group * longest + place for group, place in places], device=device)
            found = self._groups[size, device] = order, back
        return found


NONE = Route()
"""The route on which the base model runs alone."""

_route: ContextVar[Route | None] = ContextVar("peft_route", default=None)
_kept: ContextVar[bool] = ContextVar("peft_route_kept", default=False)
used = False  # whether there ever was a route
_thread = threading.local()  # `route`: that of this thread; `tasks`: routes opened in this thread by tasks of asyncio
_GUARDED = Version(torch.__version__).release >= (2, 13)  # torch.compile guards on attributes of threading.local


def current() -> Route | None:
    """The route of this call; None means that each layer's own active adapters run.

    `torch.compile` can't look into a context variable. It sees the thread's route instead, which is the same unless
    tasks of asyncio take turns in the thread: then it breaks the graph here.
    """
    if not used:
        return None
    if torch.compiler.is_compiling() and _GUARDED and not getattr(_thread, "tasks", 0):
        return getattr(_thread, "route", None)
    return _route.get()


@contextmanager
def route(value: Route | None) -> Iterator[None]:
    """Run the body with a route."""
    global used
    used = True
    task = asyncio._get_running_loop() is not None
    token, before = _route.set(value), getattr(_thread, "route", None)
    # Both are set in every thread that has routes: torch.compile would tell threads with and without them apart.
    _thread.tasks = getattr(_thread, "tasks", 0) + task
    _thread.route = before if task else value
    try:
        yield
    finally:
        _route.reset(token)
        _thread.tasks -= task
        if not task:
            _thread.route = before


def use(names: str | Sequence[str] | None) -> Route:
    """The route that runs these adapters, in this order; None runs the base model."""
    if names is None:
        return NONE
    return Route((names,) if isinstance(names, str) else tuple(names))


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, on the route of now wherever and whenever it is called."""
    value = current()

    def run(*args: Any, **kwargs: Any) -> Any:
        with _again(value):
            return function(*args, **kwargs)

    return run


@contextmanager
def _again(value: Route | None) -> Iterator[None]:
    token = _kept.set(True)
    try:
        with route(value):
            yield
    finally:
        _kept.reset(token)


def context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=context_fn)`: keep the route."""
    return nullcontext(), _again(current())


def recomputing() -> bool:
    """Whether this is a forward pass inside a backward pass, and not bound to a route."""
    return torch._C._current_graph_task_id() != -1 and not _kept.get()  # type: ignore[attr-defined]


def keep_routes(model: torch.nn.Module) -> None:
    """Bind the parts that transformers' gradient checkpointing runs again to the route of their forward pass."""
    for module in model.modules():
        inner = module.__dict__.get("_gradient_checkpointing_func")
        if inner is not None and not isinstance(inner, _Keeping):
            module._gradient_checkpointing_func = _Keeping(inner)  # type: ignore[assignment]


class _Keeping:
    """A checkpointing function that keeps routes."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.inner(function if torch.compiler.is_compiling() else kept(function), *args, **kwargs)
