"""The numbers of HF PEFT 0.21.2, for those who need to reproduce a result made with it.

Found by running it. The plain types merge A and B apart, with weights √|wᵢsᵢ| on both and the sign on A; the `_svd`
types merge the dense ΔWᵢ with the weights as they are, so that in TIES a negative weight does not negate a vote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from peft.combine.factored import Factors, clamped, distance, frobenius, relative, result_dtype, stack, wide
from peft.combine.terms import CombinedLayer, Recipe, Term
from peft.errors import ConfigError, UnsupportedError


def reference_layers(
    layers: Mapping[str, tuple[list[Term], list[float]]], recipe: Recipe, generator: torch.Generator | None
) -> dict[str, CombinedLayer]:
    """Combine all layers as the reference does. It leaves biases out, and knows no dense changes."""
    for name, (terms, _) in layers.items():
        if any(t.delta is not None for t in terms):
            raise UnsupportedError(
                f"{name}: the reference ignores the magnitudes of DoRA, so there are no numbers to reproduce. "
                "Leave `reference=True` away to add what the adapters do."
            )
    if recipe.combination_type == "cat":
        most = max(sum(t.factors.rank for t in terms) for terms, _ in layers.values())
        return {name: _cat(terms, weights, most) for name, (terms, weights) in layers.items()}
    if not recipe.combination_type.endswith("svd"):
        return {name: _apart(name, terms, weights, recipe, generator) for name, (terms, weights) in layers.items()}
    rank = recipe.svd_rank or max(t.factors.rank for terms, _ in layers.values() for t in terms)
    return {name: _svd(terms, weights, int(rank), recipe, generator) for name, (terms, weights) in layers.items()}


def _measured(factors: Factors, terms: list[Term], weights: list[float]) -> CombinedLayer:
    """The result, with its distance from the weighted sum."""
    total = stack(
        [Factors(wide(t.factors.A), wide(t.factors.B)).scaled(w * t.scale) for t, w in zip(terms, weights, strict=True)]
    )
    norm = total.norm()
    return CombinedLayer(factors, None, relative(distance(total, factors), norm), norm)


def _cat(terms: list[Term], weights: list[float], rank: int) -> CombinedLayer:
    parts = [Factors(t.factors.A * (w * t.scale), t.factors.B) for t, w in zip(terms, weights, strict=True)]
    return _measured(stack(parts).padded(rank), terms, weights)


def _apart(
    name: str, terms: list[Term], weights: list[float], recipe: Recipe, generator: torch.Generator | None
) -> CombinedLayer:
    ranks = [t.factors.rank for t in terms]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{name}: the reference's {recipe.combination_type!r} needs adapters of one rank, got {ranks}. "
            "Take 'cat' or an '_svd' type, or leave `reference=True` away."
        )
    scaled = [w * t.scale for t, w in zip(terms, weights, strict=True)]
    a, b = [t.factors.A.detach() for t in terms], [t.factors.B.detach() for t in terms]
    on_b = torch.tensor([math.sqrt(abs(x)) for x in scaled], dtype=a[0].dtype, device=a[0].device)
    on_a = on_b * torch.tensor([math.copysign(1.0, x) for x in scaled], dtype=a[0].dtype, device=a[0].device)
    return _measured(Factors(recipe.merge(a, on_a, generator), recipe.merge(b, on_b, generator)), terms, weights)


def _svd(
    terms: list[Term], weights: list[float], rank: int, recipe: Recipe, generator: torch.Generator | None
) -> CombinedLayer:
    dtype = result_dtype([t.factors for t in terms])
    parts, lost, norms = [], 0.0, 0.0
    for index in range(terms[0].factors.shape[0]):
        blocks = [t.block(index) for t in terms]
        delta = recipe.merge(blocks, torch.tensor(weights, dtype=blocks[0].dtype, device=blocks[0].device), generator)
        driver = recipe.svd_driver if delta.is_cuda else None
        u, s, vh = torch.linalg.svd(delta, full_matrices=recipe.svd_full_matrices, driver=driver)
        factors = Factors(vh[:rank], u[:, :rank] * s[:rank]) if rank <= len(s) else _too_large(rank, delta)
        factors = (factors if recipe.svd_clamp is None else clamped(factors, recipe.svd_clamp)).to(dtype)
        parts.append(factors)
        lost += frobenius(delta - factors.dense()[0].to(delta.dtype)) ** 2
        norms += frobenius(delta) ** 2
    whole = Factors(torch.cat([p.A for p in parts]), torch.cat([p.B for p in parts]))
    return CombinedLayer(whole, None, relative(math.sqrt(lost), math.sqrt(norms)), math.sqrt(norms))


def _too_large(rank: int, delta: torch.Tensor) -> Factors:
    raise ConfigError(
        f"The reference can't cut a layer of shape {tuple(delta.shape)} to rank {rank}: give a smaller `svd_rank`."
    )
