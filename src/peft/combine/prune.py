"""Pruning of task tensors: by magnitude, or at random (DARE, arXiv 2311.03099)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peft.errors import ConfigError


def check_density(density: float) -> None:
    """Refuse a share of entries below 0."""
    if not density >= 0:
        raise ConfigError(f"density is the share of entries to keep and can't be below 0, got {density}.")


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the `int(density · numel)` entries of largest magnitude, zero the others.

    >>> magnitude_based_pruning(torch.tensor([3.0, -4.0, 1.0, 0.5]), 0.5)
    tensor([ 3., -4.,  0.,  0.])
    """
    check_density(density)
    flat = tensor.reshape(-1)
    keep = min(int(density * flat.numel()), flat.numel())
    if keep == 0:
        return torch.zeros_like(tensor)
    size = flat.abs()
    # a threshold moves half the memory that the indices of `topk` do; where entries tie on it, the last go
    threshold = torch.kthvalue(size, flat.numel() - keep + 1).values
    mask = size >= threshold
    if (surplus := int(mask.sum()) - keep) > 0:
        mask[(size == threshold).nonzero().squeeze(1)[-surplus:]] = False
    return torch.where(mask, flat, 0).view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool, generator: torch.Generator | None = None) -> Tensor:
    """Keep each entry with probability `density`; with `rescale`, divide by it, so that the mean is unchanged."""
    check_density(density)
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density if rescale and density > 0 else tensor * mask


def prune(
    tensor: Tensor,
    density: float,
    method: Literal["magnitude", "random"],
    rescale: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zero all but a share `density` of the entries. At density 1 or more the tensor itself is returned.

    Args:
        tensor: of any shape.
        density: the share of entries to keep, >= 0.
        method: 'magnitude' keeps the largest, 'random' keeps each with probability `density`.
        rescale: for 'random': divide what is kept by `density`.
        generator: for 'random': where the draws come from; default: torch's global one.
    """
    check_density(density)
    if method not in ("magnitude", "random"):
        raise ConfigError(f"Unknown method of pruning {method!r}; known: 'magnitude', 'random'.")
    if density >= 1:
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale, generator)
