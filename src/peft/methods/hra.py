"""HRA: Householder reflections of the input (arXiv 2405.17484)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import PeftWarning, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._turning import turn, width
from peft.operators import Householder
from peft.operators.base import widened
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Update


@dataclass
class HRAConfig(TargetedConfig):
    """HRA (arXiv 2405.17484): W H₁ … H_r with reflections Hᵢ = I - 2 uᵢ uᵢᵀ / |uᵢ|² and U (in, r) trained.

    Columns of U start in equal pairs, whose reflections cancel; an odd r does not start at the base model. `apply_GS`
    makes the columns orthogonal first, so the product is I - 2 P with P the projection on their span: it never is the
    identity. On embeddings the vectors are reflected.

    Example:
        >>> from peft import HRAConfig
        >>> HRAConfig(r=8, target_modules=["q_proj", "v_proj"]).r
        8
    """

    r: int = field(default=8, metadata={"help": "Number of reflections; even, to start at the base model."})
    apply_GS: bool = field(default=False, metadata={"help": "Make the columns of U orthogonal."})
    init_weights: bool = field(default=True, metadata={"help": "Columns in equal pairs; False: all random."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'hra_only'."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "hra_only"))
        if self.init_weights and self.r % 2 and not self.apply_GS:
            message = f"r = {self.r} is odd, so HRA does not start at the base model: reflections cancel in pairs."
            warnings.warn(message, PeftWarning, stacklevel=3)


class HRA(WeightMethod, peft_type="HRA", config=HRAConfig):
    slots = (Slot("hra_u", "width hra_r"),)
    settings = ("hra_r", "hra_apply_GS")
    samples = ({"r": 2}, {"r": 4, "apply_GS": True}, {"r": 3, "init_weights": False})

    def identity_at_start(self, config: HRAConfig) -> bool:
        return config.init_weights and config.r % 2 == 0 and not config.apply_GS

    def resolve(self, config: HRAConfig, host: Host, site: Site) -> dict[str, Any]:
        if config.apply_GS and config.r > width(host):
            raise TargetError(
                f"apply_GS with r = {config.r} on {site.key!r}: {width(host)} dimensions have no more orthogonal "
                f"vectors than that. Take r = {width(host)} or less."
            )
        return {"hra_r": config.r, "hra_apply_GS": config.apply_GS, "width": width(host)}

    def reset(self, p: Parts, host: Host) -> None:
        u = p.hra_u
        if self.identity_at_start(p.config):
            half = torch.empty_like(u[:, ::2])
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
            u.copy_(half.repeat_interleave(2, dim=1))
        else:
            # Equal columns have no orthogonal basis, so with apply_GS all of them are drawn.
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))

    def update(self, p: Parts, host: Host) -> Update:
        u = p.hra_u
        if p.hra_apply_GS:
            u = torch.linalg.qr(widened(u)).Q.to(u.dtype)
        return turn(Householder(u), host)
