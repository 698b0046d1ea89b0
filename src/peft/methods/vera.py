"""VeRA: vectors between frozen random matrices that all layers share (arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import DiagonalLowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class VeraConfig(TargetedConfig):
    """VeRA (arXiv 2310.11454): W + diag(b) B diag(d) A; only b (out,) and d (r,) are trained.

    A (r, in) and B (out, r) are random, frozen, and cut from one pair that is as large as the largest target, so the
    adapter has out + r parameters per layer.

    Example:
        >>> from peft import VeraConfig
        >>> VeraConfig(r=64, target_modules=["q_proj", "v_proj"]).d_initial
        0.1
    """

    r: int = field(default=256, metadata={"help": "Rank; larger than LoRA's, since it costs one parameter each."})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random matrices."})
    save_projection: bool = field(
        default=True, metadata={"help": "Save A and B too; False: they are drawn again from the seed on loading."}
    )
    vera_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    d_initial: float = field(default=0.1, metadata={"help": "Initial value of d."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'vera_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model; False: at a random update."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "vera_only"))


class Vera(WeightMethod, peft_type="VERA", config=VeraConfig):
    prefix = "vera_lambda_"
    slots = (Slot("vera_lambda_b", "out"), Slot("vera_lambda_d", "r"))
    settings = ("r",)
    dropout = "vera_dropout"
    samples = ({"r": 4}, {"r": 3, "save_projection": False}, {"r": 4, "init_weights": False})

    def shared(self, config: VeraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Tensor]:
        down, up = projections(config, config.r, targets)
        return {"vera_A": down.to(device, dtype), "vera_B": up.to(device, dtype)}

    def saved_banks(self, config: VeraConfig) -> tuple[str, ...]:
        return ("vera_A", "vera_B") if config.save_projection else ()

    def resolve(self, config: VeraConfig, host: Host, site: Site) -> dict[str, Any]:
        return {"r": config.r}

    def reset(self, p: Parts, host: Host) -> None:
        start(p.vera_lambda_b, p.vera_lambda_d, p.config)

    def update(self, p: Parts, host: Host) -> Update:
        down, up = cut(p.vera_A, p.r, host.in_features), cut(p.vera_B, host.out_features, p.r)
        return Add(DiagonalLowRank(down, up, p.vera_lambda_d, p.vera_lambda_b), dropout=p.dropout)


def projections(config: Any, rows: int, targets: Mapping[str, Host]) -> tuple[Tensor, Tensor]:
    """A (rows, largest in) and B (largest out, r), Kaiming-uniform from `projection_prng_key`, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    down = torch.empty(rows, max(h.in_features for h in targets.values()))
    up = torch.empty(max(h.out_features for h in targets.values()), config.r)
    for matrix in (down, up):
        nn.init.kaiming_uniform_(matrix, generator=generator)
    return down, up


def cut(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The part of a shared matrix that a layer of this size uses: the matrix itself where it is all of it."""
    return matrix if matrix.shape == (rows, columns) else matrix[:rows, :columns]


def start(b: Tensor, d: Tensor, config: Any) -> None:
    """b zero and d constant, so that the update is zero; b one and d normal if `init_weights` is off."""
    if config.init_weights:
        nn.init.zeros_(b)
        nn.init.constant_(d, config.d_initial)
    else:
        nn.init.ones_(b)
        nn.init.normal_(d)
