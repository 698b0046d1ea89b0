"""A sum of factors is the sum, its cut is the best one, and the error it reports is the error that can be measured."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.combine.factored import Factors, distance, energy_rank, numerical_rank, recompress, stack, truncate
from peft.errors import ConfigError


def factors(rank, out, n, blocks=1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(blocks, rank, n, generator=g, dtype=dtype), torch.randn(blocks, out, rank, generator=g, dtype=dtype)
    )


sizes = st.integers(1, 9)


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    out=sizes,
    n=sizes,
    blocks=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_is_the_sum(ranks, out, n, blocks, data):
    terms = [factors(r, out, n, blocks, seed) for seed, r in enumerate(ranks)]
    weights = data.draw(st.lists(st.floats(-3, 3), min_size=len(ranks), max_size=len(ranks)))
    total, error = recompress([t.scaled(w) for t, w in zip(terms, weights, strict=True)])
    expected = sum(w * t.dense() for t, w in zip(terms, weights, strict=True))
    assert torch.allclose(total.dense(), expected, atol=1e-10, rtol=1e-10)
    assert error < 1e-10
    assert total.rank <= min(sum(ranks), out, n)


@given(rank=st.integers(1, 6), out=sizes, n=sizes, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_cut_is_the_best_one_and_says_its_error(rank, out, n, seed):
    terms = [factors(4, out, n, seed=seed), factors(3, out, n, seed=seed + 1)]
    dense = stack(terms).dense()[0]
    cut, error = recompress(terms, rank)
    left = torch.linalg.svdvals(dense)[rank:].norm() / dense.norm()
    measured = (cut.dense()[0] - dense).norm() / dense.norm()
    assert error == pytest.approx(float(left), abs=1e-12)
    assert error == pytest.approx(float(measured), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_includes_the_rounding_to_the_stored_dtype(dtype):
    terms = [factors(4, 20, 30, seed=s, dtype=dtype) for s in range(2)]
    exact = sum(t.to(torch.float64).dense() for t in terms)
    total, error = recompress(terms)
    assert total.A.dtype == dtype
    measured = (total.to(torch.float64).dense() - exact).norm() / exact.norm()
    assert 0 < error < 2 * torch.finfo(dtype).eps
    assert error == pytest.approx(float(measured), rel=1e-6)


def test_rank_that_is_not_there_is_not_stored():
    one = factors(4, 20, 30)
    total, error = recompress([one, one.scaled(-0.25)])
    assert total.rank == 4
    assert error < 1e-12


def test_a_change_that_cancels_is_zero_and_can_still_be_trained():
    one = factors(4, 20, 30)
    total, error = recompress([one, one.scaled(-1.0)])
    assert error == 0.0
    assert total.norm() < 1e-12
    assert total.A.norm() > 0.5


def test_factors_are_balanced():
    total, _ = recompress([factors(4, 20, 30)])
    assert torch.allclose(total.A.norm(dim=2), total.B.norm(dim=1))


def test_gauge_does_not_matter():
    one = factors(3, 10, 12)
    mix = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(3)
    same = Factors(torch.linalg.solve(mix, one.A), one.B @ mix)
    other = factors(2, 10, 12, seed=2)
    assert torch.allclose(recompress([one, other], 2)[0].dense(), recompress([same, other], 2)[0].dense())


def test_norm_and_distance_are_those_of_the_dense_matrices():
    one, two = factors(3, 8, 9, blocks=2), factors(5, 8, 9, blocks=2, seed=1)
    assert one.norm() == pytest.approx(float(one.dense().norm()))
    assert distance(one, two) == pytest.approx(float((one.dense() - two.dense()).norm()))
    assert distance(one, one) < 1e-12


def test_padding_changes_nothing_and_refuses_to_cut():
    one = factors(3, 8, 9)
    assert torch.equal(one.padded(5).dense(), one.dense())
    with pytest.raises(ConfigError, match="cut"):
        one.padded(2)


def test_meta_tensors_give_shapes():
    total, error = recompress([factors(4, 20, 30).to("meta"), factors(2, 20, 30).to("meta")])
    assert total.A.is_meta
    assert (total.rank, total.shape) == (6, (1, 20, 30))
    assert math.isnan(error)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="one shape"):
        stack([factors(2, 4, 5), factors(2, 4, 6)])
    with pytest.raises(ConfigError, match="do not multiply"):
        Factors(torch.zeros(3, 5), torch.zeros(4, 2))


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, "4", True])
def test_ranks_that_are_none(rank):
    with pytest.raises(ConfigError, match="rank is an integer"):
        recompress([factors(2, 4, 5)], rank)


def test_energy_rank_is_the_smallest_that_keeps_the_share():
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [energy_rank(s, e) for e in (0.5, 9 / 14, 0.65, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert numerical_rank(s[None], torch.float32) == 3


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 4), ((300, 400), 6), ((300, 400), 0.5), ((12, 9), None)])
def test_truncate_dense_is_near_the_optimum_and_measures_its_error(shape, rank):
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(shape[0], 50, generator=g), torch.randn(50, shape[1], generator=g)
    delta = (u * 0.8 ** torch.arange(50)) @ v
    cut, error = truncate(delta, rank)
    best = torch.linalg.svdvals(delta)[cut.rank :].norm() / delta.norm()
    assert error == pytest.approx(float((delta - cut.dense()[0]).norm() / delta.norm()), abs=1e-5)
    assert float(best) - 1e-6 <= error <= float(best) * 1.001 + 1e-5
    if isinstance(rank, float):
        assert error**2 <= 1 - rank


def test_truncate_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    truncate(torch.ones(300, 300), 4)
    assert torch.equal(state, torch.get_rng_state())
