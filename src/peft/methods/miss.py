"""MiSS: matrix shard sharing (arXiv 2409.15371), in its plain, mini and "bat" forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._sizes import must_divide
from peft.operators import Fold
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Rewrite, Update


@dataclass
class MissConfig(TargetedConfig):
    """MiSS (arXiv 2409.15371): ΔW[o, i] = D[i mod r, o]: all chunks of r inputs share one trained shard D (r, out).

    `init_weights="mini"` repeats a narrower D (r, mini_r) over the outputs. `"bat"` has a block D (out / r, r, r) for
    each r rows, and W in blocks: W + W D + D; r must divide both sides then.

    Example:
        >>> from peft import MissConfig
        >>> MissConfig(r=64, target_modules=["q_proj", "v_proj"]).r
        64
    """

    r: int = field(default=64, metadata={"help": "Rank: rows of the shard."})
    miss_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input, while training."})
    mini_r: int = field(default=1, metadata={"help": "For 'mini': columns of the shard; divides the outputs."})
    init_weights: bool | Literal["bat", "mini"] = field(
        default=True,
        metadata={"help": "True: shard zero; False: random; 'bat', 'mini': zero, and another form of the method."},
    )
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'miss_only'."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "mini_r")
        choice(self, "bias", ("none", "all", "miss_only", "MiSS_only"))
        choice(self, "init_weights", (True, False, "bat", "mini"))
        if not 0 <= self.miss_dropout <= 1:
            raise ConfigError(f"miss_dropout is {self.miss_dropout!r}; it is a probability, from 0 to 1.")


def _shape(sizes: Sizes) -> tuple[int, ...]:
    r = sizes.miss_r
    if sizes.miss_form == "bat":
        return sizes.out // r, r, r
    return r, sizes.miss_mini_r if sizes.miss_form == "mini" else sizes.out


class Miss(WeightMethod, peft_type="MISS", config=MissConfig):
    slots = (Slot("miss_block", _shape),)
    linear = True
    settings = ("miss_r", "miss_mini_r", "miss_form")
    dropout = "miss_dropout"
    samples = ({"r": 3}, {"r": 2, "mini_r": 2, "init_weights": "mini"}, {"r": 2, "init_weights": "bat"})

    def resolve(self, config: MissConfig, host: Host, site: Site) -> dict[str, Any]:
        if config.init_weights == "bat":
            must_divide("r", config.r, site.key, host.out_features, host.in_features)
        if config.init_weights == "mini":
            must_divide("mini_r", config.mini_r, site.key, host.out_features)
        return {"miss_r": config.r, "miss_mini_r": config.mini_r, "miss_form": config.init_weights}

    def reset(self, p: Parts, host: Host) -> None:
        if p.config.init_weights:
            nn.init.zeros_(p.miss_block)
        else:
            nn.init.kaiming_uniform_(p.miss_block, a=math.sqrt(5))

    def update(self, p: Parts, host: Host) -> Update:
        block: Tensor = p.miss_block
        if p.miss_form == "bat":
            return Rewrite(lambda weight: bat(weight, block), dropout=p.dropout)
        return Add(Fold(block, host.out_features, host.in_features), dropout=p.dropout)


def bat(weight: Tensor, block: Tensor) -> Tensor:
    """ΔW of the "bat" form: W_ac D_a + D_a for block (a, c) of W (out, in), all (r, r), with D (out / r, r, r)."""
    r = block.shape[-1]
    grid = weight.to(block.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)
    return (grid @ block[:, None] + block[:, None]).transpose(1, 2).flatten(2).flatten(0, 1)
