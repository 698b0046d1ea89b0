"""Stacks of updates, read off a layer once for as long as nothing is replaced that they were read from.

At one token or on small layers a call costs more than its arithmetic. Most adapters are their parameters and a few
settings (LoRA: A, B, the scaling), so their updates stay the same objects from call to call. A plan keeps them with all
that was read to make them; a look at each of those by identity tells whether it still stands. In-place changes (a step
of training) change the tensors of the plan as well. Whatever a method computes is computed anew in each call.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft import autograd
from peft.hosts import Host
from peft.operators import Operator
from peft.parts import Read
from peft.updates import Update

if TYPE_CHECKING:
    from peft.layer import AdaptedLayer


@dataclass(eq=False)
class Plan:
    """The updates of a stack of adapters.

    Args:
        updates: Them.
        reads: What they were read from.
    """

    updates: list[Update]
    reads: list[Read]
    _form: Any = ...

    @property
    def form(self) -> autograd.Form | None:
        """How a linear layer runs them."""
        if self._form is ...:
            self._form = autograd.form(self.updates)
        return self._form

    def stands(self, own: dict[str, Any]) -> bool:
        """Whether what was read is still what is there, given the layer's own dict."""
        for home, name, value in self.reads:  # noqa: SIM110  (a loop: this runs in each call of each layer)
            if (own if home is None else home).get(name, ...) is not value:
                return False
        return True


def plan_of(layer: AdaptedLayer, names: tuple[str, ...], host: Host) -> Plan:
    """The plan of these adapters on a layer, a kept one if it stands."""
    if layer.merged_adapters or layer._waiting:
        return Plan(layer._updates(names, layer.frozen, True), [])
    plans: Any = layer._caches.get("plans")
    if plans is None:
        plans = layer._caches["plans"] = {}, {}
    recorded = torch.is_grad_enabled()
    mine: dict[tuple[str, ...], Plan | None] = plans[recorded]
    kept = mine.get(names, ...)
    if kept is None:
        return Plan(layer._updates(names, host, True), [])
    if kept is not ... and kept.stands(layer.__dict__):
        return kept
    reads: list[Read] = []
    made = Plan(layer._updates(names, host, True, reads), reads)
    mine[names] = made if _only_read(made, layer, recorded) else None
    return made


def _only_read(made: Plan, layer: AdaptedLayer, recorded: bool) -> bool:
    """Whether a plan holds nothing that was computed, so that it stands as long as what was read does."""
    read = {id(value) for _, _, value in made.reads}
    return made.stands(layer.__dict__) and all(_read(u, read, recorded) for u in made.updates)


def _read(value: Any, read: set[int], recorded: bool, default: Any = ...) -> bool:
    """Whether a value was read or is a view of what was, or follows from shapes alone.

    With gradients views of parameters don't do: each has a part in the graph of the step it was made in.
    """
    if isinstance(value, (Operator, Update)):
        known = {f.name: f.default for f in fields(value)} if is_dataclass(value) else {}
        if not vars(value).keys() <= known.keys():  # it remembers something else
            return False
        return bool(known) and all(_read(getattr(value, name), read, recorded, known[name]) for name in known)
    if isinstance(value, (list, tuple)):
        return all(_read(item, read, recorded) for item in value)
    if isinstance(value, torch.Tensor) and value._base is not None and id(value._base) in read:
        return not recorded or not isinstance(value._base, nn.Parameter)
    return id(value) in read or value is default or type(value) in (bool, int)
