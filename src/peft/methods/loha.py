"""LoHa: the entrywise product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft.hosts import Host
from peft.method import Site
from peft.methods._lycoris import Lycoris, LycorisConfig
from peft.operators import HadamardLowRank
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa (arXiv 2108.06098): W + (alpha / r) (A₁ B₁) ∘ (A₂ B₂) with Aᵢ (out, r) and Bᵢ (r, in), of rank up to r².

    With `use_effective_conv2d`, the kernel of a convolution larger than 1 gets a core tensor (r, r, kernel) between the
    factors, which become (r, out) and (r, channels).

    Example:
        >>> from peft import LoHaConfig
        >>> LoHaConfig(r=8, alpha=16, target_modules=["to_q", "to_v"]).alpha
        16
    """

    init_weights: bool = field(default=True, metadata={"help": "B₂ zero, so training starts at the base model."})


def _up(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.r, sizes.out) if sizes.core else (sizes.out, sizes.r)


def _down(sizes: Sizes) -> tuple[int, ...]:
    return sizes.r, sizes["in"] // math.prod(sizes.core)


def _core(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.r, sizes.r, *sizes.core)


class LoHa(Lycoris, peft_type="LOHA", config=LoHaConfig):
    prefix = "hada_"
    slots = (
        Slot("hada_w1_a", _up),
        Slot("hada_w1_b", _down),
        Slot("hada_w2_a", _up),
        Slot("hada_w2_b", _down),
        Slot("hada_t1", _core, when="core"),
        Slot("hada_t2", _core, when="core"),
    )
    samples = ({"r": 2}, {"r": 2, "use_effective_conv2d": True, "init_weights": False})

    def resolve(self, config: LoHaConfig, host: Host, site: Site) -> dict[str, Any]:
        return self.common(config, host, site)

    def reset(self, p: Parts, host: Host) -> None:
        for slot in self.slots:
            if p.has(slot.name):
                nn.init.kaiming_uniform_(getattr(p, slot.name), a=math.sqrt(5))
        if p.config.init_weights:
            nn.init.zeros_(p.hada_w2_b)

    def update(self, p: Parts, host: Host) -> Update:
        core1, core2 = (p.hada_t1, p.hada_t2) if p.has("hada_t1") else (None, None)
        first = factors(p.hada_w1_a, p.hada_w1_b, core1)
        second = factors(p.hada_w2_a, p.hada_w2_b, core2)
        return Add(self.dropped(p, HadamardLowRank(*first, *second, p.scaling)))


def factors(up: Tensor, down: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors (out, r) and (r, in) of a matrix; the core (r, r, kernel) of a decomposed kernel goes into the second."""
    if core is None:
        return up, down
    return up.mT, torch.einsum("ijk,jc->ick", core.flatten(2), down).flatten(1)
