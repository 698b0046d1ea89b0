"""OSF: training within what the weight does not use (arXiv 2504.07097)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import patterns
from peft.config import TargetedConfig
from peft.errors import ConfigError, PeftWarning
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank, Sum
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class OSFConfig(TargetedConfig):
    """OSF (arXiv 2504.07097): the top singular triplets of W stay, the others are trained at right angles to them.

    W = U S Vᵀ is split after `effective_rank` triplets. The rest (U_low, S_low, V_low) is trained, and the gradients
    of U_low and V_low are projected off the frozen directions, so that what was learnt before is not overwritten.

    Example:
        >>> from peft import OSFConfig
        >>> OSFConfig(effective_rank=0.5, target_modules=["q_proj"]).effective_rank
        0.5
    """

    effective_rank: int | float | None = field(
        default=None, metadata={"help": "Frozen triplets: a number, a share (above 0, at most 1), or None for half."}
    )
    rank_pattern: dict[str, int | float] | None = field(
        default=None, metadata={"help": "{name or regex: effective rank}; first match wins."}
    )
    init_weights: bool | None = field(default=True, metadata={"help": "Start at W; False: from noise."})
    target_svd_config: dict[str, int] | None = field(
        default=None, metadata={"help": "Without effect, as in HF PEFT; rank_pattern gives ranks by name."}
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and rank <= 0:
                raise ConfigError(
                    f"OSFConfig: an effective rank of {rank}; it is a number of triplets or a share, above 0."
                )
        if self.target_svd_config:
            warnings.warn(
                "OSFConfig.target_svd_config has no effect, here as in HF PEFT. Give ranks by name in rank_pattern.",
                PeftWarning,
                stacklevel=3,
            )


def _low(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"U_low": (sizes["out"], sizes.low), "S_low": (sizes.low,), "V_low": (sizes.low, sizes["in"])}


class OSF(WeightMethod, peft_type="OSF", config=OSFConfig):
    slots = (
        Slot("osf_svd_params", _low, kind="group", when="low"),
        Slot("osf_U", "out all", kind="buffer", saved=False),
        Slot("osf_S", "all", kind="buffer", saved=False),
        Slot("osf_V", "all in", kind="buffer", saved=False),
    )
    settings = ("effective_rank",)
    fallback_targets = "all-linear"
    samples = ({}, {"effective_rank": 2, "init_weights": False})

    def resolve(self, config: OSFConfig, host: Host, site: Site) -> dict[str, Any]:
        most = min(host.in_features, host.out_features)
        rank = patterns.lookup(config.rank_pattern, site.key, config.effective_rank)
        if rank is None:
            rank = most // 2
        elif isinstance(rank, float) and rank <= 1:
            rank = rank * most
        kept = min(int(rank), most)
        return {"effective_rank": kept, "low": most - kept, "all": most}

    def derive(self, p: Parts, host: Host) -> None:
        weight = p.call(host).weight
        weight = weight if weight.dtype == torch.float64 else weight.float()
        for held, part in zip((p.osf_U, p.osf_S, p.osf_V), torch.linalg.svd(weight, full_matrices=False), strict=True):
            held.copy_(part)

    def reset(self, p: Parts, host: Host) -> None:
        start = _rest(p)
        for name, tensor in p.osf_svd_params.items() if p.has("osf_svd_params") else ():
            nn.init.normal_(tensor) if p.config.init_weights is False else tensor.copy_(start[name])

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: OSFConfig) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}  # HF PEFT keeps empty ones

    def update(self, p: Parts, host: Host) -> Update:
        kept, group = p.effective_rank, p.osf_svd_params if p.has("osf_svd_params") else _rest(p)
        up = OffSubspace.apply(group["U_low"], p.osf_U[:, :kept]) * group["S_low"]
        down = OffSubspace.apply(group["V_low"].mT, p.osf_V[:kept].mT).mT
        start = LowRank(p.osf_V[kept:], -p.osf_U[:, kept:] * p.osf_S[kept:])
        return Add(Sum((LowRank(down, up), start)))


def _rest(p: Parts) -> dict[str, Tensor]:
    """The triplets of W that are not frozen."""
    kept = p.effective_rank
    return {"U_low": p.osf_U[:, kept:], "S_low": p.osf_S[kept:], "V_low": p.osf_V[kept:]}


class OffSubspace(torch.autograd.Function):
    """The identity on x (n, k), whose gradient g loses its part in the span of q (n, m): g - q qᵀ g."""

    @staticmethod
    def forward(x: Tensor, q: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (q,) = ctx.saved_tensors
        return grad - q @ (q.mT @ grad), None
