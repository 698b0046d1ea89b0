"""Pruning and merging: the laws, and the reference's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft.combine import merge
from peft.combine.prune import magnitude_based_pruning, prune, random_pruning
from peft.errors import ConfigError

WEIGHTS = torch.tensor([1.0, -0.5, 2.0])


def tasks(n=3, shape=(7, 5), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(n)]


CALLS = {
    "task_arithmetic": {},
    "magnitude_prune": {"density": 0.35},
    "dare_linear": {"density": 0.5},
    "ties": {"density": 0.5},
    "ties-frequency": {"density": 0.5, "majority_sign_method": "frequency"},
    "dare_ties": {"density": 0.6, "majority_sign_method": "total"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_the_reference(reference, name, dtype):
    function, options = name.partition("-")[0], CALLS[name]
    inputs = [t.to(dtype) for t in tasks()]
    theirs = reference.ask(
        "call",
        "(torch.manual_seed(3), __import__('importlib').import_module('peft.utils.merge_utils'))[1]"
        f".{function}(ts, ws, **options)",
        ts=inputs,
        ws=WEIGHTS,
        options=options,
    )
    torch.manual_seed(3)
    ours = getattr(merge, function)(inputs, WEIGHTS, **options)
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_signs_and_disjoint_means_of_the_reference(reference, method):
    stacked = torch.stack(tasks())
    stacked[0, 0] = 0
    stacked[:, 1] = 0
    module = "__import__('importlib').import_module('peft.utils.merge_utils')"
    mask = reference.ask("call", f"{module}.calculate_majority_sign_mask(t, m)", t=stacked, m=method)
    assert torch.equal(merge.calculate_majority_sign_mask(stacked, method), mask)
    mean = reference.ask("call", f"{module}.disjoint_merge(t, m)", t=stacked, m=mask)
    assert torch.allclose(merge.disjoint_merge(stacked, mask), mean)


@given(density=st.floats(0, 1.5), seed=st.integers(0, 50))
def test_magnitude_pruning_keeps_the_largest(density, seed):
    tensor = tasks(1, seed=seed)[0]
    pruned = prune(tensor, density, "magnitude")
    kept = pruned != 0
    assert kept.sum() == min(int(density * tensor.numel()), tensor.numel())
    assert torch.equal(pruned[kept], tensor[kept])
    if kept.any() and not kept.all():
        assert tensor[kept].abs().min() >= tensor[~kept].abs().max()


def test_random_pruning_keeps_the_mean_and_listens_to_its_generator():
    tensor = torch.ones(200, 200)
    draw = [random_pruning(tensor, 0.25, True, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert draw[0].mean() == pytest.approx(1.0, abs=0.05)
    assert random_pruning(tensor, 0.25, False, torch.Generator().manual_seed(0)).max() == 1


def test_ties_over_one_task_at_full_density_is_the_task():
    one = tasks(1)
    assert torch.equal(merge.ties(one, torch.ones(1), 1.0), one[0])


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_is_the_disjoint_mean_of_the_elected_signs(method):
    trimmed = torch.stack([magnitude_based_pruning(t, 0.5) for t in tasks()])
    mask = merge.calculate_majority_sign_mask(trimmed, method)
    by_hand = merge.disjoint_merge(trimmed * merge.reshape_weight_task_tensors(trimmed, WEIGHTS), mask)
    assert torch.allclose(merge.ties(iter(tasks()), WEIGHTS, 0.5, method), by_hand, atol=1e-6)


def test_what_is_wrong_is_said():
    with pytest.raises(ConfigError, match="below 0"):
        prune(torch.ones(3), -0.1, "magnitude")
    with pytest.raises(ConfigError, match="'magnitude', 'random'"):
        prune(torch.ones(3), 0.5, "largest")
    with pytest.raises(ConfigError, match="majority_sign_method"):
        merge.ties(tasks(), WEIGHTS, 0.5, "most")
    with pytest.raises(ValueError, match="zip"):
        merge.task_arithmetic(tasks(), WEIGHTS[:2])
