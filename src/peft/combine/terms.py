"""The nouns of a combination: a term, a recipe, what comes out, and the report of what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peft.combine import merge
from peft.combine.factored import Factors, check_rank, result_dtype
from peft.combine.prune import check_density
from peft.errors import ConfigError, nearest

CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
COMBINATION_TYPES: tuple[str, ...] = get_args(CombinationType)
SUMS = ("svd", "linear", "cat")


@dataclass(frozen=True)
class Term:
    """One adapter's change of one layer, `scale · B @ A`, and of its bias, `scale · bias`.

    `delta` is for a change that is not that product (DoRA): it returns the dense one, (out, in) or (blocks, out, in),
    scale included; `factors` then only give the shape, the dtype and the rank.
    """

    factors: Factors
    scale: float = 1.0
    bias: Tensor | None = None
    delta: Callable[[], Tensor] | None = None

    def block(self, index: int) -> Tensor:
        """One block of the change, (out, in), in float32 or better."""
        if self.delta is not None:
            whole = self.delta().detach()
            return whole if whole.dim() == 2 else whole[index]
        dtype = torch.promote_types(result_dtype([self.factors]), torch.float32)
        a, b = self.factors.A.detach()[index].to(dtype), self.factors.B.detach()[index].to(dtype)
        return (b @ a) * self.scale


@dataclass(frozen=True)
class Recipe:
    """How to combine; validated when made. The arguments are those of `combine`."""

    combination_type: CombinationType = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: merge.SignMethod = "total"
    reference: bool = False

    def __post_init__(self) -> None:
        kind = self.combination_type
        if kind not in COMBINATION_TYPES:
            raise ConfigError(
                f"Unknown combination_type {kind!r}.{nearest(str(kind), COMBINATION_TYPES)} "
                f"Known: {', '.join(COMBINATION_TYPES)}."
            )
        check_rank(self.svd_rank)
        merge.check_sign_method(self.majority_sign_method)
        if self.svd_clamp is not None and not 0.0 < self.svd_clamp <= 1.0:
            raise ConfigError(f"svd_clamp is a quantile in (0, 1], got {self.svd_clamp!r}.")
        if kind not in SUMS:
            if self.density is None:
                raise ConfigError(f"combination_type {kind!r} needs `density`, the share of entries to keep in (0, 1].")
            check_density(self.density)

    @property
    def operation(self) -> str:
        """The merge behind the type: 'sum', 'magnitude_prune', 'dare_linear', 'ties' or 'dare_ties'."""
        return "sum" if self.combination_type in SUMS else self.combination_type.removesuffix("_svd")

    @property
    def dense(self) -> bool:
        """Whether the operation has to see ΔW itself: nonlinear in its entries, so factors don't do."""
        return self.operation.endswith("ties") or (self.operation != "sum" and self.combination_type.endswith("_svd"))

    def merge(self, tensors: Iterable[Tensor], weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """The operation on task tensors that share coordinates."""
        if self.operation == "sum":
            return merge.task_arithmetic(tensors, weights)
        density: float = self.density  # type: ignore[assignment]  # checked above
        if self.operation == "magnitude_prune":
            return merge.magnitude_prune(tensors, weights, density)
        if self.operation == "dare_linear":
            return merge.dare_linear(tensors, weights, density, generator)
        if self.operation == "ties":
            return merge.ties(tensors, weights, density, self.majority_sign_method)
        return merge.dare_ties(tensors, weights, density, self.majority_sign_method, generator)


@dataclass(frozen=True)
class CombinedLayer:
    """The new factors of one layer (scaling 1) and its bias, with the relative `error` and the `norm` it refers to."""

    factors: Factors
    bias: Tensor | None
    error: float
    norm: float


@dataclass(frozen=True)
class CombineReport:
    """What a combination cost: per layer, `errors[name]` = ‖target − result‖ / ‖target‖ (Frobenius, measured).

    The target is what the combination type means before it is cut to a rank; with `reference=True` it is the weighted
    sum for all but the `_svd` types.
    """

    combination_type: str
    errors: Mapping[str, float]
    norms: Mapping[str, float]
    ranks: Mapping[str, int]

    @property
    def error(self) -> float:
        """The relative error over all layers together."""
        total = math.fsum(n * n for n in self.norms.values())
        return math.sqrt(math.fsum((e * self.norms[k]) ** 2 for k, e in self.errors.items()) / total) if total else 0.0

    def worst(self, n: int = 5) -> list[tuple[str, float]]:
        """The `n` layers with the largest relative error."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:n]

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        lines = [
            f"{self.combination_type}: {len(self.errors)} layers, rank {ranks[0]}"
            + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
            + f", relative error {self.error:.3g}"
        ]
        return "\n".join(lines + [f"  {error:.3g}  {name}" for name, error in self.worst() if error > 1e-6])


def check_weights(weights: Sequence[float]) -> None:
    """Refuse no weights, and weights that are not finite numbers."""
    if not len(weights) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights are finite numbers, one per adapter, got {list(weights)}.")


def present(terms: Sequence[Term | None], weights: Sequence[float]) -> tuple[list[Term], list[float]]:
    """The terms that are there, and their weights."""
    if len(terms) != len(weights):
        raise ConfigError(f"{len(terms)} adapters and {len(weights)} weights: one weight per adapter is needed.")
    pairs = [(t, float(w)) for t, w in zip(terms, weights, strict=True) if t is not None]
    if not pairs:
        raise ConfigError("A layer that no adapter changes can't be combined; leave it out.")
    return [t for t, _ in pairs], [w for _, w in pairs]
