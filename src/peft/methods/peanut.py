"""PEANuT: a small network that reads the weight writes its change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}
"""Names as transformers has them."""


@dataclass
class PeanutConfig(TargetedConfig):
    """PEANuT (arXiv 2410.01870): W + s (f(Wᵀ))ᵀ with a network f over the rows of Wᵀ, from `out` to r to `out`.

    Its first layer is A (r, out), its last B (out, r); between them `depth` encoders and as many decoders (r, r), each
    decoder with a skip from the encoder that mirrors it.

    Example:
        >>> from peft import PeanutConfig
        >>> PeanutConfig(r=8, depth=1, act_fn="gelu").scaling
        1.0
    """

    r: int = field(default=32, metadata={"help": "Width of the network."})
    depth: int = field(default=0, metadata={"help": "Number of encoders, and of decoders."})
    act_fn: str = field(default="relu", metadata={"help": f"Activation: {', '.join(ACTIVATIONS)}."})
    scaling: float = field(default=1.0, metadata={"help": "Factor on the change."})
    init_weights: bool = field(default=True, metadata={"help": "B starts at zero; False: at random."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "act_fn", tuple(ACTIVATIONS))
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ConfigError(f"PeanutConfig.depth is {self.depth!r}; it must be a whole number, 0 or more.")


def _layers(sizes: Any) -> list[tuple[int, int]]:
    return [(sizes.r, sizes.r)] * sizes.depth


class Peanut(WeightMethod, peft_type="PEANUT", config=PeanutConfig):
    slots = (
        Slot("peanut_A", "r out", kind="leaf"),
        Slot("peanut_B", "out r", kind="leaf"),
        Slot("peanut_encoders", _layers, kind="leaves"),
        Slot("peanut_decoders", _layers, kind="leaves"),
    )
    settings = ("r", "scaling")
    samples = ({"r": 4}, {"r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.5}, {"r": 4, "init_weights": False})

    def resolve(self, config: PeanutConfig, host: Host, site: Site) -> dict[str, Any]:
        return {"r": config.r, "scaling": config.scaling, "depth": config.depth}

    def reset(self, p: Parts, host: Host) -> None:
        for tensor in (p.peanut_A, p.peanut_B, *p.peanut_encoders, *p.peanut_decoders):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        if p.config.init_weights:
            nn.init.zeros_(p.peanut_B)

    def update(self, p: Parts, host: Host) -> Update:
        activation = ACTIVATIONS[p.config.act_fn]
        hidden = activation(F.linear(host.weight().mT.to(p.peanut_A.dtype), p.peanut_A))
        skipped = []
        for encoder in p.peanut_encoders:
            skipped.append(hidden)
            hidden = activation(F.linear(hidden, encoder))
        for decoder in p.peanut_decoders:
            hidden = activation(F.linear(hidden, decoder)) + skipped.pop()
        return Add(LowRank(hidden.mT, p.peanut_B, p.scaling))
