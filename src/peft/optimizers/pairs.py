"""The factors of LoRA in a model, in pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft import whole
from peft.errors import ConfigError


@dataclass
class Pair:
    """The factors of one adapter on one layer; the update of the weight is `scaling * up @ down`."""

    down: Tensor
    """A, or its view as a matrix (r, in)."""
    up: Tensor
    """B (out, r)."""
    scaling: float

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), also where they are kernels of convolutions."""
        return self.down.flatten(1), self.up.flatten(1)


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The factors of all active LoRA adapters.

    Raises:
        ConfigError: there are none.
    """
    found = False
    for layer in whole.layers(model):
        for name in layer.active_adapters:
            if name not in layer.available_adapters:
                continue
            held = {slot.name: value for slot, value in layer.slots(name)}
            if "lora_A" not in held or "lora_B" not in held:
                continue
            found = True
            down, up = _tensor(held["lora_A"]), _tensor(held["lora_B"])
            yield Pair(down, up, float(layer.parts(name).scaling))
    if not found:
        raise ConfigError("The model has no active LoRA adapter, whose factors this optimizer needs.")


def _tensor(held: Any) -> Tensor:
    return getattr(held, "weight", held)
