"""C3A: block-circulant updates (arXiv 2407.19342)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from peft import patterns
from peft.config import TargetedConfig, choice, positive
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._sizes import must_divide
from peft.operators import BlockCirculant
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class C3AConfig(TargetedConfig):
    """C3A (arXiv 2407.19342): W + ΔW / in, where ΔW is a grid of circulant blocks (b, b), each told by one row.

    The kernels (out / b, in / b, b) hold out · in / b numbers; b must divide both sides of every target. ΔW has full
    rank in general and is applied by FFTs.

    Example:
        >>> from peft import C3AConfig
        >>> C3AConfig(block_size=64, target_modules=["q_proj", "v_proj"]).block_size
        64
    """

    block_size: int = field(default=256, metadata={"help": "Size of the blocks; divides both sides of every target."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'c3a_only'."})
    block_size_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: block size}; first match wins."}
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = field(
        default="xavier_uniform",
        metadata={"help": "True: zero, so training starts at the base model; False: as 'xavier_uniform'."},
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"} | {"exclude_modules"}

    def __post_init__(self) -> None:
        self.block_size_pattern = self.block_size_pattern or {}
        super().__post_init__()
        positive(self, "block_size")
        choice(self, "bias", ("none", "all", "c3a_only"))
        choice(self, "init_weights", (True, False, "gaussian", "kaiming_uniform", "xavier_uniform"))
        for key in self.block_size_pattern:
            patterns.check(key, where="C3AConfig.block_size_pattern")


class C3A(WeightMethod, peft_type="C3A", config=C3AConfig):
    slots = (Slot("c3a_kernel", "out/block_size in/block_size block_size"),)
    linear = True
    settings = ("block_size",)
    samples = ({"block_size": 4}, {"block_size": 2, "init_weights": True})

    def identity_at_start(self, config: C3AConfig) -> bool:
        return config.init_weights is True

    def resolve(self, config: C3AConfig, host: Host, site: Site) -> dict[str, Any]:
        size = patterns.lookup(config.block_size_pattern, site.key, config.block_size)
        must_divide("block_size", size, site.key, host.out_features, host.in_features)
        return {"block_size": size}

    def reset(self, p: Parts, host: Host) -> None:
        kernel, init = p.c3a_kernel, p.config.init_weights
        if init is True:
            nn.init.zeros_(kernel)
        elif init == "gaussian":
            nn.init.normal_(kernel)
        else:
            xavier = math.sqrt(6 / (host.in_features + host.out_features))
            bound = 1 / math.sqrt(host.in_features) if init == "kaiming_uniform" else xavier
            nn.init.uniform_(kernel, -bound, bound)

    def update(self, p: Parts, host: Host) -> Update:
        return Add(BlockCirculant(p.c3a_kernel))
