"""PSOFT: rotations inside the principal subspace of the weight (https://openreview.net/forum?id=FSHrinMArK)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank, cayley, neumann, skew
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class PsoftConfig(TargetedConfig):
    """PSOFT: W + s B (R - I) A, where s B A is the best rank-r approximation of W and R (r, r) turns its subspace.

    R = diag(b) C diag(a) with C the Cayley transform of a skew-symmetric matrix; r (r - 1) / 2 + 2 r numbers are
    trained. A and B are found again from W on loading, so files hold R alone. s = psoft_alpha / r.

    Example:
        >>> from peft import PsoftConfig
        >>> PsoftConfig(r=16, psoft_alpha=16, target_modules=["q_proj"]).psoft_orth
        True
    """

    r: int = field(default=32, metadata={"help": "Dimension of the subspace; at most the smaller side of a target."})
    psoft_alpha: int = field(default=32, metadata={"help": "The update is scaled by psoft_alpha / r."})
    psoft_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    ab_svd_init: Literal["psoft_init", "pissa_init"] = field(
        default="psoft_init", metadata={"help": "Singular values all in B ('psoft_init'), or their roots in both."}
    )
    psoft_svd: Literal["full", "lowrank"] = field(default="full", metadata={"help": "Exact SVD, or a randomised one."})
    psoft_svd_lowrank_niter: int = field(default=10, metadata={"help": "Power iterations of the randomised SVD."})
    random_seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    psoft_orth: bool = field(default=True, metadata={"help": "False: C is any matrix, all r² entries trained."})
    psoft_mag_b: bool = field(default=True, metadata={"help": "Train b; False: ones."})
    psoft_mag_a: bool = field(default=True, metadata={"help": "Train a; False: ones."})
    use_cayley_neumann: bool = field(default=False, metadata={"help": "Cayley transform by a short Neumann series."})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "Terms of the series."})
    cayley_neumann_eps: float | None = field(
        default=None, metadata={"help": "Largest norm of the skew matrix in the series, from 0 to 1; None: no bound."}
    )
    init_weights: bool = field(default=True, metadata={"help": "R = I, so training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "num_cayley_neumann_terms")
        choice(self, "ab_svd_init", ("psoft_init", "pissa_init"))
        choice(self, "psoft_svd", ("full", "lowrank"))
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(f"PsoftConfig.cayley_neumann_eps is {self.cayley_neumann_eps}; it lies between 0 and 1.")


def _rotation(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    r = sizes.r
    shapes: dict[str, tuple[int, ...]] = {"weight": (r * (r - 1) // 2,) if sizes.orth else (r, r)}
    shapes |= {f"vector_{name}": (r,) for name in ("b", "a") if sizes[f"mag_{name}"]}
    return {name: shape for name, shape in shapes.items() if math.prod(shape)}


class Psoft(WeightMethod, peft_type="PSOFT", config=PsoftConfig):
    slots = (
        Slot("psoft_R", _rotation, kind="group"),
        Slot("psoft_A", "r in", kind="buffer", saved=False),
        Slot("psoft_B", "out r", kind="buffer", saved=False),
    )
    settings = ("r", "scaling")
    dropout = "psoft_dropout"
    samples = (
        {"r": 2},
        {"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.9, "psoft_svd": "lowrank"},
        {"r": 2, "psoft_orth": False, "ab_svd_init": "pissa_init", "psoft_mag_a": False, "init_weights": False},
    )

    def resolve(self, config: PsoftConfig, host: Host, site: Site) -> dict[str, Any]:
        most = min(host.in_features, host.out_features)
        if config.r > most:
            raise TargetError(f"PSOFT: r = {config.r} is more than the smaller side of {site.key!r}; at most {most}.")
        if config.r == 1 and config.psoft_orth and not (config.psoft_mag_a or config.psoft_mag_b):
            raise TargetError("PSOFT: one dimension has no rotation to train; raise r to 2, or train psoft_mag_a.")
        trains = {"orth": config.psoft_orth, "mag_a": config.psoft_mag_a, "mag_b": config.psoft_mag_b}
        return {"r": config.r, "scaling": config.psoft_alpha / config.r, **trains}

    def derive(self, p: Parts, host: Host) -> None:
        u, s, vt = principal(p.call(host).weight, p.config)
        s = s / self.initial_scaling(p)
        if p.config.ab_svd_init == "pissa_init":
            vt, s = s.sqrt()[:, None] * vt, s.sqrt()
        p.psoft_A.copy_(vt)
        p.psoft_B.copy_(u * s)

    def reset(self, p: Parts, host: Host) -> None:
        group = p.psoft_R
        for name in group:
            nn.init.zeros_(group[name]) if name == "weight" else nn.init.ones_(group[name])
        if not p.config.psoft_orth:
            nn.init.eye_(group["weight"])
        if not p.config.init_weights and "weight" in group:
            group["weight"].add_(torch.randn_like(group["weight"]), alpha=0.1)

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: PsoftConfig) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}  # HF PEFT keeps (0,) for r = 1

    def update(self, p: Parts, host: Host) -> Update:
        up = p.psoft_B
        up = torch.addmm(up, up, rotation(p.psoft_R, p.config, p.r), beta=-1)  # B R - B
        return Add(LowRank(p.psoft_A, up, p.scaling), dropout=p.dropout)


def principal(weight: Tensor, config: PsoftConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The top r singular triplets of a weight: U (out, r), S (r,), Vᵀ (r, in)."""
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    if config.psoft_svd == "full":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        return u[:, : config.r], s[: config.r], vt[: config.r]
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(config.random_seed)
        u, s, v = torch.svd_lowrank(weight, q=config.r, niter=config.psoft_svd_lowrank_niter)
    return u, s, v.mT


def rotation(group: nn.ParameterDict, config: PsoftConfig, r: int) -> Tensor:
    """R (r, r)."""
    turn: Tensor = group["weight"] if "weight" in group else torch.ones_like(next(iter(group.values())))[:, None]
    if config.psoft_orth and r > 1:
        q = skew(turn, r)
        if config.use_cayley_neumann:
            if config.cayley_neumann_eps is not None:
                norm = torch.linalg.matrix_norm(q)
                q = q * (config.cayley_neumann_eps / norm.clamp_min(config.cayley_neumann_eps))
            turn = neumann(q, config.num_cayley_neumann_terms)
        else:
            turn = cayley(q).mT  # that of -Q
    if "vector_a" in group:
        turn = turn * group["vector_a"]
    return turn * group["vector_b"][:, None] if "vector_b" in group else turn
