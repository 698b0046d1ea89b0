"""LoRA-XS (arXiv 2405.17604): only an r × r matrix between frozen singular vectors of the weight learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft.config import TargetedConfig, positive
from peft.hosts import Host
from peft.layer import Parts
from peft.method import Site, WeightMethod
from peft.operators import Bilinear
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class LoraXsConfig(TargetedConfig):
    """W + s U Σ R Vᵀ with the first r singular triplets of W; R (r, r) is trained, s = alpha / r.

    Example:
        >>> from peft_lora_xs import LoraXsConfig
        >>> LoraXsConfig(r=4, target_modules=["q_proj"]).alpha
        16
    """

    r: int = field(default=8, metadata={"help": "Rank, at most the smaller side of the layer."})
    alpha: int = field(default=16, metadata={"help": "The update is scaled by alpha / r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "alpha")


class LoraXs(WeightMethod, peft_type="LORAXS", config=LoraXsConfig):
    slots = (
        Slot("loraxs_A", "r in", kind="buffer"),
        Slot("loraxs_B", "out r", kind="buffer"),
        Slot("loraxs_R", "r r"),
    )
    settings = ("scaling",)
    samples = ({"r": 2}, {"r": 3, "alpha": 3})

    def resolve(self, config: LoraXsConfig, host: Host, site: Site) -> dict[str, Any]:
        r = min(config.r, host.out_features, host.in_features)
        return {"r": r, "scaling": config.alpha / r}

    def reset(self, p: Parts, host: Host) -> None:
        weight = host.weight()
        u, s, vt = torch.linalg.svd(weight if weight.dtype == torch.float64 else weight.float(), full_matrices=False)
        r = p.loraxs_R.shape[0]
        p.loraxs_A.copy_(vt[:r])
        p.loraxs_B.copy_(u[:, :r] * s[:r])
        nn.init.zeros_(p.loraxs_R)

    def update(self, p: Parts, host: Host) -> Update:
        return Add(Bilinear(p.loraxs_A, p.loraxs_R, p.loraxs_B, p.scaling))
