"""Methods whose change is linear in their tensors: the weighted sum of adapters is that of their tensors.

(IA)³ stands apart: it multiplies, and what is added are its multipliers, as in HF PEFT. With weights that sum to 1 this
is also the sum of the changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft import registry
from peft.combine.factored import wide
from peft.errors import ConfigError, UnsupportedError

_FREE = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "peft_version"}
    | {"init_weights"}
)


def check(configs: Mapping[str, Any]) -> None:
    """Refuse methods whose change isn't linear in their tensors, and adapters whose tensors mean different things."""
    kinds = {name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()}
    kind = next(iter(kinds.values()))
    if set(kinds.values()) != {kind}:
        raise ConfigError(
            f"Adapters of different methods ({kinds}) have no tensors to add; convert them to LoRA first."
        )
    method = registry.method(kind)
    bat = kind == "MISS" and any(c.init_weights == "bat" for c in configs.values())
    if not method.linear or bat:
        known = sorted(name for name, m in registry.all_methods().items() if getattr(m, "linear", False))
        raise UnsupportedError(
            f"{kind}{' with the bat update' if bat else ''} does not say that its change is linear in its tensors, so "
            "these have no weighted sum. Convert the adapters with `convert_to_lora` and combine those. Linear: "
            f"{', '.join([*known, 'LORA'])}."
        )
    (first, one), *others = configs.items()
    for name, other in others:
        for field in dataclasses.fields(one):
            values = getattr(one, field.name), getattr(other, field.name)
            if field.name not in _FREE | {method.dropout} and values[0] != values[1]:
                raise ConfigError(
                    f"{kind} adapters can only be added if their tensors mean the same: {first!r} has {field.name} "
                    f"{values[0]!r} and {name!r} has {values[1]!r}."
                )


def add(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ wᵢ tᵢ for every tensor, in float64; integer tensors (positions) have to agree and stay.

    >>> add([{"l": torch.tensor([1.0])}, {"l": torch.tensor([4.0])}], [0.5, -1.0])
    {'l': tensor([-3.5000])}
    """
    names = states[0].keys()
    for state in states:
        if state.keys() != names:
            odd = sorted(state.keys() ^ names)
            raise ConfigError(
                f"Adapters can only be added tensor by tensor if they have the same ones; {odd[0]!r} differs."
            )
    return {name: _add([state[name] for state in states], weights, name) for name in names}


def _add(tensors: list[Tensor], weights: Sequence[float], name: str) -> Tensor:
    first = tensors[0]
    if any(t.shape != first.shape for t in tensors):
        raise ConfigError(f"{name!r} has the shapes {[tuple(t.shape) for t in tensors]}, which can't be added.")
    if not first.is_floating_point() or name.endswith("indices"):
        if not all(torch.equal(t, first) for t in tensors):
            raise ConfigError(f"{name!r} differs: the adapters change different places and can't be added as they are.")
        return first.clone()
    total = torch.zeros_like(wide(first))
    for tensor, w in zip(tensors, weights, strict=True):
        total.add_(wide(tensor), alpha=w)
    return total.to(first.dtype)
