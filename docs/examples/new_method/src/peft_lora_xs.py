"""LoRA-XS (arXiv 2405.17604): only an r × r matrix between frozen singular vectors of the weight learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft.config import TargetedConfig, positive
from peft.errors import TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Bilinear
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class LoraXsConfig(TargetedConfig):
    """LoRA-XS (arXiv 2405.17604): W + s U Σ R Vᵀ with the first r singular triplets of W, and s = alpha / r.

    R (r, r) is trained; files hold nothing else, because U Σ and Vᵀ follow from the base weights.

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
        Slot("loraxs_A", "r in", kind="buffer", saved=False),
        Slot("loraxs_B", "out r", kind="buffer", saved=False),
        Slot("loraxs_R", "r r"),
    )
    settings = ("scaling",)
    samples = ({"r": 2}, {"r": 3, "alpha": 3})

    def resolve(self, config: LoraXsConfig, host: Host, site: Site) -> dict[str, Any]:
        most = min(host.out_features, host.in_features)
        if config.r > most:
            raise TargetError(f"LORAXS: r = {config.r} is more than the smaller side of {site.key!r}; at most {most}.")
        return {"r": config.r, "scaling": config.alpha / config.r}

    def derive(self, p: Parts, host: Host) -> None:
        weight = host.weight()
        u, s, vt = torch.linalg.svd(weight if weight.dtype == torch.float64 else weight.float(), full_matrices=False)
        # Singular vectors come with either sign, and R has to mean the same wherever the file is loaded.
        sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
        r = p.loraxs_R.shape[0]
        p.loraxs_A.copy_((vt * sign)[:r])
        p.loraxs_B.copy_((u * sign.T * s)[:, :r])

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.zeros_(p.loraxs_R)

    def update(self, p: Parts, host: Host) -> Update:
        return Add(Bilinear(p.loraxs_A, p.loraxs_R, p.loraxs_B, p.scaling))
