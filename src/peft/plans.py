"""Stacks of updates, read off a layer once for as long as nothing is replaced that they were read from.

At one token or on small layers a call costs more than its arithmetic. Most adapters are their parameters and a few
settings (LoRA: A, B, the scaling), so their updates stay the same objects from call to call. A plan keeps them with all
that was read to make them; a look at each of those by identity tells whether it still stands. In-place changes (a step
of training) change the tensors of the plan as well. Whatever a method computes is computed anew in each call.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from peft import autograd
from peft.hosts import Host
from peft.operators import Operator
from peft.parts import Read
from peft.updates import Add, After, Before, Magnitude, Shift, Update

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

    def stands(self) -> bool:
        """Whether what was read is still what is there."""
        for home, name, value in self.reads:  # noqa: SIM110  (a loop: this runs in each call of each layer)
            if home.get(name, ...) is not value:
                return False
        return True


def plan_of(layer: AdaptedLayer, names: tuple[str, ...], host: Host) -> Plan:
    """The plan of these adapters on a layer, a kept one if it stands."""
    plans: dict[tuple[str, ...], Plan | None] = layer._caches.setdefault("plans", {})
    kept = plans.get(names, ...)
    if kept is None or layer.merged_adapters or layer._waiting:
        return Plan(layer._updates(names, layer.frozen, True), [])
    if kept is not ... and kept.stands():
        return kept
    reads: list[Read] = []
    made = Plan(layer._updates(names, host, True, reads), reads)
    plans[names] = made if _only_read(made) else None
    return made


def _only_read(made: Plan) -> bool:
    """Whether a plan holds nothing that was computed, so that it stands as long as what was read does."""
    read = {id(value) for _, _, value in made.reads}
    return made.stands() and all(
        type(u) in (Add, After, Before, Magnitude, Shift) and _read(u, read) for u in made.updates
    )


def _read(value: Any, read: set[int], default: Any = ...) -> bool:
    """Whether a value was read, or follows from shapes alone."""
    if isinstance(value, (Operator, Update)):
        return all(_read(getattr(value, field.name), read, field.default) for field in fields(value))  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        return all(_read(item, read) for item in value)
    return id(value) in read or value is default or type(value) in (bool, int)
