"""AdaMSS: low-rank adapters of groups of output rows, within the principal subspace (NeurIPS 2025)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError, StateError
from peft.hosts import Host
from peft.layer import AdaptedLayer
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class AdamssConfig(TargetedConfig):
    """AdaMSS: rows of [W | b] in groups; group k is changed by Bₖ Aₖ V, with V the top r right singular vectors.

    The groups are clusters (k-means) of the rows of the left singular vectors. Aₖ (ρ, r) and Bₖ (rows, ρ) are trained.
    With `use_asa` the model keeps the `asa_target_subspaces` most important groups in the end and freezes the others,
    along a schedule that `model.base_model.update_and_allocate(step)` follows after each optimizer step, or
    `peft.integrations.callbacks.AllocationCallback` in transformers' Trainer. Needs scikit-learn.

    Example:
        >>> from peft import AdamssConfig
        >>> AdamssConfig(r=64, num_subspaces=4, target_modules=["q_proj"]).subspace_rank
        1
    """

    r: int = field(default=100, metadata={"help": "Dimension of the subspace; less where a target is smaller."})
    num_subspaces: int = field(default=5, metadata={"help": "Groups of rows per layer."})
    subspace_rank: int = field(default=1, metadata={"help": "Rank ρ of each group; with use_dynamic_rank the largest."})
    init_weights: Literal["orthogonal"] | None = field(
        default="orthogonal", metadata={"help": "B zero, so training starts at the base model. None: B small."}
    )
    use_asa: bool = field(default=False, metadata={"help": "Freeze unimportant groups while training."})
    asa_target_subspaces: int = field(default=50, metadata={"help": "Groups of the whole model that train to the end."})
    init_warmup: int = field(default=50, metadata={"help": "Steps before the first groups are frozen."})
    final_warmup: int = field(default=1000, metadata={"help": "Step at which the target is reached."})
    mask_interval: int = field(default=100, metadata={"help": "Steps between choices."})
    asa_importance_beta: float = field(default=0.85, metadata={"help": "Decay of the average importance."})
    asa_uncertainty_beta: float = field(default=0.85, metadata={"help": "Decay of its uncertainty."})
    asa_schedule_exponent: float = field(default=3.0, metadata={"help": "How fast groups are frozen at first."})
    use_dynamic_rank: bool = field(default=False, metadata={"help": "Choose ρ of each group by its singular values."})
    svd_threshold: float = field(
        default=0.1, metadata={"help": "Dynamic ρ counts squared singular values above this share of the largest."}
    )
    random_seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "num_subspaces", "subspace_rank", "mask_interval")
        choice(self, "init_weights", ("orthogonal", None))
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"AdamssConfig: final_warmup = {self.final_warmup} must be above init_warmup = {self.init_warmup}; "
                "groups are frozen between the two."
            )


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Take the gradients of a step into the importance of each group, and freeze groups if it is time.

    Args:
        global_step: How many optimizer steps were made.
    """
    for adapter in tuner.active_adapters:
        config, layers = tuner.peft_config[adapter], _layers(tuner, adapter)
        if getattr(config, "use_asa", False) and layers and global_step <= config.final_warmup:
            seen = tuner.__dict__.setdefault("_importances", {}).setdefault(adapter, {})
            _observe(config, layers, adapter, seen)
            due = global_step > config.init_warmup and global_step % config.mask_interval == 0
            if due or global_step == config.final_warmup:
                _choose(config, layers, adapter, seen, global_step)


class Adamss(WeightMethod, peft_type="ADAMSS", config=AdamssConfig):
    slots = (
        Slot("adamss_A", lambda s: {str(k): (rho, s.r) for k, rho in enumerate(s.ranks)}, kind="group"),
        Slot("adamss_B", lambda s: _heights(s), kind="group"),
        Slot("adamss_newB", "r wide", kind="buffer"),
    )
    settings = ("r", "num_subspaces", "scatter_index", "blind")
    tuner_methods: ClassVar[dict[str, Any]] = {"update_and_allocate": update_and_allocate}
    samples = (
        {"r": 4, "num_subspaces": 2},
        {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "use_dynamic_rank": True, "init_weights": None},
    )

    def identity_at_start(self, config: AdamssConfig) -> bool:
        return config.init_weights is not None

    def resolve(self, config: AdamssConfig, host: Host, site: Site) -> dict[str, Any]:
        matrix = augmented(host.weight(), host.bias())
        r = min(config.r, *matrix.shape)
        groups, ranks = clusters(matrix, config, r)
        order = torch.tensor([row for rows in groups for row in rows])
        sizes = {"wide": matrix.shape[1], "ranks": ranks, "rows": [len(g) for g in groups]}
        blind = _without_values(matrix)
        return {"r": r, "num_subspaces": len(groups), "scatter_index": order.argsort(), "blind": blind, **sizes}

    def derive(self, p: Parts, host: Host) -> None:
        if p.blind and not _without_values(augmented(host.weight(), host.bias())):
            raise StateError(_BLIND)

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: AdamssConfig) -> dict[str, Tensor]:
        if p.blind:
            raise StateError(_BLIND)
        return tensors

    def reset(self, p: Parts, host: Host) -> None:
        base = p.call(host)
        p.adamss_newB.copy_(principal(augmented(base.weight, base.bias), p.config, p.r)[1])
        for k in p.adamss_A:
            nn.init.orthogonal_(p.adamss_A[k])
            nn.init.zeros_(p.adamss_B[k]) if p.config.init_weights else nn.init.normal_(p.adamss_B[k], std=0.01)

    def update(self, p: Parts, host: Host) -> Update:
        blocks = torch.block_diag(*p.adamss_B.values())
        up, inner = blocks[p.scatter_index.to(blocks.device)], host.in_features
        down = torch.cat(list(p.adamss_A.values())) @ p.adamss_newB
        shift = up @ down[:, inner] if down.shape[1] > inner else None
        return Add(LowRank(down[:, :inner], up), shift)


_BLIND = (
    "AdaMSS groups the rows of W by their values, which neither were there when the adapter was made (meta device) nor "
    "stand in files. Load the base weights first, then add or load the adapter."
)


def _without_values(matrix: Tensor) -> bool:
    """Whether a matrix has a shape only: on the meta device, or fake."""
    return type(matrix) is not Tensor or matrix.device.type == "meta"


def _heights(sizes: Sizes) -> dict[str, tuple[int, int]]:
    return {str(k): shape for k, shape in enumerate(zip(sizes.rows, sizes.ranks, strict=True))}


def augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[W | b], or W alone, in float32 on the CPU, where the same seed means the same everywhere."""
    matrix = weight.detach().float()
    if bias is not None:
        matrix = torch.cat([matrix, bias.detach()[:, None].float()], 1)
    return matrix if matrix.device.type == "meta" else matrix.cpu()


def principal(matrix: Tensor, config: AdamssConfig, r: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and Vᵀ (r, in) of a randomised SVD."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_seed)
        u, _, v = torch.svd_lowrank(matrix, q=r, niter=2)
    return u, v.mT


def clusters(matrix: Tensor, config: AdamssConfig, r: int) -> tuple[list[list[int]], list[int]]:
    """Rows in groups, and the rank of each. Without values (meta, fake tensors): even groups, for their shapes."""
    out = matrix.shape[0]
    count = min(config.num_subspaces, out)
    if _without_values(matrix):
        groups = [list(range(out))[k::count] for k in range(count)]
        return groups, [min(config.subspace_rank, len(g), r) for g in groups]
    try:
        kmeans = importlib.import_module("sklearn.cluster").KMeans
    except ModuleNotFoundError as error:
        raise ImportError("AdaMSS groups rows with k-means and needs scikit-learn: pip install scikit-learn") from error
    rows = principal(matrix, config, r)[0]
    fit = kmeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789).fit(rows.numpy())
    groups, ranks = [], []
    for k in range(count):
        groups.append([row for row, label in enumerate(fit.labels_.tolist()) if label == k])
        rank = min(config.subspace_rank, len(groups[-1]), r)
        if config.use_dynamic_rank:
            square = torch.linalg.svdvals(rows[groups[-1]]).square()
            rank = max(1, min(rank, int((square > config.svd_threshold * square[0]).sum())))
        ranks.append(rank)
    return groups, ranks


def _layers(tuner: Any, adapter: str) -> dict[str, AdaptedLayer]:
    named = tuner.model.named_modules()
    return {k: m for k, m in named if isinstance(m, AdaptedLayer) and adapter in getattr(m, "adamss_A", ())}


@torch.no_grad()
def _observe(config: AdamssConfig, layers: dict[str, AdaptedLayer], adapter: str, seen: dict[str, Any]) -> None:
    """Moving averages of |p · gradient| and of its deviations, for each factor of each group."""
    for key, layer in layers.items():
        for factor in ("adamss_A", "adamss_B"):
            for k, p in getattr(layer, factor)[adapter].items():
                if p.grad is None:
                    continue
                zeros = (torch.zeros_like(p), torch.zeros_like(p))
                mean, spread = seen.setdefault(f"{key}.{factor}.{k}", zeros)
                now = (p * p.grad).abs()
                mean.lerp_(now, 1 - config.asa_importance_beta)
                spread.lerp_((now - mean).abs(), 1 - config.asa_uncertainty_beta)


def _choose(
    config: AdamssConfig, layers: dict[str, AdaptedLayer], adapter: str, seen: dict[str, Any], step: int
) -> None:
    """Let the most important groups train, as many as the schedule has for this step, and freeze the others."""
    groups = [(key, k) for key, layer in layers.items() for k in layer.adamss_A[adapter]]
    target = min(config.asa_target_subspaces, len(groups))
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    budget = int(target + (len(groups) - target) * left**config.asa_schedule_exponent)

    def score(group: tuple[str, str]) -> float:
        pairs = [seen.get(f"{group[0]}.{factor}.{group[1]}") for factor in ("adamss_A", "adamss_B")]
        return sum(float((mean * spread).mean()) for mean, spread in filter(None, pairs))

    kept = set(sorted(groups, key=score, reverse=True)[:budget])
    for key, k in groups:
        for factor in ("adamss_A", "adamss_B"):
            p = getattr(layers[key], factor)[adapter][k]
            p.requires_grad_((key, k) in kept)
            p.grad = p.grad if p.requires_grad else None
