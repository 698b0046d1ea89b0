"""The laws of every operator: whatever it does fast, it does what its dense matrix does.

To add an operator to all of them, add a sample: a function of a source of tensors and of three small sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft import operators as ops
from peft.operators import Operator, act
from peft.operators.base import filled, shell, tensors_of

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@dataclass
class Source:
    """Random tensors, kept in the order of asking; given `replay`, it hands those out instead."""

    seed: int = 0
    replay: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)

    def _next(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        if self.replay:
            value = self.replay[len(self.given)]
        else:
            value = draw(torch.Generator().manual_seed(self.seed + len(self.given)))
        self.given.append(value)
        return value

    def __call__(self, *shape: int) -> Tensor:
        return self._next(lambda g: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_())

    def places(self, out: int, inner: int, k: int) -> Tensor:
        """k distinct places of a matrix, (2, k)."""
        return self._next(lambda g: torch.stack(_divmod(torch.randperm(out * inner, generator=g)[:k], inner)))

    def orders(self, count: int, size: int) -> Tensor:
        return self._next(lambda g: torch.stack([torch.randperm(size, generator=g) for _ in range(count)]))

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.given if tensor.is_floating_point()]


def _divmod(flat: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    return flat // inner, flat % inner


def low_rank(s: Source, out: int, inner: int, r: int) -> Operator:
    return ops.LowRank(s(r, inner), s(out, r), 0.5)


def packed(s: Source, size: int, blocks: int) -> Tensor:
    return s(blocks, size * (size - 1) // 2)


def places(s: Source, out: int, inner: int, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, out * inner)
    return s.places(out, inner, k), s(k)


SAMPLES: dict[str, Callable[[Source, int, int, int], Operator]] = {
    "dense": lambda s, p, q, r: ops.Dense(s(p, q)),
    "diagonal": lambda s, p, q, r: ops.Diagonal(s(p)),
    "identity": lambda s, p, q, r: ops.Identity(p, torch.float64),
    "zero": lambda s, p, q, r: ops.Zero(p, q, torch.float64),
    "low_rank": lambda s, p, q, r: low_rank(s, 2 * p, q, r),
    "low_rank_learnt_scale": lambda s, p, q, r: ops.LowRank(s(r, q), s(p, r), s()),
    "low_rank_grouped": lambda s, p, q, r: ops.LowRank(s(3 * r, q), s(3 * p, r), 2.0, groups=3),
    "bilinear": lambda s, p, q, r: ops.Bilinear(s(r, q), s(2, r), s(p, 2), 3.0),
    "bilinear_operator": lambda s, p, q, r: ops.Bilinear(s(r, q), ops.Diagonal(s(r)), s(p, r)),
    "diagonal_low_rank": lambda s, p, q, r: ops.DiagonalLowRank(s(r, q), s(p, r), s(r), s(p)),
    "kronecker": lambda s, p, q, r: ops.Kronecker(s(p, q), s(r, 3), 0.5),
    "kronecker_tall": lambda s, p, q, r: ops.Kronecker(s(1, 4), s(4 * p, 2), s()),
    "kronecker_low_rank": lambda s, p, q, r: ops.Kronecker(ops.Dense(s(p, q)), low_rank(s, 5, 4, r)),
    "hadamard_thin": lambda s, p, q, r: ops.HadamardLowRank(s(9 * p, 1), s(1, 9 * q), s(9 * p, 2), s(2, 9 * q), 0.5),
    "hadamard_thick": lambda s, p, q, r: ops.HadamardLowRank(s(p, r), s(r, q), s(p, r), s(r, q)),
    "modulated": lambda s, p, q, r: ops.Modulated(s(p, r), s(r, q), s(p, q).detach()),
    "modulated_and_added": lambda s, p, q, r: ops.Modulated(s(p, r), s(r, q), s(p, q).detach(), s(p, 2), s(2, q)),
    "block_diagonal": lambda s, p, q, r: ops.BlockDiagonal(s(r, p, q)),
    "low_rank_grid": lambda s, p, q, r: ops.LowRankGrid(s(2, q, 2 * r), s(2, 2 * r, p), 0.5),
    "block_circulant": lambda s, p, q, r: ops.BlockCirculant(s(p, q, r)),
    "fold": lambda s, p, q, r: ops.Fold(s(r, p), p, 3 * q),
    "fold_mini": lambda s, p, q, r: ops.Fold(s(r, p), 3 * p, 3 * q),
    "givens": lambda s, p, q, r: ops.Givens(s(2 * p * q), s(2 * p * q), 2 * p),
    "givens, long": lambda s, p, q, r: ops.Givens(s(64 * q), s(64 * q), 64),
    "householder": lambda s, p, q, r: ops.Householder(s(p + q, r)),
    "cayley": lambda s, p, q, r: ops.Cayley(packed(s, p, q), p, q),
    "cayley_shared": lambda s, p, q, r: ops.Cayley(packed(s, p, 1), p, q),
    "neumann": lambda s, p, q, r: ops.Neumann(packed(s, p, q), p, q),
    "neumann_terms": lambda s, p, q, r: ops.Neumann(packed(s, p, q), p, q, terms=r + 1),
    "butterfly": lambda s, p, q, r: ops.Butterfly(s(r, p, q, q), s.orders(r, p * q)),
    "sparse": lambda s, p, q, r: ops.Sparse(*places(s, p, q, 2 * r), p, q),
    "lone_sparse": lambda s, p, q, r: ops.LoneSparse(*places(s, p, q, 2 * r), p, q),
    "sparse_flat": lambda s, p, q, r: ops.Sparse((s.places(p, q, 2)[0] * q).int(), s(min(2, p * q)), p, q),
    "fourier": lambda s, p, q, r: ops.Fourier(*places(s, p + q, q, 2 * r), p + q, q, 2.0),
    "fourier_transposed": lambda s, p, q, r: ops.Fourier(*places(s, p, q, 3 * r), p, q).T,
    "wavelet_synthesis": lambda s, p, q, r: ops.WaveletSynthesis(s(2 * r), s(2 * r), p),
    "wavelet": lambda s, p, q, r: ops.Wavelet(*places(s, p, q, 3), s(2, 2 * r), p, q, 0.5),
    "wavelet_fixed": lambda s, p, q, r: ops.Wavelet(
        *places(s, p, q, 3), torch.arange(4.0 * r).view(2, -1).double(), p, q
    ),
    "sum": lambda s, p, q, r: ops.Sum((low_rank(s, p, q, r), ops.Dense(s(p, q)))),
    "sum_low_rank": lambda s, p, q, r: ops.Sum((low_rank(s, p, q, r), low_rank(s, p, q, 1))),
    "product": lambda s, p, q, r: ops.Product(ops.Dense(s(p, q)), ops.Diagonal(s(q))),
    "product_low_rank": lambda s, p, q, r: ops.Product(low_rank(s, p, q, r), ops.Householder(s(q, 2))),
    "product_low_rank_right": lambda s, p, q, r: ops.Product(ops.BlockDiagonal(s(2, p, q)), low_rank(s, 2 * q, 5, r)),
    "scaled": lambda s, p, q, r: ops.Scaled(low_rank(s, p, q, r), s()),
    "transposed": lambda s, p, q, r: ops.Transposed(low_rank(s, p, q, r)),
}

LOW_RANK = [
    "bilinear",
    "bilinear_operator",
    "diagonal_low_rank",
    "fold",
    "fold_mini",
    "hadamard_thin",
    "low_rank",
    "low_rank_grouped",
    "low_rank_learnt_scale",
    "product_low_rank",
    "product_low_rank_right",
    "scaled",
    "sum_low_rank",
    "transposed",
    "zero",
]

every = pytest.mark.parametrize("name", SAMPLES)
small = st.integers(1, 4)
SIZES = (2, 4, 3)
"""No two alike, so that a dimension taken for another is seen."""


def build(name: str, sizes: tuple[int, int, int] = SIZES, seed: int = 0) -> tuple[Operator, Source]:
    source = Source(seed)
    return SAMPLES[name](source, *sizes), source


def inputs(op: Operator, *batch: int) -> Tensor:
    return torch.randn(*batch, op.shape[1], generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def test_every_operator_has_a_sample() -> None:
    seen = {type(build(name)[0]).__name__ for name in SAMPLES}
    assert seen == {name for name in ops.__all__ if name[0].isupper()} - {"Operator"}


@every
@settings(max_examples=20, deadline=None, derandomize=True)
@given(p=small, q=small, r=small, seed=st.integers(0, 1000))
@example(p=1, q=1, r=1, seed=0)
@example(p=3, q=4, r=5, seed=0)
@example(p=4, q=3, r=4, seed=0)
def test_whatever_it_does_equals_its_dense_matrix(name: str, p: int, q: int, r: int, seed: int) -> None:
    op, _ = build(name, (p, q, r), seed)
    dense, x = op.dense(), inputs(op, 5)
    index = torch.randint(op.shape[1], (2, 3), generator=torch.Generator().manual_seed(seed))

    assert dense.shape == op.shape
    torch.testing.assert_close(op.apply(x), x @ dense.T, **EXACT)
    torch.testing.assert_close(act(op, x), x @ dense.T, **EXACT)
    torch.testing.assert_close(op.columns(index), dense.T[index], **EXACT)
    assert op.T.shape == op.shape[::-1]
    torch.testing.assert_close(op.T.dense(), dense.T, **EXACT)
    torch.testing.assert_close(op.T.T.dense(), dense, **EXACT)
    y = torch.randn(4, op.shape[0], dtype=torch.float64)
    torch.testing.assert_close(op.T.apply(y), y @ dense, **EXACT)
    if (pair := op.factors()) is not None:
        torch.testing.assert_close(pair[0] @ pair[1], dense, **EXACT)
    frozen = filled(shell(op), iter([t.detach() for t in tensors_of(op)]))
    if (parts := frozen.narrowed()) is not None:
        torch.testing.assert_close(parts[1].dense() @ parts[0], dense.detach(), **EXACT)
    base = torch.randn(5, op.shape[0], dtype=torch.float64)
    torch.testing.assert_close(frozen.over(base.clone(), x), base + x @ dense.detach().T, **EXACT)
    assert op.flops(7) >= 0
    assert op.flops_dense(7) >= 2 * 7 * dense.numel()


@every
@pytest.mark.parametrize("way", ["apply", "columns", "transpose"])
def test_gradients_equal_those_of_the_dense_matrix(name: str, way: str) -> None:
    op, source = build(name)
    x = inputs(op, 4).requires_grad_()
    index = torch.tensor([0, op.shape[1] - 1, 0])
    y = inputs(op.T, 4).requires_grad_()
    if way == "apply":
        fast, slow, at = op.apply(x), x @ op.dense().T, x
    elif way == "columns":
        fast, slow, at = op.columns(index), op.dense().T[index], x
    else:
        fast, slow, at = op.T.apply(y), y @ op.dense(), y
    assert_same_gradients(fast, slow, [at, *source.leaves])


@pytest.mark.parametrize("name", LOW_RANK)
def test_gradients_flow_through_the_factors(name: str) -> None:
    op, source = build(name)
    pair = op.factors()
    assert pair is not None
    assert_same_gradients(pair[0] @ pair[1], op.dense(), source.leaves)


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - set(LOW_RANK)))
def test_only_matrices_of_low_rank_have_factors(name: str) -> None:
    assert build(name)[0].factors() is None


def assert_same_gradients(fast: Tensor, slow: Tensor, leaves: list[Tensor]) -> None:
    def gradients(result: Tensor) -> list[Tensor]:
        if not result.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
        grads = torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

    for mine, theirs in zip(gradients(fast), gradients(slow), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@every
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_batch_shape(name: str, batch: tuple[int, ...]) -> None:
    op, _ = build(name)
    x = inputs(op, *batch)
    for y in (op.apply(x), act(op, x)):
        assert y.shape == (*batch, op.shape[0])
        torch.testing.assert_close(y, x @ op.dense().T, **EXACT)
    index = torch.zeros(batch, dtype=torch.long)
    assert op.columns(index).shape == (*batch, op.shape[0])


@every
def test_inputs_need_not_be_contiguous(name: str) -> None:
    op, _ = build(name)
    x = inputs(op, 4, 3)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT
    assert not strided.is_contiguous() or op.shape[1] == 1
    torch.testing.assert_close(op.apply(strided), op.apply(x), **EXACT)


@every
def test_to_casts_every_floating_tensor_and_only_once(name: str) -> None:
    op, _ = build(name)
    assert op.to(torch.float64) is op
    single = op.to(torch.float32)
    assert single.dense().dtype == single.like().dtype == torch.float32
    torch.testing.assert_close(single.dense().double(), op.dense(), rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_operator(name: str, dtype: torch.dtype) -> None:
    op, _ = build(name)
    low, x = op.to(dtype), inputs(op, 4)
    close = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    expected = op.apply(x)
    size = (x.norm() * op.dense().norm()).item() + 1e-6
    for y in (low.apply(x.to(dtype)), act(low, x.to(dtype)), x.to(dtype) @ low.dense().T):
        assert y.dtype == dtype
        assert (y.double() - expected).norm().item() <= close * size
    assert low.columns(torch.tensor([0])).dtype == dtype


@every
def test_construction_and_use_compile_in_one_graph(name: str) -> None:
    op, source = build(name)
    index = torch.tensor([0])

    def use(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = SAMPLES[name](Source(replay=list(tensors)), *SIZES).to(torch.float64)
        pair = made.factors()
        rest = (pair[0] @ pair[1],) if pair is not None else ()
        return act(made, x), made.apply(x), made.dense(), made.columns(index), made.T.dense(), *rest

    torch._dynamo.reset()
    x = inputs(op, 3)
    compiled = torch.compile(use, fullgraph=True, backend="eager")(x, *source.given)
    for mine, theirs in zip(compiled, use(x, *source.given), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(("tokens", "count", "size"), [(5, 4, 3), (3, 32, 4), (6, 16, 2), (5, 3, 40), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_square_blocks_turn_in_groups(tokens, count, size, dtype):
    x = torch.randn(tokens, count * size, dtype=dtype, requires_grad=True)
    blocks = torch.randn(count, size, size, dtype=dtype, requires_grad=True)
    op = ops.BlockDiagonal(blocks)
    grad = torch.randn_like(x)
    found, wanted = op.apply(x), x @ op.dense().mT
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 0.2}
    torch.testing.assert_close(found, wanted, **tolerance)
    expected = torch.autograd.grad(wanted, (x, blocks), grad)
    torch.testing.assert_close(torch.autograd.grad(found, (x, blocks), grad), expected, **tolerance)
    pulled = op.pull(x, grad, need_x=True)
    assert pulled is not None
    assert pulled[1] is blocks
    torch.testing.assert_close((pulled[0], pulled[2]), expected, **tolerance)


def test_turning_can_be_differentiated_twice():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    blocks = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, b: ops.BlockDiagonal(b).apply(x), (x, blocks))


def test_entries_lie_onto_a_weight_as_a_sum_would():
    op = ops.Sparse(torch.tensor([[0, 2, 2], [1, 0, 0]], dtype=torch.int32), torch.randn(3, requires_grad=True), 3, 4)
    weight, grad = torch.randn(4, 3).mT, torch.randn(3, 4)
    torch.testing.assert_close(op.onto(weight), weight + op.dense())
    source, gathered = op.pull_dense(grad)
    (found,) = torch.autograd.grad(source, op.values, gathered)
    torch.testing.assert_close(found, torch.autograd.grad(op.dense(), op.values, grad)[0])


@pytest.mark.parametrize(("out", "inner"), [(6, 8), (7, 5), (1, 3)])
@pytest.mark.parametrize("kind", ["Fourier", "Wavelet"])
def test_built_transforms_know_their_gradients(kind, out, inner):
    flat = torch.randperm(out * inner)[:5]
    places, values = torch.stack(_divmod(flat, inner)), torch.randn(len(flat), dtype=torch.float64, requires_grad=True)
    filters = torch.randn(2, 4, dtype=torch.float64)
    made = {
        "Fourier": lambda: ops.Fourier(places, values, out, inner, 3.0),
        "Wavelet": lambda: ops.Wavelet(places, values, filters, out, inner, 3.0),
    }
    op, grad, weight = made[kind](), torch.randn(out, inner, dtype=torch.float64), torch.randn(out, inner).double()
    by_columns = op.apply(torch.eye(inner, dtype=torch.float64)).mT
    torch.testing.assert_close(op.dense(), by_columns, **EXACT)
    torch.testing.assert_close(op.onto(weight), weight + by_columns, **EXACT)
    source, found = op.pull_dense(grad)
    wanted = torch.autograd.grad(by_columns, values, grad)
    torch.testing.assert_close(torch.autograd.grad(source, values, found), wanted, **EXACT)


@pytest.mark.parametrize("sizes", [(8, 12), (7, 9), (12, 5), (1, 1)])
@pytest.mark.parametrize("kind", ["Fourier", "BlockCirculant"])
def test_transforms_in_chunks_equal_differentiated_ones(kind, sizes, monkeypatch):
    out, inner = sizes
    if kind == "Fourier":
        places = torch.randperm(out * inner)[:5].clamp_max(out * inner - 1)
        source = torch.randn(places.shape[0], dtype=torch.float64, requires_grad=True)
        op: Operator = ops.Fourier(torch.stack((places // inner, places % inner)), source, out, inner, 3.0)
    else:
        source = torch.randn(out, inner, 3, dtype=torch.float64, requires_grad=True)
        op = ops.BlockCirculant(source)
    monkeypatch.setattr(f"peft.operators.{'sparse' if kind == 'Fourier' else 'blocks'}.chunk", lambda *_: 2)
    x = torch.randn(5, op.shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, op.shape[0], dtype=torch.float64)
    wanted = x @ op.dense().mT
    with torch.no_grad():
        torch.testing.assert_close(op.apply(x), wanted, **EXACT)
    torch.testing.assert_close(op.apply(x), wanted, **EXACT)
    pulled = op.pull(x, grad, need_x=True)
    assert pulled is not None
    (found,) = torch.autograd.grad(pulled[1], source, pulled[2])
    torch.testing.assert_close((pulled[0], found), torch.autograd.grad(wanted, (x, source), grad), **EXACT)


def _middle() -> Operator:
    places = torch.tensor([[4, 0, 2, 2, 0], [1, 3, 0, 0, 4]])
    return ops.Sum((ops.Diagonal(_learnt(5)), ops.Sparse(places, _learnt(5), 5, 5)))


def _learnt(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _frozen(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


PULLED: dict[str, Callable[[], Operator]] = {
    "dense": lambda: ops.Dense(_learnt(4, 6)),
    "diagonal": lambda: ops.Diagonal(_learnt(6)),
    "sparse": lambda: ops.Sparse(torch.tensor([[0, 2, 2, 2], [5, 1, 1, 0]]), _learnt(4), 3, 6),
    "sparse, flat": lambda: ops.Sparse(torch.tensor([17, 3, 3], dtype=torch.int32), _learnt(3), 4, 6),
    "sum": _middle,
    "bilinear": lambda: ops.Bilinear(_frozen(5, 6), _learnt(3, 5), _frozen(4, 3), 2.0),
    "bilinear between two": lambda: ops.Bilinear(_learnt(5, 6), ops.Diagonal(_learnt(5)), _frozen(4, 5), 2.0),
    "bilinear, all of it": lambda: ops.Bilinear(_learnt(5, 6), _learnt(3, 5), _learnt(4, 3), 2.0),
    "bilinear of a sum": lambda: ops.Bilinear(_frozen(5, 6), _middle(), _frozen(4, 5), 2.0),
}


@pytest.mark.parametrize("few", [0, 16])
@pytest.mark.parametrize("name", PULLED)
def test_what_is_pulled_is_the_gradient(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.operators.sparse._FEW", few)
    monkeypatch.setattr("peft.operators.sparse._LITTLE", few)
    torch.manual_seed(0)
    op = PULLED[name]()
    out, inner = op.shape
    x, grad = _learnt(7, inner), _frozen(7, out)
    leaves = [t for t in _leaves(op) if t.requires_grad]
    matrix = op.dense()
    with torch.no_grad():
        torch.testing.assert_close(op.apply(x), x @ matrix.mT, **EXACT)
    wanted = torch.autograd.grad(x @ matrix.mT, (x, *leaves), grad, retain_graph=True)
    pulled = op.pull(x.detach(), grad, need_x=True)
    if pulled is None:
        assert few  # gathering is left to be differentiated
    else:
        back, source, found = pulled
        torch.testing.assert_close((back, *torch.autograd.grad(source, leaves, found)), wanted, **EXACT)
    source, found = op.pull_dense(grad.mT @ x.detach())
    torch.testing.assert_close(torch.autograd.grad(source, leaves, found), wanted[1:], **EXACT)


def _leaves(op: Operator) -> list[Tensor]:
    values = [getattr(op, name) for name in op.__match_args__]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [
        t
        for part in parts
        for t in ([part] if isinstance(part, Tensor) else _leaves(part) if isinstance(part, Operator) else [])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compressed_rows_know_every_dtype(dtype: torch.dtype) -> None:
    places = torch.randperm(64 * 48, generator=torch.Generator().manual_seed(0))[:1500]
    op = ops.Sparse(places, torch.randn(1500).to(dtype), 64, 48)
    x = torch.randn(2, 50, 48).to(dtype)
    assert op._sorts(x)
    y = op.apply(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ op.dense().double().mT, rtol=1e-2, atol=1e-1)
