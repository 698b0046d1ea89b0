"""Sums of low-rank matrices that stay factored.

A change of a weight is `ΔW = B @ A` with A (blocks, rank, in) and B (blocks, out, rank). One block is a plain layer; a
grouped convolution has a block per group, a stack of experts one per expert. Adding such changes is concatenation, and
cutting the sum to a rank is two QR decompositions and the SVD of a small core, so nothing of size (out, in) is ever
made: for a 4096 × 14336 layer and sixteen ranks, the sum costs 2 MB where the dense matrix costs 235.

    >>> import torch
    >>> one = Factors(torch.randn(4, 30), torch.randn(20, 4))
    >>> two = one.scaled(-0.5)
    >>> total, error = recompress([one, two])          # two terms over one row space: rank 4 holds the sum
    >>> total.rank, error < 1e-6
    (4, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft.errors import ConfigError

_CLEARLY = 1e-5
"""A share of ‖B‖‖A‖ that stands above the rounding of float32, and in float64 above that of Gram matrices."""


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64, or float32 on devices that have no float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Factors:
    """`ΔW = B @ A`, block by block. A (blocks, rank, in), B (blocks, out, rank); 2-D tensors are one block."""

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.dim() == 2:
            object.__setattr__(self, "A", self.A.unsqueeze(0))
        if self.B.dim() == 2:
            object.__setattr__(self, "B", self.B.unsqueeze(0))
        a, b = self.A.shape, self.B.shape
        if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2]:
            raise ConfigError(
                f"A {tuple(a)} and B {tuple(b)} do not multiply: expected (blocks, rank, in) and (blocks, out, rank)."
            )

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, out, in) of the change."""
        return self.A.shape[0], self.B.shape[1], self.A.shape[2]

    def scaled(self, weight: float) -> Factors:
        """The change times `weight` (of any sign)."""
        return Factors(self.A, self.B * weight)

    def to(self, *args, **kwargs) -> Factors:
        return Factors(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs))

    def dense(self) -> Tensor:
        """The change itself, (blocks, out, in)."""
        return self.B @ self.A

    def norm(self) -> float:
        """Frobenius norm, without the dense matrix. NaN on the meta device.

        ‖BA‖² = Σ BᵀB ∘ AAᵀ, whose digits are lost where the ranks cancel; there, the triangular factors give it.
        """
        if self.A.is_meta or self.B.is_meta:
            return math.nan
        A, B = wide(self.A), wide(self.B)
        gram = (B.mT @ B) * (A @ A.mT)
        square = float(gram.sum())
        pieces = float(gram.diagonal(dim1=1, dim2=2).sqrt().sum(1).square().sum())  # if all ranks added up
        if square > pieces * torch.finfo(A.dtype).eps ** 0.5:
            return math.sqrt(square)
        return float(torch.linalg.vector_norm(_core(self)[1]))

    def padded(self, rank: int) -> Factors:
        """The same change written with `rank` ranks, the new ones zero."""
        (blocks, out, n), more = self.shape, rank - self.rank
        if more < 0:
            raise ConfigError(f"A change of rank {self.rank} can't be padded to rank {rank}: it would be cut.")
        if more == 0:
            return self
        return Factors(
            torch.cat([self.A, self.A.new_zeros(blocks, more, n)], 1),
            torch.cat([self.B, self.B.new_zeros(blocks, out, more)], 2),
        )


def stack(terms: Sequence[Factors]) -> Factors:
    """The exact sum of `terms`, by concatenation; its rank is the sum of their ranks."""
    shapes = {t.shape for t in terms}
    if len(shapes) != 1:
        raise ConfigError(f"Only changes of one shape can be added, got {sorted(shapes)} as (blocks, out, in).")
    return Factors(torch.cat([t.A for t in terms], 1), torch.cat([t.B for t in terms], 2))


def _core(f: Factors) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Orthonormal bases (left, right) and the small core with `ΔW = left @ core @ rightᵀ`."""
    left, up = torch.linalg.qr(wide(f.B))
    right, down = torch.linalg.qr(wide(f.A).mT)
    return (left, right), up @ down.mT


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference of two changes, without a dense matrix.

    BA − B'A' = (B − B')A + B'(A − A'): where the factors are close, so that one is the other cut or rounded, no digits
    are lost.
    """
    rank = max(one.rank, other.rank)
    one, other = (Factors(wide(f.A), wide(f.B)).padded(rank) for f in (one, other))
    return Factors(torch.cat([one.A, one.A - other.A], 1), torch.cat([one.B - other.B, other.B], 2)).norm()


def balanced(u: Tensor, s: Tensor, vh: Tensor, clamp: float | None = None) -> Factors:
    """B = U√S and A = √S Vᵀ: both factors have the same norm, which is what further training wants.

    With `clamp` in (0, 1], entries of both are clamped to ± that quantile of all of them.
    """
    root = s.clamp_min(0).sqrt()
    # A rank with no energy keeps its direction in A: with both factors zero it could never be trained again.
    factors = Factors(torch.where(root > 0, root, 1.0).unsqueeze(-1) * vh, u * root.unsqueeze(-2))
    return factors if clamp is None else clamped(factors, clamp)


def clamped(factors: Factors, quantile: float) -> Factors:
    """Entries of A and B clamped to ± the given quantile of all of them."""
    high = torch.quantile(torch.cat([factors.B.flatten(), factors.A.flatten()]), quantile)
    return Factors(factors.A.clamp(-high, high), factors.B.clamp(-high, high))


def frobenius(tensor: Tensor) -> float:
    """‖tensor‖, summed in float64 where the device has it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(wide(tensor[:0]).dtype, tensor.dtype)))


def relative(error: float, norm: float) -> float:
    """error / norm, and 0 where there is nothing to approximate."""
    return error / norm if norm else 0.0


def numerical_rank(s: Tensor, dtype: torch.dtype) -> int:
    """How many of the singular values s (..., k), largest first, stand above the rounding of `dtype`; at least 1."""
    if s.is_meta:
        return s.shape[-1]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return max(1, int((s > s[..., :1] * eps).sum(-1).max()))


def energy_rank(s: Tensor, energy: float) -> int:
    """The smallest rank whose singular values s (k,) carry the share `energy` in (0, 1] of ‖ΔW‖²."""
    if not 0.0 < energy <= 1.0:
        raise ConfigError(f"A rank given as a float is a share of the energy and lies in (0, 1], got {energy}.")
    total = s.square().cumsum(0)
    if s.is_meta or total[-1] == 0:
        return 1 if not s.is_meta else s.shape[0]
    reached = total >= energy * total[-1]
    return int(reached.nonzero()[0]) + 1 if energy < 1.0 else numerical_rank(s, s.dtype)


def check_rank(rank: int | float | None) -> None:
    """Refuse a rank that is neither None, an integer >= 1, nor a share of the energy in (0, 1]."""
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return
    if isinstance(rank, float) and 0.0 < rank <= 1.0:
        return
    raise ConfigError(f"rank is an integer >= 1, a share of the energy in (0, 1] as a float, or None; got {rank!r}.")


def choose_rank(s: Tensor, rank: int | float | None, dtype: torch.dtype) -> int:
    """The number of singular values s (blocks, k) to keep: `rank` of them, a share of the energy, or (None) all."""
    check_rank(rank)
    if rank is None:
        return numerical_rank(s, dtype)
    if isinstance(rank, float):
        return max(energy_rank(block, rank) for block in s)
    return min(rank, s.shape[-1])


def recompress(
    terms: Sequence[Factors],
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    clamp: float | None = None,
) -> tuple[Factors, float]:
    """The best approximation of a sum of changes by one change of the given rank (Eckart–Young, per block).

    Args:
        terms: the changes to add, of one shape (blocks, out, in).
        rank: the rank of the result; a float in (0, 1] is the share of ‖ΔW‖² to keep; None is the smallest rank that
            holds the sum exactly.
        dtype: of the result; default: the promoted dtype of the terms.
        clamp: see `balanced`.

    Returns:
        The factors, and the measured relative error ‖sum − result‖ / ‖sum‖ (Frobenius), which includes the rounding to
        `dtype`. It is NaN on the meta device.
    """
    total = stack([Factors(wide(t.A), wide(t.B)) for t in terms])
    factors, error, _ = compress(total, rank, dtype or result_dtype(terms), clamp)
    return factors, error


def compress(
    total: Factors, rank: int | float | None, dtype: torch.dtype, clamp: float | None = None
) -> tuple[Factors, float, float]:
    """`recompress` for one change, with the factors in float64: the new ones, their relative error, and ‖total‖."""
    loses_none = rank is None or (isinstance(rank, int) and rank >= total.rank)
    if loses_none and (found := _independent(total)) is not None:
        even, norm = found
        result = _cut(even, even.rank, dtype, clamp)
        return result, relative(distance(even, result), norm), norm
    (left, right), core = _core(total)
    if total.A.is_meta:
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        keep = choose_rank(s, rank, dtype)
        return _cut(balanced(left @ u, s, vh @ right.mT), keep, dtype, clamp), math.nan, math.nan
    norm = float(torch.linalg.vector_norm(core))
    if norm <= _rounding(total):
        core, norm = torch.zeros_like(core), 0.0  # the terms cancel: noise has no directions worth a rank
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    whole = balanced(left @ u, s, vh @ right.mT)
    result = _cut(whole, choose_rank(s, rank, dtype), dtype, clamp)
    return result, distance(whole, result) / norm if norm else 0.0, norm


def _independent(f: Factors) -> tuple[Factors, float] | None:
    """The same ranks, each with as much norm in A as in B, and ‖BA‖; None unless no fewer of them hold the change.

    σₖ(BA) ≥ σₖ(B) σₖ(A) ≥ 1 / (‖L⁻¹‖ ‖M⁻¹‖) with the Cholesky factors L of BᵀB and M of AAᵀ (k ranks).
    """
    if f.A.is_meta or f.rank > min(f.shape[1:]):
        return None
    grams = torch.stack([f.B.mT @ f.B, f.A @ f.A.mT])
    squares = grams.diagonal(dim1=2, dim2=3)
    root = (squares[0] / squares[1]).pow(0.25)
    both = root[:, :, None] * root[:, None, :]
    lower, failed = torch.linalg.cholesky_ex(torch.stack([grams[0] / both, grams[1] * both]))
    if failed.any():
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(f.rank, dtype=root.dtype, device=root.device), upper=False)
    lost = torch.linalg.vector_norm(inverse, dim=(2, 3)).prod(0)
    most = (squares[0] * squares[1]).sqrt().sum(1)  # ‖B‖‖A‖ of the even factors, no less than σ₁
    if not (lost * most * _CLEARLY < 1).all():
        return None
    return Factors(f.A * root[..., None], f.B / root[:, None]), math.sqrt(float((grams[0] * grams[1]).sum()))


def _cut(whole: Factors, rank: int, dtype: torch.dtype, clamp: float | None) -> Factors:
    """The first ranks of balanced factors."""
    kept = Factors(whole.A[:, :rank], whole.B[..., :rank])
    return (kept if clamp is None else clamped(kept, clamp)).to(dtype)


def _rounding(f: Factors) -> float:
    """The size of the rounding errors in `f.B @ f.A` when the product cancels."""
    eps = torch.finfo(f.A.dtype).eps
    return 4 * eps * float(torch.linalg.vector_norm(f.A)) * float(torch.linalg.vector_norm(f.B))


def result_dtype(terms: Sequence[Factors]) -> torch.dtype:
    """The dtype that the factors of all `terms` promote to."""
    dtype = terms[0].A.dtype
    for t in terms:
        dtype = torch.promote_types(torch.promote_types(dtype, t.A.dtype), t.B.dtype)
    return dtype


def truncate(
    delta: Tensor,
    rank: int | float | None,
    dtype: torch.dtype | None = None,
    clamp: float | None = None,
    driver: str | None = None,
) -> tuple[Factors, float]:
    """A dense change (out, in) as factors, with the measured relative error.

    A small rank of a large matrix is found by subspace iteration, run until the captured energy stands still to 1e-7
    of ‖ΔW‖²; everything else by a full SVD. Both are deterministic.

    Args:
        delta: (out, in), of any float dtype; computed in float32, or float64 if it is float64.
        rank: an integer, a share of the energy in (0, 1], or None for all that stands above rounding.
        dtype: of the result; default: that of `delta`.
        clamp: see `balanced`.
        driver: of `torch.linalg.svd`, on CUDA only.
    """
    check_rank(rank)
    dtype = dtype or delta.dtype
    work = delta.detach() if delta.dtype == torch.float64 else delta.detach().float()
    if isinstance(rank, int) and 8 * rank <= min(work.shape) and min(work.shape) >= 256 and not work.is_meta:
        u, s, vh = _leading(work, rank)
    else:
        u, s, vh = torch.linalg.svd(work, full_matrices=False, driver=driver if work.is_cuda else None)
    keep = choose_rank(s.unsqueeze(0), rank, work.dtype)
    result = balanced(u[:, :keep], s[:keep], vh[:keep], clamp).to(dtype)
    if delta.is_meta:
        return result, math.nan
    residual = torch.addmm(work, result.B[0].to(work.dtype), result.A[0].to(work.dtype), alpha=-1.0)
    return result, relative(frobenius(residual), frobenius(work))


def truncate_blocks(
    blocks: Iterable[Tensor],
    rank: int | float | None,
    dtype: torch.dtype | None = None,
    clamp: float | None = None,
    driver: str | None = None,
) -> tuple[Factors, float, float]:
    """`truncate` for the dense blocks of one change, one at a time: factors, their relative error, and ‖ΔW‖."""
    parts, lost, norms = [], 0.0, 0.0
    for block in blocks:
        part, error = truncate(block, rank, dtype, clamp, driver)
        norm = frobenius(block)
        parts.append(part)
        lost, norms = lost + (error * norm) ** 2, norms + norm**2
    most = max(part.rank for part in parts)
    padded = [part.padded(most) for part in parts]
    whole = Factors(torch.cat([p.A for p in padded]), torch.cat([p.B for p in padded]))
    return whole, relative(math.sqrt(lost), math.sqrt(norms)), math.sqrt(norms)


def _leading(delta: Tensor, rank: int, most: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of `delta` by subspace iteration with twice as many vectors."""
    width = min(2 * rank + 8, *delta.shape)
    start = torch.randn(delta.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=delta.dtype)
    left = torch.linalg.qr(delta @ start.to(delta.device)).Q
    whole, caught = float(delta.square().sum(dtype=torch.float64)), -1.0
    for _ in range(most):
        right = torch.linalg.qr(delta.mT @ left).Q
        image = delta @ right
        left, small = torch.linalg.qr(image)
        now = float(torch.linalg.svdvals(small)[:rank].square().sum(dtype=torch.float64))
        if now - caught <= 1e-7 * whole:
            break
        caught = now
    u, s, vh = torch.linalg.svd(left.mT @ delta, full_matrices=False)
    return left @ u[:, :rank], s[:rank], vh[:rank]
