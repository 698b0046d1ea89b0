"""Merging of task tensors that live in the same coordinates: task arithmetic, TIES (arXiv 2306.01708), DARE.

Every function takes its task tensors as an iterable and holds only a few accumulators, so a generator that makes them
one at a time keeps memory independent of their number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from peft.combine.prune import prune
from peft.errors import ConfigError

SignMethod = Literal["total", "frequency"]


def check_sign_method(method: str) -> None:
    """Refuse a rule of election other than 'total' and 'frequency'."""
    if method not in ("total", "frequency"):
        raise ConfigError(f"Unknown majority_sign_method {method!r}; known: 'total' (by mass), 'frequency' (by count).")


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """View `weights` (tasks,) so that they broadcast over `task_tensors` (tasks, …)."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def task_arithmetic(task_tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Σ wᵢ tᵢ (arXiv 2212.04089).

    >>> task_arithmetic([torch.ones(2), torch.tensor([0.0, 2.0])], torch.tensor([1.0, -0.5]))
    tensor([1., 0.])
    """
    # a 1-element view, not a 0-d tensor, so that the dtype of the weights counts in promotion as in a stacked product
    return functools.reduce(
        torch.add, (t * w.view((1,) * max(t.dim(), 1)) for t, w in zip(task_tensors, weights, strict=True))
    )


def magnitude_prune(task_tensors: Iterable[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ wᵢ · (the largest `density` of tᵢ)."""
    return task_arithmetic((prune(t, density, "magnitude") for t in task_tensors), weights)


def dare_linear(
    task_tensors: Iterable[Tensor], weights: Tensor, density: float, generator: torch.Generator | None = None
) -> Tensor:
    """Σ wᵢ · drop(tᵢ), each entry kept with probability `density` and rescaled: its mean is the weighted sum."""
    dropped = (prune(t, density, "random", rescale=True, generator=generator) for t in task_tensors)
    return task_arithmetic(dropped, weights)


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """Which entries of `tensor` (tasks, …) have the sign that the tasks elect for their place.

    'total' elects by the sum of the entries, 'frequency' by the sum of their signs; a draw elects plus.
    Returns a boolean tensor (tasks, …), False at zeros.
    """
    check_sign_method(method)
    votes = tensor if method == "total" else tensor.sign()
    return tensor.sign() == torch.where(votes.sum(0) >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of `task_tensors` (tasks, …) over those whose mask is True, place by place; 0 where none is."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp_min(1)


def _elect_and_merge(trimmed: Iterable[Tensor], weights: Tensor, method: SignMethod) -> Tensor:
    """Elect a sign per place, then take the weighted mean over the tasks that have it.

    The result of either election is accumulated in one pass, and chosen when all votes are in.
    """
    check_sign_method(method)
    dtype, sums = weights.dtype, None
    for t, w in zip(trimmed, weights.tolist(), strict=True):
        dtype = torch.promote_types(dtype, t.dtype)
        work = t if t.dtype == torch.float64 else t.float()
        if sums is None:
            votes, plus, minus = (torch.zeros_like(work) for _ in range(3))
            ayes, noes = (torch.zeros_like(work, dtype=torch.int16) for _ in range(2))
            sums = votes, plus, minus, ayes, noes
        votes, plus, minus, ayes, noes = sums
        votes += work if method == "total" else work.sign()
        plus.add_(work.clamp_min(0), alpha=w)
        minus.add_(work.clamp_max(0), alpha=w)
        ayes += work > 0
        noes += work < 0
    if sums is None:
        raise ConfigError("There is nothing to merge: no task tensors were given.")
    votes, plus, minus, ayes, noes = sums
    return torch.where(votes >= 0, plus / ayes.clamp_min(1), minus / noes.clamp_min(1)).to(dtype)


def ties(
    task_tensors: Iterable[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """TIES: trim each task to its largest `density`, elect a sign per place, average those that agree with it.

    The election counts the tasks without their weights, as the paper does. For a negative weight, hand in the negated
    tensor with a positive weight, or its votes count for what is then subtracted.
    """
    return _elect_and_merge((prune(t, density, "magnitude") for t in task_tensors), weights, majority_sign_method)


def dare_ties(
    task_tensors: Iterable[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """TIES with DARE's random dropping and rescaling in the place of trimming."""
    dropped = (prune(t, density, "random", rescale=True, generator=generator) for t in task_tensors)
    return _elect_and_merge(dropped, weights, majority_sign_method)
