"""LoKr: Kronecker products (LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from peft.config import choice
from peft.hosts import Host
from peft.method import Site
from peft.methods._lycoris import Lycoris, LycorisConfig
from peft.methods._sizes import divisors
from peft.operators import Dense, Kronecker, LowRank, Operator
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr (arXiv 2309.14859): W + (alpha / r) C ⊗ D, sides split as `factorization` says, C the smaller factor.

    C (l, p) is trained whole, or as a product of rank r with `decompose_both`; D (k, q) as a product of rank r, or
    whole where r is half its longer side or more. With `use_effective_conv2d`, kernels are decomposed too.

    Example:
        >>> from peft import LoKrConfig
        >>> LoKrConfig(r=8, alpha=16, decompose_factor=8, target_modules=["to_q"]).decompose_factor
        8
    """

    decompose_both: bool = field(default=False, metadata={"help": "Decompose the left factor too, if r is small."})
    decompose_factor: int = field(default=-1, metadata={"help": "Size of the left factor; -1: as square as it can be."})
    rank_dropout_scale: bool = field(default=False, metadata={"help": "Scale up the rows that rank_dropout leaves."})
    init_weights: bool | Literal["lycoris"] = field(
        default=True,
        metadata={"help": "True: the left factor zero; 'lycoris': the right one; False: neither, so not the identity."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "init_weights", (True, False, "lycoris"))


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as a product of two numbers: `factor` first if it divides it; else the most square, none above it.

    >>> factorization(128), factorization(128, 4), factorization(360, 7), factorization(127)
    ((8, 16), (4, 32), (6, 60), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    small = max(n for n in divisors(dimension) if n <= max(limit, 1))
    return small, dimension // small


def _right(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.k, sizes.q, *sizes.kernel)


def _right_up(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.r, sizes.k) if sizes.core else (sizes.k, sizes.r)


def _right_down(sizes: Sizes) -> tuple[int, ...]:
    return sizes.r, sizes.q * (1 if sizes.core else math.prod(sizes.kernel))


def _core(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.r, sizes.r, *sizes.core)


class LoKr(Lycoris, peft_type="LOKR", config=LoKrConfig):
    slots = (
        Slot("lokr_w1", "l p", when="left_whole"),
        Slot("lokr_w1_a", "l r", when="left_thin"),
        Slot("lokr_w1_b", "r p", when="left_thin"),
        Slot("lokr_w2", _right, when="right_whole"),
        Slot("lokr_w2_a", _right_up, when="right_thin"),
        Slot("lokr_w2_b", _right_down, when="right_thin"),
        Slot("lokr_t2", _core, when="core"),
    )
    samples = ({"r": 1}, {"r": 8}, {"r": 1, "decompose_both": True, "use_effective_conv2d": True})

    def resolve(self, config: LoKrConfig, host: Host, site: Site) -> dict[str, Any]:
        found = self.common(config, host, site)
        (left, k), r = factorization(host.out_features, config.decompose_factor), found["r"]
        p, q = factorization(host.in_features // math.prod(host.kernel), config.decompose_factor)
        left_thin = config.decompose_both and r < max(left, p) / 2
        right_thin = r < max(k, q) / 2
        found |= {"l": left, "k": k, "p": p, "q": q, "core": found["core"] if right_thin else ()}
        whole = {"left_whole": not left_thin, "right_whole": not right_thin}
        return {**found, **whole, "left_thin": left_thin, "right_thin": right_thin}

    def reset(self, p: Parts, host: Host) -> None:
        for slot in self.slots:
            if p.has(slot.name):
                nn.init.kaiming_uniform_(getattr(p, slot.name), a=math.sqrt(5))
        init = p.config.init_weights
        if init == "lycoris":
            nn.init.zeros_(p.lokr_w2 if p.has("lokr_w2") else p.lokr_w2_b)
        elif init:
            nn.init.zeros_(p.lokr_w1 if p.has("lokr_w1") else p.lokr_w1_a)

    def update(self, p: Parts, host: Host) -> Update:
        left = p.lokr_w1 if p.has("lokr_w1") else p.lokr_w1_a @ p.lokr_w1_b
        if p.has("lokr_w2") and p.lokr_w2.dim() == 3:
            # Adapter files mean torch.kron here, which aligns the last dimensions: (l, p) with (q, taps), not with (k,
            # q).
            product = torch.kron(left, p.lokr_w2) * p.scaling
            return Add(self.dropped(p, Dense(product.reshape(host.out_features, -1))))
        return Add(self.dropped(p, Kronecker(left, self.right(p), p.scaling)))

    def right(self, p: Parts) -> Operator:
        """D (k, q · taps)."""
        if p.has("lokr_w2"):
            whole = p.lokr_w2
            return Dense(whole if whole.dim() == 2 else whole.flatten(1))
        if not p.has("lokr_t2"):
            return LowRank(p.lokr_w2_b, p.lokr_w2_a)
        down = torch.einsum("ijt,jq->iqt", p.lokr_t2.flatten(2), p.lokr_w2_b).flatten(1)
        return LowRank(down, p.lokr_w2_a.mT)
