"""Weighted combinations of LoRA adapters, layer by layer: a pure function over tensors.

**What each combination means.** Adapter i changes a layer by ΔWᵢ = sᵢ Bᵢ Aᵢ.

| combination_type | the new change | cost |
|---|---|---|
| `linear`, `svd`, `cat` | Σ wᵢ ΔWᵢ; `cat` only stacks the factors, the others find the fewest ranks | factored |
| `magnitude_prune` | Σ wᵢ sᵢ prune(Bᵢ) prune(Aᵢ) | factored |
| `dare_linear` | Σ wᵢ sᵢ drop(Bᵢ) drop(Aᵢ); its mean over the draws is Σ wᵢ ΔWᵢ | factored |
| `magnitude_prune_svd`, `dare_linear_svd` | Σ wᵢ prune(ΔWᵢ), Σ wᵢ drop(ΔWᵢ) | one dense layer at a time |
| `ties`, `ties_svd` | TIES over the ΔWᵢ, a negative wᵢ negating its votes | one dense layer at a time |
| `dare_ties`, `dare_ties_svd` | the same with DARE's dropping for trimming | one dense layer at a time |

The result has scaling 1. Without `svd_rank` it has the rank that holds Σ wᵢ ΔWᵢ, at most Σ rᵢ, so the first three rows
lose nothing; what any other cut loses is measured and returned.

`reference=True` gives the numbers of HF PEFT instead. There, all but the `_svd` types and `cat` work on A and B apart,
whose product then holds wᵢ wⱼ Bᵢ Aⱼ for every pair: far from the sum (`report.error` says how far).

Papers: task arithmetic arXiv 2212.04089, TIES 2306.01708, DARE 2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peft.combine import merge
from peft.combine.factored import (
    Factors,
    clamped,
    compress,
    distance,
    relative,
    result_dtype,
    stack,
    truncate_blocks,
    wide,
)
from peft.combine.prune import prune
from peft.combine.reference import reference_layers
from peft.combine.terms import CombinationType, CombinedLayer, CombineReport, Recipe, Term, check_weights, present


def combine(
    layers: Mapping[str, Sequence[Term | None]] | Iterable[tuple[str, Sequence[Term | None]]],
    weights: Sequence[float],
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: merge.SignMethod = "total",
    reference: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, CombinedLayer], CombineReport]:
    """Combine adapters given as `{layer: [term of adapter 1, term of adapter 2, …]}`.

    Args:
        layers: per layer one term per adapter, None where the adapter leaves the layer alone. An iterable of pairs is
            consumed one layer at a time.
        weights: one per adapter, of any sign.
        combination_type: see the module.
        svd_rank: the rank of the result; None is the rank that holds the weighted sum. A float in (0, 1] is the share
            of ‖ΔW‖² to keep.
        svd_clamp: a quantile in (0, 1]: clamp the new factors to ± that quantile of their entries.
        svd_full_matrices: used by `reference=True` only; the result doesn't depend on it.
        svd_driver: of `torch.linalg.svd` for dense layers on CUDA.
        density: the share of entries that pruning keeps; needed by all types but the sums.
        majority_sign_method: of TIES: 'total' elects by mass, 'frequency' by count.
        reference: give HF PEFT's numbers, not the exact ones.
        generator: where the draws of DARE come from; default: torch's global generator.

    Returns:
        The new layers, and the report of their errors.

    >>> one = Term(Factors(torch.randn(2, 6), torch.randn(5, 2)), scale=2.0)
    >>> new, report = combine({"fc": [one, one]}, [1.5, -0.5])
    >>> torch.allclose(new["fc"].factors.dense(), one.factors.dense() * 2.0, atol=1e-5), report.ranks
    (True, {'fc': 2})
    """
    recipe = Recipe(
        combination_type,
        svd_rank,
        svd_clamp,
        svd_full_matrices,
        svd_driver,
        density,
        majority_sign_method,
        reference,
    )
    check_weights(weights)
    pairs: Iterable[tuple[str, Sequence[Term | None]]]
    pairs = layers.items() if isinstance(layers, Mapping) else layers  # type: ignore[assignment]
    if reference:
        combined = reference_layers({name: present(terms, weights) for name, terms in pairs}, recipe, generator)
    else:
        combined = {name: combine_layer(terms, weights, recipe, generator) for name, terms in pairs}
    return combined, CombineReport(
        combination_type,
        {name: layer.error for name, layer in combined.items()},
        {name: layer.norm for name, layer in combined.items()},
        {name: layer.factors.rank for name, layer in combined.items()},
    )


def combine_layer(
    terms: Sequence[Term | None], weights: Sequence[float], recipe: Recipe, generator: torch.Generator | None = None
) -> CombinedLayer:
    """The combination of one layer, as the table of the module defines it."""
    found, kept = present(terms, weights)
    if any(t.factors.A.is_meta for t in found):
        return _shapes(found, recipe)
    bias = _combine_bias(found, kept, recipe, generator)
    if recipe.dense or any(t.delta is not None for t in found):
        factors, error, norm = _combine_dense(found, kept, recipe, generator)
    else:
        factors, error, norm = _combine_factored(found, kept, recipe, generator)
    return CombinedLayer(factors, bias, error, norm)


def _shapes(terms: list[Term], recipe: Recipe) -> CombinedLayer:
    """On the meta device: what the shapes will be if no term depends on another."""
    whole, dtype = stack([t.factors for t in terms]), result_dtype([t.factors for t in terms])
    most = whole.rank if recipe.combination_type == "cat" else min(whole.rank, *whole.shape[1:])
    rank = min(most, recipe.svd_rank) if isinstance(recipe.svd_rank, int) else most
    factors = Factors(whole.A[:, :rank], whole.B[..., :rank]).to(dtype)
    return CombinedLayer(factors, next((t.bias for t in terms if t.bias is not None), None), math.nan, math.nan)


def _combine_factored(
    terms: list[Term], weights: list[float], recipe: Recipe, generator: torch.Generator | None
) -> tuple[Factors, float, float]:
    """Sums, and sums of pruned factors: nothing dense."""
    dtype = result_dtype([t.factors for t in terms])
    scales = [w * t.scale for t, w in zip(terms, weights, strict=True)]
    if recipe.operation == "sum":
        total = stack([t.factors for t in terms])
    else:
        total = stack([_pruned(t.factors, recipe, generator) for t in terms])
    total = Factors(wide(total.A), wide(total.B))
    start = 0
    for term, scale in zip(terms, scales, strict=True):
        total.B[..., start : start + term.factors.rank].mul_(scale)
        start += term.factors.rank
    if recipe.combination_type == "cat" and recipe.svd_rank is None:
        factors = total.to(dtype)
        factors = factors if recipe.svd_clamp is None else clamped(factors, recipe.svd_clamp)
        norm = total.norm()
        return factors, relative(distance(total, factors), norm), norm
    return compress(total, recipe.svd_rank, dtype, recipe.svd_clamp)


def _pruned(f: Factors, recipe: Recipe, generator: torch.Generator | None) -> Factors:
    """A and B pruned apart."""
    random = recipe.operation == "dare_linear"
    how = "random" if random else "magnitude"
    return Factors(*(prune(wide(x), recipe.density, how, random, generator) for x in (f.A, f.B)))  # type: ignore[arg-type]


def _combine_dense(
    terms: list[Term], weights: list[float], recipe: Recipe, generator: torch.Generator | None
) -> tuple[Factors, float, float]:
    """Operations on ΔW itself: one block of one layer at a time, then cut to the rank."""
    dtype = result_dtype([t.factors for t in terms])
    blocks, out, n = terms[0].factors.shape
    rank = recipe.svd_rank if recipe.svd_rank is not None else min(sum(t.factors.rank for t in terms), out, n)
    signs = [math.copysign(1.0, w) for w in weights]
    work = torch.promote_types(dtype, torch.float32)
    sizes = torch.tensor([abs(w) for w in weights], dtype=work, device=terms[0].factors.A.device)
    merged = (
        recipe.merge((t.block(i) * sign for t, sign in zip(terms, signs, strict=True)), sizes, generator)
        for i in range(blocks)
    )  # lazily: one block of one adapter at a time
    return truncate_blocks(merged, rank, dtype, recipe.svd_clamp, recipe.svd_driver)


def _combine_bias(
    terms: list[Term], weights: list[float], recipe: Recipe, generator: torch.Generator | None
) -> Tensor | None:
    """The same operation on the bias vectors scaleᵢ · biasᵢ; an adapter without one counts as zero."""
    found = next((t.bias for t in terms if t.bias is not None), None)
    if found is None:
        return None
    zero = torch.zeros_like(wide(found))
    tensors = [
        zero if t.bias is None else wide(t.bias) * (t.scale * math.copysign(1.0, w))
        for t, w in zip(terms, weights, strict=True)
    ]
    sizes = torch.tensor([abs(w) for w in weights], dtype=zero.dtype, device=zero.device)
    return recipe.merge(tensors, sizes, generator).to(found.dtype)
