"""TinyLoRA: a handful of trained numbers for a whole model (arXiv 2602.04118)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot, group
from peft.updates import Add, Update


@dataclass
class TinyLoraConfig(TargetedConfig):
    """TinyLoRA (arXiv 2602.04118): W + B (Σᵢ vᵢ Pᵢ) A; only v (u,) is trained.

    A = √S Vᵀ and B = U √S come from the top r singular triplets of W (of its transpose for an embedding), P (u, r, r)
    is random. With `weight_tying` t, L
    layers share round(L (1 - t)) vectors v, at least one; 1 leaves u numbers for the whole model.

    Example:
        >>> from peft import TinyLoraConfig
        >>> TinyLoraConfig(u=16, weight_tying=1.0, target_modules=["q_proj"]).r
        2
    """

    r: int = field(default=2, metadata={"help": "Rank; less where a target has a smaller side."})
    u: int = field(default=64, metadata={"help": "Length of v."})
    weight_tying: float = field(default=0.0, metadata={"help": "0: each layer has its v. 1: one for all."})
    projection_seed: int = field(default=42, metadata={"help": "Seed of P; layer i takes projection_seed + i."})
    save_projection: bool = field(default=True, metadata={"help": "Save P; False: drawn again from the seed."})
    init_v_bound: float = field(default=0.02, metadata={"help": "With init_weights='uniform', v starts in ± this."})
    tinylora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'tinylora_only'."})
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True: v zero, so training starts at the base model. 'uniform' or False: random."},
    )

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "u")
        choice(self, "bias", ("none", "all", "tinylora_only"))
        choice(self, "init_weights", (True, False, "uniform"))
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"TinyLoraConfig.weight_tying is {self.weight_tying}; it is a share, from 0 to 1.")


class TinyLora(WeightMethod, peft_type="TINYLORA", config=TinyLoraConfig):
    slots = (
        Slot("tinylora_A", "r columns", kind="buffer"),
        Slot("tinylora_B", "rows r", kind="buffer"),
        Slot("tinylora_P", "u r r", kind="buffer", saved="save_projection"),
    )
    settings = ("r", "tinylora_group")
    dropout = "tinylora_dropout"
    samples = ({"u": 4}, {"u": 4, "weight_tying": 1.0, "save_projection": False, "init_weights": "uniform"})

    def shared(self, config: TinyLoraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Any]:
        vectors = group({str(i): (config.u,) for i in range(_groups(config, len(targets)))}, device, dtype)
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        for vector in vectors.values():
            nn.init.uniform_(vector, -bound, bound)
        return {"tinylora_v": vectors}

    def saved_banks(self, config: TinyLoraConfig) -> tuple[str, ...]:
        return ("tinylora_v",)

    def identity_at_start(self, config: TinyLoraConfig) -> bool:
        return config.init_weights is True

    def resolve(self, config: TinyLoraConfig, host: Host, site: Site) -> dict[str, Any]:
        groups = _groups(config, site.count)
        place = min(site.index // (site.count // groups), groups - 1)
        sides = (host.in_features, host.out_features) if host.one_hot else (host.out_features, host.in_features)
        sizes = {"r": min(config.r, *sides), "rows": sides[0], "columns": sides[1]}
        return {**sizes, "u": config.u, "tinylora_group": str(place)}

    def derive(self, p: Parts, host: Host) -> None:
        generator = torch.Generator().manual_seed(p.config.projection_seed + (p.site.index if p.site else 0))
        p.tinylora_P.copy_(torch.randn(p.tinylora_P.shape, generator=generator) / math.sqrt(p.r))

    def reset(self, p: Parts, host: Host) -> None:
        weight = p.call(host).weight.mT if host.one_hot else p.call(host).weight
        u, s, vt = torch.linalg.svd(weight if weight.dtype == torch.float64 else weight.float(), full_matrices=False)
        root = s[: p.r].sqrt()
        p.tinylora_A.copy_(root[:, None] * vt[: p.r])
        p.tinylora_B.copy_(u[:, : p.r] * root)

    def update(self, p: Parts, host: Host) -> Update:
        projections = p.tinylora_P
        middle = (p.tinylora_v[p.tinylora_group] @ projections.flatten(1)).view(projections.shape[1:])
        op = LowRank(p.tinylora_A, p.tinylora_B @ middle)
        return Add(op.T if host.one_hot else op, dropout=p.dropout)


def _groups(config: TinyLoraConfig, layers: int) -> int:
    """How many vectors v `layers` layers share."""
    return max(1, round(layers * (1 - config.weight_tying)))
