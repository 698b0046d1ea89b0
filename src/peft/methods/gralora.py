"""GraLoRA: low-rank adapters of a grid of blocks (arXiv 2505.20355)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank, LowRankGrid, Operator, Sum
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class GraloraConfig(TargetedConfig):
    """GraLoRA (arXiv 2505.20355): W is cut into k × k blocks, each with an adapter of rank r / k.

    As many parameters and operations as LoRA of rank r, with a delta of rank up to k r. `hybrid_r` adds a plain LoRA
    over the whole matrix. Both are scaled by alpha / (r + hybrid_r). k must divide r and both sides of every target.

    Example:
        >>> from peft import GraloraConfig
        >>> GraloraConfig(r=32, gralora_k=4, target_modules=["q_proj"]).alpha
        64
    """

    r: int = field(default=32, metadata={"help": "Rank of all blocks in a row together."})
    hybrid_r: int = field(default=0, metadata={"help": "Rank of the plain LoRA beside the blocks; 0: none."})
    alpha: int = field(default=64, metadata={"help": "The update is scaled by alpha / (r + hybrid_r)."})
    gralora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input, while training."})
    gralora_k: int = field(default=2, metadata={"help": "Blocks along each side."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'gralora_only'."})
    init_weights: bool = field(default=True, metadata={"help": "B zero, so training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "gralora_k")
        choice(self, "bias", ("none", "all", "gralora_only"))
        if self.hybrid_r < 0:
            raise ConfigError(f"GraloraConfig.hybrid_r is {self.hybrid_r}; it must be 0 or more.")
        if self.r % self.gralora_k:
            raise ConfigError(f"GraloraConfig.r = {self.r} must be divisible by gralora_k = {self.gralora_k}.")


class Gralora(WeightMethod, peft_type="GRALORA", config=GraloraConfig):
    slots = (
        Slot("gralora_A", "k in/k r"),
        Slot("gralora_B", "k r out/k"),
        Slot("gralora_A_general", "hybrid_r in", kind="down", when="hybrid_r"),
        Slot("gralora_B_general", "out hybrid_r", kind="up", when="hybrid_r"),
    )
    settings = ("r", "hybrid_r", "scaling")
    dropout = "gralora_dropout"
    samples = ({"r": 4}, {"r": 2, "hybrid_r": 3, "gralora_k": 1}, {"r": 2, "init_weights": False})

    def resolve(self, config: GraloraConfig, host: Host, site: Site) -> dict[str, Any]:
        scaling = config.alpha / (config.r + config.hybrid_r)
        return {"r": config.r, "k": config.gralora_k, "hybrid_r": config.hybrid_r, "scaling": scaling}

    def reset(self, p: Parts, host: Host) -> None:
        pairs = [(p.gralora_A.mT, p.gralora_B.mT)]
        if p.hybrid_r:
            pairs.append((p.gralora_A_general, p.gralora_B_general))
        for down, up in pairs:
            for matrix, zero in ((down, False), (up, p.config.init_weights)):
                bound = 0.0 if zero else 1 / math.sqrt(matrix.shape[-1])
                nn.init.uniform_(matrix, -bound, bound)

    def update(self, p: Parts, host: Host) -> Update:
        op: Operator = LowRankGrid(p.gralora_A, p.gralora_B, p.scaling)
        if p.hybrid_r:
            op = Sum((op, LowRank(p.gralora_A_general, p.gralora_B_general, p.scaling)))
        return Add(op, dropout=p.dropout)
