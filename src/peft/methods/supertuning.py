"""Super-Tuning and Supra: train the largest weights, alone or beside a low-rank update (arXiv 2607.09287)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, positive
from peft.errors import ConfigError, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank, Sparse, Sum
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Base, Update


@dataclass
class SupertuningConfig(TargetedConfig):
    """Super-Tuning (arXiv 2607.09287): W + S, S trained where |W| is largest; with `r`, W + S + s B A (Supra).

    A fraction `sparsity` of W stays frozen. s is lora_alpha / r, and lora_alpha 2 r if not given.

    Example:
        >>> from peft import SupertuningConfig
        >>> SupertuningConfig(sparsity=0.99, r=8, target_modules=["q_proj"]).r
        8
    """

    sparsity: float = field(default=0.99, metadata={"help": "Fraction of each weight that stays frozen, below 1."})
    select_top: bool = field(default=True, metadata={"help": "Train the largest entries; False: the smallest."})
    r: int | None = field(default=None, metadata={"help": "Rank of the low-rank part (Supra); None: no such part."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Its scaling numerator; None: 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the low-rank part's input, in training."})
    init_weights: bool = field(default=True, metadata={"help": "S and B zero: training starts at the base model."})
    save_precomputed_indices: bool = field(
        default=True, metadata={"help": "Files hold the places of S; False: they are found in the base weight again."}
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity is {self.sparsity!r}; it is a fraction, from 0 to below 1.")
        if self.r is not None:
            positive(self, "r")
        if not 0 <= self.lora_dropout <= 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}; it is a probability, from 0 to 1.")


@dataclass(frozen=True, eq=False)
class _Supra(Add):
    """W + entries + thin; `dropout` acts on what the thin part sees."""

    entries: Sparse | None = None
    thin: LowRank | None = None

    def delta(self, x: Tensor, base: Base) -> Tensor:
        assert self.entries is not None
        assert self.thin is not None
        seen = x if self.dropout is None else self.dropout(x)
        return base.lift(self.entries, x) + base.lift(self.thin, seen)


class Supertuning(WeightMethod, peft_type="SUPERTUNING", config=SupertuningConfig):
    slots = (
        Slot("supertuning_values", "count"),
        Slot(
            "supertuning_indices",
            "count",
            kind="buffer",
            trains=False,
            saved="save_precomputed_indices",
            dtype=torch.int32,
        ),
        Slot("supertuning_lora_A", "rank in", kind="down", when="supertuning_rank"),
        Slot("supertuning_lora_B", "out rank", kind="up", when="supertuning_rank"),
    )
    settings = ("supertuning_rank", "supertuning_lora_alpha")
    dropout = "lora_dropout"
    samples = ({"sparsity": 0.8}, {"sparsity": 0.7, "r": 2, "select_top": False, "init_weights": False})

    def resolve(self, config: SupertuningConfig, host: Host, site: Site) -> dict[str, Any]:
        total = host.out_features * host.in_features
        count = int(total * (1 - config.sparsity))
        if count < 1:
            raise TargetError(
                f"sparsity = {config.sparsity} leaves nothing of the {total} entries of {site.key!r} to train. It may "
                f"be at most {1 - 1 / total:.6g} there."
            )
        alpha = config.lora_alpha if config.lora_alpha is not None else 2 * (config.r or 0)
        return {
            "count": count,
            "rank": config.r or 0,
            "supertuning_rank": config.r,
            "supertuning_lora_alpha": float(alpha) if config.r else None,
        }

    def derive(self, p: Parts, host: Host) -> None:
        size = host.weight().detach().abs().flatten()
        p.supertuning_indices.copy_(size.topk(p.supertuning_indices.shape[0], largest=p.config.select_top).indices)

    def reset(self, p: Parts, host: Host) -> None:
        starts_at_base = p.config.init_weights
        nn.init.zeros_(p.supertuning_values) if starts_at_base else nn.init.normal_(p.supertuning_values)
        if p.supertuning_rank:
            nn.init.kaiming_uniform_(p.supertuning_lora_A, a=math.sqrt(5))
            up = p.supertuning_lora_B
            nn.init.zeros_(up) if starts_at_base else nn.init.kaiming_uniform_(up, a=math.sqrt(5))

    def update(self, p: Parts, host: Host) -> Update:
        entries = Sparse(p.supertuning_indices, p.supertuning_values, host.out_features, host.in_features)
        if not p.supertuning_rank:
            return Add(entries)
        scale = p.supertuning_lora_alpha / p.supertuning_rank
        thin = LowRank(p.supertuning_lora_A, p.supertuning_lora_B, scale)
        return _Supra(Sum((entries, thin)), dropout=p.dropout, entries=entries, thin=thin)
