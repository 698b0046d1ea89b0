"""What LoHa and LoKr share: the options of LyCORIS (arXiv 2309.14859), and dropout on the update itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from peft import patterns
from peft.config import TargetedConfig, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Diagonal, Operator, Product
from peft.parts import Parts


@dataclass
class LycorisConfig(TargetedConfig):
    """Base of LoHa's and LoKr's configs."""

    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: rank}; first match wins."}
    )
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "{name or regex: alpha}."})
    r: int = field(default=8, metadata={"help": "Rank."})
    alpha: int = field(default=8, metadata={"help": "The update is scaled by alpha / r."})
    rank_dropout: float = field(default=0.0, metadata={"help": "Rate at which rows of the update drop in training."})
    module_dropout: float = field(default=0.0, metadata={"help": "Rate at which the whole update drops in training."})
    use_effective_conv2d: bool = field(
        default=False,
        metadata={"help": "Decompose kernels of convolutions larger than 1 as well (FedPara, proposition 3)."},
    )

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        positive(self, "r")
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it is a probability, from 0 to 1.")


class Lycoris(WeightMethod):
    """Base of LoHa and LoKr."""

    settings = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def common(self, config: LycorisConfig, host: Host, site: Site) -> dict[str, Any]:
        """Settings of both; `core` is the kernel of the core tensor, () where kernels are not decomposed."""
        r = patterns.lookup(config.rank_pattern, site.key, config.r)
        alpha = patterns.lookup(config.alpha_pattern, site.key, config.alpha)
        core = host.kernel if config.use_effective_conv2d and math.prod(host.kernel) > 1 else ()
        return {
            "r": r,
            "alpha": alpha,
            "scaling": alpha / r,
            "rank_dropout": config.rank_dropout,
            "rank_dropout_scale": getattr(config, "rank_dropout_scale", True),
            "module_dropout": config.module_dropout,
            "kernel": host.kernel,
            "core": (*core, 1) if len(core) == 1 else core,  # files hold one-dimensional kernels as (k, 1)
        }

    def initial_scaling(self, p: Parts) -> float:
        return p.alpha / p.r

    def dropped(self, p: Parts, op: Operator) -> Operator:
        """`op`; in training without the rows that drop."""
        if not p.training or not (p.rank_dropout or p.module_dropout):
            return op
        like = op.like()
        keep = (torch.rand(op.shape[0], device=like.device) >= p.rank_dropout).to(like.dtype)
        if p.rank_dropout_scale:
            keep = keep / keep.mean().clamp_min(1 / keep.numel())
        whole = torch.rand((), device=like.device) >= p.module_dropout
        return Product(Diagonal(keep * whole), op)
