"""PVeRA: VeRA with a hidden vector that is drawn from a learnt distribution (arXiv 2512.07703)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft.config import TargetedConfig, choice, positive
from peft.errors import UnsupportedError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods.vera import projections, start
from peft.operators import Dense, DiagonalLowRank, Operator
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Base, Update


@dataclass
class PveraConfig(TargetedConfig):
    """PVeRA (arXiv 2512.07703): y += b ⊙ B z, z ~ N(μ, σ²), with (μ, log σ²) = d ⊙ A x.

    A (2r, in) and B (out, r) are VeRA's frozen matrices; b (out,) and d (2r,) are trained. In training z is drawn; in
    evaluation it is μ, unless `sample_at_inference`. Merging takes μ. Layers that only read their weight (attention,
    bare parameters) have no place for noise and run with μ in training too.

    Example:
        >>> from peft import PveraConfig
        >>> PveraConfig(r=64, target_modules=["q_proj"], generator_seed=0).sample_at_inference
        False
    """

    r: int = field(default=256, metadata={"help": "Length of z."})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random matrices."})
    save_projection: bool = field(
        default=True, metadata={"help": "Save A and B too; False: they are drawn again from the seed on loading."}
    )
    pvera_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    d_initial: float = field(default=0.1, metadata={"help": "Initial value of d."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'pvera_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model; False: at a random update."})
    sample_at_inference: bool = field(default=False, metadata={"help": "Draw z in evaluation as well."})
    generator_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of each layer's noise; None: the default generator, as gradient checkpointing needs."},
    )

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "pvera_only"))


@dataclass(frozen=True, eq=False)
class Noisy(Add):
    """`Add` of `up` μ(x), plus noise in training: `up` (ε σ(x)) with log σ² = `spread` x."""

    up: Operator = None  # type: ignore[assignment]
    spread: Operator = None  # type: ignore[assignment]
    generator: torch.Generator | None = None

    def delta(self, x: Tensor, base: Base) -> Tensor:
        seen = x if self.dropout is None else self.dropout(x)
        deviation = (0.5 * base.lift(self.spread, seen)).exp()
        if self.generator is None:
            noise = torch.randn_like(deviation)
        elif torch._C._current_graph_task_id() != -1:  # inside backward: this is a pass that checkpointing repeats
            raise UnsupportedError(
                "PVeRA's generator_seed gives each layer noise of its own, which gradient checkpointing can't repeat, "
                "so gradients would be wrong. Leave generator_seed None, or train without checkpointing."
            )
        else:
            noise = torch.randn(deviation.shape, generator=self.generator, dtype=deviation.dtype).to(deviation.device)
        return base.lift(self.op, seen) + base.out(self.up, noise * deviation)


class Pvera(WeightMethod, peft_type="PVERA", config=PveraConfig):
    prefix = "pvera_lambda_"
    slots = (Slot("pvera_lambda_b", "out"), Slot("pvera_lambda_d", "2*r"))
    settings = ("r", "generator")
    dropout = "pvera_dropout"
    samples = ({"r": 4}, {"r": 3, "save_projection": False}, {"r": 4, "init_weights": False})

    def shared(self, config: PveraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Tensor]:
        down, up = projections(config, 2 * config.r, targets)
        return {"pvera_A": down.to(device, dtype), "pvera_B": up.to(device, dtype)}

    def saved_banks(self, config: PveraConfig) -> tuple[str, ...]:
        return ("pvera_A", "pvera_B") if config.save_projection else ()

    def resolve(self, config: PveraConfig, host: Host, site: Site) -> dict[str, Any]:
        seed = config.generator_seed
        return {"r": config.r, "generator": None if seed is None else torch.Generator().manual_seed(seed)}

    def reset(self, p: Parts, host: Host) -> None:
        start(p.pvera_lambda_b, p.pvera_lambda_d, p.config)

    def update(self, p: Parts, host: Host) -> Update:
        down, up, b = p.pvera_A[:, : host.in_features], p.pvera_B[: host.out_features], p.pvera_lambda_b
        mean, spread = p.pvera_lambda_d.chunk(2)
        op = DiagonalLowRank(down[: p.r], up, mean, b)
        if not (p.training or p.config.sample_at_inference):
            return Add(op)
        # A grouped convolution has a hidden vector for each group.
        groups = host.groups
        wide = torch.block_diag(*(b[:, None] * up).chunk(groups))
        log_variance = (spread[:, None] * down[p.r :]).repeat(groups, 1)
        return Noisy(op, None, p.dropout, Dense(wide), Dense(log_variance), p.generator)
