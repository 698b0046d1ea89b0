"""What each matrix is: its entries, written out from the formula of the paper."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft import operators as ops
from peft.errors import ShapeError
from peft.operators import Operator, act, sparse


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def assert_is(op: Operator, expected: Tensor) -> None:
    assert op.shape == tuple(expected.shape)
    torch.testing.assert_close(op.dense(), expected, rtol=1e-10, atol=1e-10)


def test_low_rank_in_groups_is_the_weight_of_a_grouped_convolution() -> None:
    x, down, up = randn(2, 6, 5, 5), randn(4, 3, 1, 1), randn(8, 2, 1, 1)
    chained = F.conv2d(F.conv2d(x, down, groups=2), up, groups=2)
    weight = ops.LowRank(down.flatten(1), up.flatten(1), groups=2).dense()
    torch.testing.assert_close(F.conv2d(x, weight.view(8, 3, 1, 1), groups=2), chained)


def test_diagonal_low_rank() -> None:
    down, up, d, b = randn(2, 5), randn(3, 2), randn(2), randn(3)
    assert_is(ops.DiagonalLowRank(down, up, d, b), torch.diag(b) @ up @ torch.diag(d) @ down)


def test_kronecker() -> None:
    left, right = randn(2, 3), randn(4, 5)
    assert_is(ops.Kronecker(left, right, 0.5), 0.5 * torch.kron(left, right))


def test_hadamard_of_low_rank() -> None:
    a, b, c, d = randn(4, 2), randn(2, 5), randn(4, 3), randn(3, 5)
    assert_is(ops.HadamardLowRank(a, b, c, d, 2.0), 2 * (a @ b) * (c @ d))


def test_product_with_a_weight() -> None:
    up, down, up2, down2, weight = randn(4, 2), randn(2, 5), randn(4, 3), randn(3, 5), randn(4, 5)
    assert_is(ops.Modulated(up, down, weight), weight * (up @ down))
    assert_is(ops.Modulated(up, down, weight.mT.contiguous().mT, up2, down2), weight * (up @ down) + up2 @ down2)


def test_block_diagonal() -> None:
    blocks = randn(3, 2, 4)
    assert_is(ops.BlockDiagonal(blocks), torch.block_diag(*blocks))


def test_low_rank_grid_sends_a_chunk_of_every_projection_to_every_block() -> None:
    down, up = randn(2, 3, 4), randn(2, 4, 5)
    expected = torch.zeros(10, 6, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            block = down[i][:, 2 * j : 2 * j + 2] @ up[j][2 * i : 2 * i + 2]
            expected[5 * j : 5 * j + 5, 3 * i : 3 * i + 3] = block.T
    assert_is(ops.LowRankGrid(down, up), expected)


def test_block_circulant_rows_turn_by_one() -> None:
    kernel = randn(2, 3, 5)
    row = torch.cat([torch.stack([k.roll(r) for k in kernel[p]]).flatten()[None] for p in range(2) for r in range(5)])
    assert_is(ops.BlockCirculant(kernel), row / 15)


def test_fold_repeats_its_block() -> None:
    block = randn(3, 2)
    expected = torch.stack([torch.stack([block[i % 3, o % 2] for i in range(7)]) for o in range(6)])
    assert_is(ops.Fold(block, out=6, inner=7), expected)


def test_givens_pairs_the_halves_of_a_group() -> None:
    angle = torch.tensor([0.3, -1.1], dtype=torch.float64)
    op = ops.Givens(angle.cos().repeat(2), angle.sin().repeat(2), group=4)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, turn in enumerate(angle):
        plane = torch.stack((torch.stack((turn.cos(), -turn.sin())), torch.stack((turn.sin(), turn.cos()))))
        expected[i::2, i::2] = plane
    assert_is(op, expected)


def test_householder_is_the_product_of_reflections_from_the_left() -> None:
    u = randn(5, 3)
    expected = torch.eye(5, dtype=torch.float64)
    for v in u.T:
        expected = expected @ (torch.eye(5, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v))
    assert_is(ops.Householder(u), expected)


def test_skew_cayley_and_neumann() -> None:
    packed = 0.05 * randn(2, 6)
    q, eye = ops.skew(packed, 4), torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(q.mT, -q)
    torch.testing.assert_close(q[0][tuple(torch.triu_indices(4, 4, 1))], packed[0])
    assert_is(ops.Cayley(packed, 4, 2), torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q))))
    assert_is(ops.Cayley(packed[:1], 4, 2), torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q))[[0, 0]]))
    series = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    assert_is(ops.Neumann(packed, 4, 2), torch.block_diag(*series))
    torch.testing.assert_close(ops.neumann(q, 40), ops.cayley(-q))
    for terms in range(2, 9):
        series = sum((torch.linalg.matrix_power(q, k) for k in range(1, terms - 1)), start=0 * q)
        expected = eye + (2 * series + torch.linalg.matrix_power(q, terms - 1) if terms > 2 else q)
        torch.testing.assert_close(ops.neumann(q, terms), expected)


def test_butterfly_is_the_product_of_permuted_blocks_the_first_acting_first() -> None:
    blocks, order = randn(2, 3, 2, 2), torch.tensor([[1, 2, 3, 4, 5, 0], [5, 3, 1, 0, 2, 4]])
    expected = torch.eye(6, dtype=torch.float64)
    for stage, places in zip(blocks, order, strict=True):
        permutation = F.one_hot(places, 6).double()
        expected = permutation @ torch.block_diag(*stage) @ permutation.T @ expected
    assert_is(ops.Butterfly(blocks, order), expected)


def test_sparse_reads_places_both_ways_and_adds_up_repeated_ones() -> None:
    expected = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert_is(ops.Sparse(torch.tensor([[0, 0, 1], [1, 1, 2]], dtype=torch.int32), values, 2, 3), expected)
    assert_is(ops.Sparse(torch.tensor([1, 1, 5]), values, 2, 3), expected)


@pytest.mark.parametrize(("out", "inner"), [(6, 8), (5, 7), (1, 2)])
def test_fourier_at_every_frequency(out: int, inner: int) -> None:
    spectrum = randn(out, inner)
    op = ops.Fourier(torch.arange(out * inner), spectrum.flatten(), out, inner, scale=3.0)
    assert_is(op, 3 * torch.fft.ifft2(spectrum).real)
    x = randn(2, inner)
    torch.testing.assert_close(op.apply(x), x @ op.dense().T)


@pytest.mark.parametrize(
    ("place", "signs"),
    [
        ((0, 0), [[1, 1], [1, 1]]),
        ((0, 1), [[1, 1], [-1, -1]]),
        ((1, 0), [[1, -1], [1, -1]]),
        ((1, 1), [[1, -1], [-1, 1]]),
    ],
)
def test_wavelet_quadrants_of_haar(place: tuple[int, int], signs: list[list[int]]) -> None:
    low, high = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    quadrant = torch.tensor([[2 * place[0]], [2 * place[1]]])
    op = ops.Wavelet(quadrant, torch.ones(1, dtype=torch.float64), torch.stack((low, high)), 4, 4)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[:2, :2] = torch.tensor(signs) / 2
    assert_is(op, expected)


def test_wavelet_coefficients_lie_in_the_middle_of_the_padded_grid() -> None:
    low, high, out = randn(6), randn(6) + 1, 4
    synthesis = ops.WaveletSynthesis(low, high, out)
    assert synthesis.shape == (4, 8)
    bands = synthesis.dense()
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(out):
        for k in range(4):
            if 0 <= i + 4 - 2 * k < 6:
                expected[i, k], expected[i, 4 + k] = low[i + 4 - 2 * k], high[i + 4 - 2 * k]
    torch.testing.assert_close(bands, expected)
    op = ops.Wavelet(torch.tensor([[0], [1]]), torch.ones(1, dtype=torch.float64), torch.stack((low, high)), 4, 4)
    assert_is(op, torch.outer(expected[:, 2], expected[:, 3]))


def test_compositions() -> None:
    a, b, d = ops.Dense(randn(2, 3)), ops.Dense(randn(2, 3) + 1), ops.Diagonal(randn(3))
    assert_is(ops.Sum((a, b, ops.Scaled(b, -2.0))), a.matrix - b.matrix)
    assert_is(ops.Product(a, d), a.matrix @ torch.diag(d.d))
    assert_is(ops.Transposed(a), a.matrix.T)
    assert_is(ops.Sum((a, ops.Zero(2, 3, torch.float64))), a.matrix)
    assert_is(ops.Product(a, ops.Identity(3, torch.float64)), a.matrix)


class Flagged(ops.Dense):
    """A matrix whose two ways of acting differ, and whose costs are told by the test."""

    def apply(self, x: Tensor) -> Tensor:
        return x + 1

    def flops(self, tokens: int) -> float:
        return 10.0 * tokens

    def flops_dense(self, tokens: int) -> float:
        return 100.0 + tokens


def test_act_takes_the_cheaper_form() -> None:
    op = Flagged(torch.zeros(2, 2))
    assert act(op, torch.zeros(5, 2)).eq(1).all()
    assert act(op, torch.zeros(2, 10, 2)).eq(0).all()


def test_cheap_forms_are_known_to_be_cheap() -> None:
    wide, size, tokens = 1024, (1024, 1024), 512
    places = torch.arange(500)
    cheap = [
        ops.LowRank(torch.empty(8, wide), torch.empty(wide, 8)),
        ops.HadamardLowRank(torch.empty(wide, 4), torch.empty(4, wide), torch.empty(wide, 4), torch.empty(4, wide)),
        ops.Kronecker(torch.empty(32, 32), torch.empty(32, 32)),
        ops.BlockCirculant(torch.empty(8, 8, 128)),
        ops.Householder(torch.empty(wide, 8)),
        ops.Neumann(torch.empty(32, 496), 32, 32),
        ops.Fold(torch.empty(32, wide), *size),
        ops.Fourier(places, torch.empty(500), *size),
    ]
    for op in cheap:
        assert op.flops(tokens) < 0.7 * op.flops_dense(tokens), type(op).__name__
    full = ops.LowRank(torch.empty(wide, wide), torch.empty(wide, wide))
    crowded = ops.Sparse(torch.arange(wide * 64), torch.empty(wide * 64), *size)
    for op in (full, crowded):
        assert op.flops(10 * wide) > op.flops_dense(10 * wide), type(op).__name__


def test_an_operator_needs_apply_or_dense() -> None:
    with pytest.raises(TypeError, match="Empty needs `apply` or `dense`"):
        type("Empty", (Operator,), {})


def test_either_is_the_default_of_the_other() -> None:
    class Doubled(ops.Dense):
        apply = Operator.apply

        def dense(self) -> Tensor:
            return 2 * self.matrix

    class Reversed(ops.Diagonal):
        dense = Operator.dense

    matrix, x = randn(3, 2), randn(4, 2)
    torch.testing.assert_close(Doubled(matrix).apply(x), 2 * x @ matrix.T)
    assert_is(Reversed(randn(3)), torch.diag(randn(3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.LowRank(randn(2, 5), randn(4, 3)), r"LowRank: .* share r.*down \(2, 5\), up \(4, 3\)"),
        (lambda: ops.LowRank(randn(4, 5), randn(3, 2), groups=2), "groups divides out"),
        (lambda: ops.Sum((ops.Dense(randn(2, 3)), ops.Dense(randn(3, 2)))), r"one shape; got terms \[\(2, 3\), \(3, 2"),
        (lambda: ops.Sum(()), "one or more terms"),
        (lambda: ops.Product(ops.Diagonal(randn(2)), ops.Diagonal(randn(3))), "columns of left are the rows of right"),
        (lambda: ops.Givens(randn(6), randn(6), 4), "group is even and divides n"),
        (lambda: ops.Sparse(torch.arange(3), randn(2), 2, 3), "share k"),
        (lambda: ops.Cayley(randn(2, 5), 4, 2), "size - 1"),
        (lambda: ops.LowRankGrid(randn(2, 3, 3), randn(2, 3, 3)), "k divides r"),
    ],
)
def test_what_does_not_fit_says_which_sizes(make: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("module", [info.name for info in pkgutil.iter_modules(ops.__path__)])
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"peft.operators.{module}")).failed == 0


def test_what_is_made_of_places_follows_them_and_goes_with_them() -> None:
    index, x = torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.randn(1 << 15, 4)  # so many tokens that rows are compressed
    op = ops.LoneSparse(index, torch.randn(3), 3, 4)
    for _ in range(2):
        torch.testing.assert_close(op.apply(x), x @ op.dense().mT)
        index[1] = torch.tensor([2, 3, 0])
    key = id(index)
    assert key in sparse._KEPT
    del op, index
    assert key not in sparse._KEPT
