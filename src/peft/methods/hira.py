"""HiRA: a low-rank Hadamard factor on the weight (ICLR 2025, openreview TwJrTz9cRS)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from peft import patterns
from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Modulated
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class HiraConfig(TargetedConfig):
    """HiRA (ICLR 2025): W ∘ (1 + B A) with A (r, in) and B (out, r). The update W ∘ (B A) has full rank in general.

    Example:
        >>> from peft import HiraConfig
        >>> HiraConfig(r=32, target_modules=["q_proj", "v_proj"]).r
        32
    """

    r: int = field(default=32, metadata={"help": "Rank of the factor."})
    hira_dropout: float = field(default=0.0, metadata={"help": "Dropout on the update's input, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    init_weights: bool | Literal["gaussian"] | None = field(
        default=True,
        metadata={"help": "True: A uniform, B zero; 'gaussian': A normal, B zero; False or None: both normal."},
    )
    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: rank}; first match wins."}
    )

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        super().__post_init__()
        positive(self, "r")
        choice(self, "init_weights", (True, False, None, "gaussian"))
        if not 0 <= self.hira_dropout <= 1:
            raise ConfigError(f"hira_dropout is {self.hira_dropout!r}; it is a probability, from 0 to 1.")


def _down(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.r, sizes["in"] // math.prod(sizes.kernel), *sizes.kernel)


def _up(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.out, sizes.r, *(1 for _ in sizes.kernel))


class Hira(WeightMethod, peft_type="HIRA", config=HiraConfig):
    slots = (Slot("hira_A", _down, factor=True), Slot("hira_B", _up, factor=True))
    settings = ("r",)
    dropout = "hira_dropout"
    samples = ({"r": 2}, {"r": 3, "init_weights": False})

    def identity_at_start(self, config: HiraConfig) -> bool:
        return bool(config.init_weights)

    def resolve(self, config: HiraConfig, host: Host, site: Site) -> dict[str, Any]:
        return {"r": patterns.lookup(config.rank_pattern, site.key, config.r), "kernel": host.kernel}

    def reset(self, p: Parts, host: Host) -> None:
        init, down, up = p.config.init_weights, p.hira_A, p.hira_B
        if not init:
            nn.init.normal_(down)
            nn.init.normal_(up)
        elif host.one_hot:
            nn.init.zeros_(down)
            nn.init.normal_(up)
        else:
            nn.init.normal_(down, std=1 / p.r) if init == "gaussian" else nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(up)

    def update(self, p: Parts, host: Host) -> Update:
        op = Modulated(p.hira_B.flatten(1), p.hira_A.flatten(1), p.call(host).weight)
        return Add(op, dropout=p.dropout)
