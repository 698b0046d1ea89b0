"""DeLoRA: normalised low-rank updates with a learnt strength (arXiv 2503.18225)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from peft import patterns
from peft.config import TargetedConfig, choice, positive
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update

_SMALLEST = 1e-4  # norms below this count as this


@dataclass
class DeloraConfig(TargetedConfig):
    """DeLoRA (arXiv 2503.18225): W + (λ / r) Σᵢ bᵢ aᵢ / (|bᵢ| |aᵢ|) diag(w), wⱼ the norm of column j of W.

    Each rank-one term has norm one whatever its factors do, so λ alone bounds how far the weight can move.

    Example:
        >>> from peft import DeloraConfig
        >>> DeloraConfig(r=16, delora_lambda=10, target_modules=["q_proj"]).r
        16
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    delora_lambda: int = field(default=15, metadata={"help": "Initial λ, the strength of the update; it is trained."})
    module_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    bias: Literal["none", "all", "delora_only"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="none", metadata={"help": "Base biases to train."}
    )
    init_weights: bool = field(default=True, metadata={"help": "B zero, so training starts at the base model."})
    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: rank}; first match wins."}
    )
    lambda_pattern: dict | None = field(default_factory=dict, metadata={"help": "{name or regex: λ}."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "delora_only"))
        for key in self.lambda_pattern or ():
            patterns.check(key, where="DeloraConfig.lambda_pattern")


class Delora(WeightMethod, peft_type="DELORA", config=DeloraConfig):
    slots = (
        Slot("delora_A", "r in"),
        Slot("delora_B", "out r"),
        Slot("delora_lambda", "1"),
        Slot("delora_w_norm", "in", kind="buffer"),
    )
    settings = ("r",)
    dropout = "module_dropout"
    samples = ({"r": 2}, {"r": 3, "init_weights": False, "delora_lambda": 3})

    def resolve(self, config: DeloraConfig, host: Host, site: Site) -> dict[str, Any]:
        return {
            "r": patterns.lookup(config.rank_pattern, site.key, config.r),
        }

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.kaiming_uniform_(p.delora_A, a=math.sqrt(5))
        if p.config.init_weights:
            nn.init.zeros_(p.delora_B)
        else:
            nn.init.kaiming_uniform_(p.delora_B, a=math.sqrt(5))
        key = p.site.key if p.site else ""
        p.delora_lambda.fill_(patterns.lookup(p.config.lambda_pattern, key, p.config.delora_lambda))
        p.delora_w_norm.copy_(p.call(host).weight.to(p.delora_w_norm.dtype).norm(dim=0))

    def update(self, p: Parts, host: Host) -> Update:
        down, up = p.delora_A, p.delora_B
        lengths = down.norm(dim=1).clamp_min(_SMALLEST) * up.norm(dim=0).clamp_min(_SMALLEST)
        gain = p.delora_lambda / (p.r * lengths)
        return Add(LowRank(down * p.delora_w_norm, up * gain), dropout=p.dropout)
