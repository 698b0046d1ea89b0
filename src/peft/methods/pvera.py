"""PVeRA: VeRA with a hidden vector that is drawn from a learnt distribution (arXiv 2512.07703)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import UnsupportedError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods.vera import cut, projections, start
from peft.operators import Dense, Diagonal, DiagonalLowRank
from peft.operators.base import SMALL
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Base, Run, Update


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


def draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None) -> Tensor:
    """z ~ N(μ, σ²), all of one shape."""
    deviation = (0.5 * log_variance).exp()
    if generator is None:
        noise = torch.randn_like(deviation)
    elif torch._C._current_graph_task_id() != -1:  # inside backward: this is a pass that checkpointing repeats
        raise UnsupportedError(
            "PVeRA's generator_seed gives each layer noise of its own, which gradient checkpointing can't repeat, "
            "so gradients would be wrong. Leave generator_seed None, or train without checkpointing."
        )
    else:
        noise = torch.randn(deviation.shape, generator=generator, dtype=deviation.dtype).to(deviation.device)
    return torch.addcmul(mean, noise, deviation)


@dataclass(frozen=True, eq=False)
class Noisy(Update):
    """b ⊙ B z added to the output, z drawn; in the weight, that of its mean. Shapes as in `PveraConfig`."""

    down: Tensor
    up: Tensor
    d: Tensor
    b: Tensor
    dropout: nn.Module | None
    generator: torch.Generator | None
    relative = True

    def added(self) -> Add:
        """The update without noise."""
        rank = self.up.shape[1]
        return Add(DiagonalLowRank(self.down[:rank], self.up, self.d[:rank], self.b), None, self.dropout)

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        y, seen = prev(x), x if self.dropout is None else self.dropout(x)
        dtype = self.d.dtype if x.numel() + y.numel() <= SMALL else y.dtype
        hidden = F.linear(seen.to(dtype), self.down.to(dtype)) * self.d.to(dtype)
        mean, log_variance = hidden.chunk(2, -1)
        change = F.linear(draw(mean, log_variance, self.generator), self.up.to(dtype))
        b = self.b.to(dtype)
        return torch.addcmul(y, change, b) if dtype == y.dtype else y + (change * b).to(y.dtype)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        return self.added().weight(weight, base)

    def transposed(self, base: Base) -> Update:
        return self.added().transposed(base)


@dataclass(frozen=True, eq=False)
class NoisyPatches(Noisy):
    """The same on layers that read their input in other ways than `nn.Linear`."""

    groups: int = 1
    """Of a grouped convolution, which has a hidden vector for each."""

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        seen = x if self.dropout is None else self.dropout(x)
        mean, log_variance = (
            base.out(Diagonal(d.repeat(self.groups)), base.lift(Dense(down.repeat(self.groups, 1)), seen))
            for down, d in zip(self.down.chunk(2), self.d.chunk(2), strict=True)
        )
        up = torch.block_diag(*self.up.chunk(self.groups))
        change = base.out(Dense(up), draw(mean, log_variance, self.generator))
        return prev(x) + base.out(Diagonal(self.b), change)


class Pvera(WeightMethod, peft_type="PVERA", config=PveraConfig):
    prefix = "pvera_lambda_"
    slots = (Slot("pvera_lambda_b", "out"), Slot("pvera_lambda_d", "2*r"))
    settings = ("r", "sample_at_inference", "generator")
    dropout = "pvera_dropout"
    samples = ({"r": 4}, {"r": 3, "save_projection": False}, {"r": 4, "init_weights": False})

    def shared(self, config: PveraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Tensor]:
        down, up = projections(config, 2 * config.r, targets)
        return {"pvera_A": down.to(device, dtype), "pvera_B": up.to(device, dtype)}

    def saved_banks(self, config: PveraConfig) -> tuple[str, ...]:
        return ("pvera_A", "pvera_B") if config.save_projection else ()

    def resolve(self, config: PveraConfig, host: Host, site: Site) -> dict[str, Any]:
        seed = config.generator_seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return {"r": config.r, "sample_at_inference": config.sample_at_inference, "generator": generator}

    def reset(self, p: Parts, host: Host) -> None:
        start(p.pvera_lambda_b, p.pvera_lambda_d, p.config)

    def update(self, p: Parts, host: Host) -> Update:
        down, up = cut(p.pvera_A, 2 * p.r, host.in_features), cut(p.pvera_B, host.out_features, p.r)
        update = Noisy(down, up, p.pvera_lambda_d, p.pvera_lambda_b, p.dropout, p.generator)
        if not (p.training or p.sample_at_inference):
            return update.added()
        return update if host.on_input else NoisyPatches(**vars(update), groups=host.groups)
