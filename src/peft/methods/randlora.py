"""RandLoRA: full-rank updates as sums of scaled random low-rank matrices (arXiv 2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Bilinear, Diagonal
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class RandLoraConfig(TargetedConfig):
    """RandLoRA (arXiv 2502.00987): W + (alpha / r) Σᵢ Bᵢ diag(λᵢ) A diag(γᵢ), a sum over min(in, out) / r random bases.

    A (r, smaller side) and the Bᵢ (larger side, r) are random, frozen and shared by all layers; λ (r, bases) and γ
    (bases, smaller side) are trained. The sum has full rank. `sparse` bases have entries -1, 0, 1 only (two thirds
    zero; `very_sparse`: all but 1 / sqrt(smaller side)).

    Example:
        >>> from peft import RandLoraConfig
        >>> RandLoraConfig(r=16, randlora_alpha=320, target_modules=["q_proj"]).save_projection
        True
    """

    r: int = field(default=32, metadata={"help": "Rank of one basis. A smaller one means more bases and parameters."})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random bases."})
    save_projection: bool = field(
        default=True, metadata={"help": "Save the bases too; False: they are drawn again from the seed on loading."}
    )
    sparse: bool = field(default=False, metadata={"help": "Ternary bases, two thirds zero."})
    very_sparse: bool = field(default=False, metadata={"help": "Ternary bases, nearly all zero; wins over sparse."})
    randlora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    randlora_alpha: int = field(default=640, metadata={"help": "The update is scaled by alpha / r; 20 r is usual."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'randlora_only'."})
    init_weights: bool = field(default=True, metadata={"help": "λ zero, so training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "randlora_only"))
        if self.randlora_alpha <= 0:
            raise ConfigError(f"RandLoraConfig.randlora_alpha is {self.randlora_alpha}; it must be above 0.")


class RandLora(WeightMethod, peft_type="RANDLORA", config=RandLoraConfig):
    slots = (Slot("randlora_lambda", "r bases"), Slot("randlora_gamma", "bases small"))
    settings = ("r", "scaling")
    dropout = "randlora_dropout"
    samples = (
        {"r": 4},
        {"r": 3, "save_projection": False, "sparse": True},
        {"r": 4, "very_sparse": True, "init_weights": False},
    )

    def shared(self, config: RandLoraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Tensor]:
        widest = max(h.in_features for h in targets.values()), max(h.out_features for h in targets.values())
        down, up = bases(config, min(widest), max(widest))
        if type(down) is Tensor and not (down.isfinite().all() and up.isfinite().all()):  # fake tensors have no values
            raise TargetError(
                f"RandLoRA: bases of {tuple(down.shape)} and {tuple(up.shape)} are too small to have a deviation. "
                "Raise r, take dense bases (sparse=False, very_sparse=False), or another projection_prng_key."
            )
        return {"randlora_A": down.to(device, dtype), "randlora_B": up.to(device, dtype)}

    def saved_banks(self, config: RandLoraConfig) -> tuple[str, ...]:
        return ("randlora_A", "randlora_B") if config.save_projection else ()

    def resolve(self, config: RandLoraConfig, host: Host, site: Site) -> dict[str, Any]:
        small = min(host.in_features, host.out_features)
        scaling = config.randlora_alpha / config.r
        return {"r": config.r, "small": small, "bases": math.ceil(small / config.r), "scaling": scaling}

    def reset(self, p: Parts, host: Host) -> None:
        (nn.init.zeros_ if p.config.init_weights else nn.init.normal_)(p.randlora_lambda)
        nn.init.constant_(p.randlora_gamma, 1 / max(p.randlora_gamma.shape))

    def update(self, p: Parts, host: Host) -> Update:
        gamma, count = p.randlora_gamma, p.randlora_gamma.shape[0]
        large = max(host.in_features, host.out_features)
        down = p.randlora_A[:, :, : gamma.shape[1]] * gamma
        # The bases are told apart by the second dimension of both; the reference pairs the two in different orders
        # (rank-major and basis-major), and files are made for that.
        down, up = down.flatten(0, 1), p.randlora_B[:large, :count].flatten(1)
        op = Bilinear(down, Diagonal(p.randlora_lambda.flatten()), up, p.scaling)
        return Add(op if host.in_features <= host.out_features else op.T, dropout=p.dropout)

    def to_file(self, p: Parts, name: str, tensor: Tensor, config: RandLoraConfig) -> dict[str, Tensor]:
        if name != "randlora_lambda" or not config.save_projection:
            return {name: tensor}
        return {name: tensor, "randlora_A": p.randlora_A.clone(), "randlora_B": p.randlora_B.clone()}

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: RandLoraConfig) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if name not in ("randlora_A", "randlora_B")}


def bases(config: RandLoraConfig, small: int, large: int) -> tuple[Tensor, Tensor]:
    """A (r, 1, small) and B (large, bases, r) with deviation one, from `projection_prng_key`, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    r, count = config.r, math.ceil(small / config.r)
    if config.sparse or config.very_sparse:
        edge = 1 / (2 * (math.sqrt(small) if config.very_sparse else 3))
        down, up = (torch.rand(shape, generator=generator) for shape in ((r, 1, small), (large, count, r)))
        down, up = ((m > 1 - edge).float() - (m < edge).float() for m in (down, up))
    else:
        # Drawn in 16 bits, as the reference draws on most machines, so that seeds mean the same.
        down, *rest = (
            nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)
            for shape in ((r, 1, small), *[(large, 1, r)] * count)
        )
        up = torch.cat(rest, 1)
    return down / down.std(), up / up.std()
