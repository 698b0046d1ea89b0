"""Square matrices that turn: Givens, Householder, Cayley, Neumann, Butterfly."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.operators.base import Operator, eager, expect, gemm, unrecorded, widened
from peft.operators.blocks import BlockDiagonal

_RUN = 64
"""From groups of this size on, halves of groups are long enough to be worked on where they lie (measured)."""


def skew(packed: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices (..., size, size) whose strict upper triangles are `packed`, row by row.

    >>> skew(torch.tensor([1.0, 2.0, 3.0]), 3)
    tensor([[ 0.,  1.,  2.],
            [-1.,  0.,  3.],
            [-2., -3.,  0.]])
    """
    upper = packed.new_zeros(*packed.shape[:-1], size * size).index_copy(-1, _above(size, packed), packed)
    upper = upper.unflatten(-1, (size, size))
    return upper - upper.mT


_ABOVE: dict[tuple[int, torch.device], Tensor] = {}


def _above(size: int, like: Tensor) -> Tensor:
    """Where the strict upper triangle of a matrix of this size lies in its memory, row by row."""
    if not eager() or type(like) not in (Tensor, nn.Parameter):  # fake tensors meet no real ones
        return _triangle(size, like.device)
    found = _ABOVE.get((size, like.device))
    if found is None:
        with torch.inference_mode(False):
            found = _ABOVE[size, like.device] = _triangle(size, like.device)
    return found


def _triangle(size: int, device: torch.device) -> Tensor:
    rows, cols = torch.triu_indices(size, size, 1, device=device)
    return rows * size + cols


def cayley(q: Tensor) -> Tensor:
    """The Cayley transform `(I - Q) (I + Q)^-1` of skew-symmetric matrices (..., n, n): rotations."""
    wide = widened(q)
    eye = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    return torch.linalg.solve(eye + wide, eye - wide).to(q.dtype)


def neumann(q: Tensor, terms: int = 5) -> Tensor:
    """The first `terms` of the Neumann series of `(I + Q) (I - Q)^-1`: I + 2Q + ... + 2Q^(terms-2) + Q^(terms-1).

    Close to the Cayley transform of -Q where Q is small; it needs no linear solve.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms <= 2:
        return eye + (q if terms == 2 else 2 * q)
    # By Horner's rule in Q², which takes half of the products: (I + 2Q) + Q² ((2I + 2Q) + Q² (...)).
    square, last = q @ q, terms - 1
    inner = _line(eye, q, last - 1, last) if last % 2 else _line(eye, q, last - 2, last).add_(square)
    for power in range(last - 3 - (last + 1) % 2, -1, -2):
        line = _line(eye, q, power, last)
        inner = torch.baddbmm(line, square, inner) if q.dim() == 3 else line + square @ inner
    return inner


def _line(eye: Tensor, q: Tensor, power: int, last: int) -> Tensor:
    """The terms of the series in Q^power and the next, without what they share."""
    return torch.add(2 * eye if power else eye, q, alpha=1 if power + 1 == last else 2)


@dataclass(frozen=True, eq=False)
class _SkewRotation(Operator):
    """Rotations along the diagonal, each made of one skew-symmetric matrix; abstract in how it is made."""

    packed: Tensor
    size: int
    count: int
    brief = True

    def __post_init__(self) -> None:
        fits = self.packed.shape[0] in (1, self.count) and self.packed.shape[1] == self.size * (self.size - 1) // 2
        expect(fits, self, "packed is (count, size (size - 1) / 2), or (1, ...) for one block that all share")

    @abstractmethod
    def rotations(self) -> Tensor:
        """The blocks, (count, size, size)."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.count * self.size, self.count * self.size

    def _blocks(self) -> BlockDiagonal:
        return BlockDiagonal(self.rotations().expand(self.count, self.size, self.size))

    def apply(self, x: Tensor) -> Tensor:
        return self._blocks().apply(x)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        return self._blocks().pull(x, grad, need_x)

    def dense(self) -> Tensor:
        return self._blocks().dense()

    @property
    def T(self) -> _SkewRotation:
        return replace(self, packed=-self.packed)

    def _flops_blocks(self) -> float:
        return 8.0 * self.packed.shape[0] * self.size**3

    def flops(self, tokens: int) -> float:
        return self._flops_blocks() + gemm(tokens * self.count, self.size, self.size)

    def flops_dense(self, tokens: int) -> float:
        return self._flops_blocks() + gemm(tokens, *self.shape)


@dataclass(frozen=True, eq=False)
class Cayley(_SkewRotation):
    """Exact block rotations `(I - Q) (I + Q)^-1` (OFT, arXiv 2306.07280; PSOFT).

    `packed` (count, size (size - 1) / 2) holds the strict upper triangles of the blocks of Q, row by row; (1, ...)
    is one block that all `count` positions share. The transpose is the same with -Q.
    """

    def rotations(self) -> Tensor:
        return cayley(skew(self.packed, self.size))


@dataclass(frozen=True, eq=False)
class Neumann(_SkewRotation):
    """Nearly rotations: the first `terms` of the series of `(I + Q) (I - Q)^-1` (OFTv2, arXiv 2506.19847).

    The fields are those of `Cayley`. Mind the sign: it is the Cayley transform of -Q that the series approaches.
    """

    terms: int = 5

    def rotations(self) -> Tensor:
        return neumann(widened(skew(self.packed, self.size)), self.terms).to(self.packed.dtype)


@dataclass(frozen=True, eq=False)
class Butterfly(Operator):
    """A product of block-diagonal matrices, each in its own order of the coordinates: BOFT (arXiv 2311.06243).

    Factor i is `P D P.T`, with `blocks[i]` along the diagonal of D and `(P x)[j] = x[order[i, j]]`; factor 0 acts
    first. Shapes: `blocks` (m, n / b, b, b); `order` (m, n), integer permutations.
    """

    blocks: Tensor
    order: Tensor

    def __post_init__(self) -> None:
        stages, count, out, inner = self.blocks.shape
        fits = out == inner and tuple(self.order.shape) == (stages, count * inner)
        expect(fits, self, "blocks (m, n / b, b, b) are square and order is (m, n)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.order.shape[1], self.order.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        for blocks, order in zip(self.blocks, self.order, strict=True):
            x = BlockDiagonal(blocks).apply(x[..., torch.argsort(order)])[..., order]
        return x

    @property
    def T(self) -> Butterfly:
        return Butterfly(self.blocks.flip(0).mT, self.order.flip(0))

    def flops(self, tokens: int) -> float:
        stages, count, size, _ = self.blocks.shape
        return gemm(tokens * stages * count, size, size)


@dataclass(frozen=True, eq=False)
class Givens(Operator):
    """Scaled rotations of pairs of coordinates: RoAd (arXiv 2409.00119).

    Inside every `group` of coordinates, i is paired with j = i + group / 2:
    `y[i] = cos[i] x[i] - sin[i] x[j]` and `y[j] = sin[j] x[i] + cos[j] x[j]`. Shapes: `cos` and `sin` (n,); the group
    is even and divides n. It is a rotation where cos and sin are those of one angle per pair.
    """

    cos: Tensor
    sin: Tensor
    group: int

    def __post_init__(self) -> None:
        fits = self.cos.shape == self.sin.shape and self.group % 2 == 0 and self.cos.shape[0] % self.group == 0
        expect(fits, self, "cos and sin have one shape (n,), the group is even and divides n")

    @property
    def shape(self) -> tuple[int, int]:
        return self.cos.shape[0], self.cos.shape[0]

    @property
    def reach(self) -> int:
        return self.group

    def _swap(self, x: Tensor) -> Tensor:
        """The halves of every group exchanged."""
        return x.unflatten(-1, (-1, 2, self.group // 2)).flip(-2).flatten(-3)

    def apply(self, x: Tensor) -> Tensor:
        first, second = self.sin.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        if self.group >= _RUN and unrecorded(x, self.cos, self.sin):
            y = x * self.cos
            pairs, seen = (t.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2) for t in (y, x))
            pairs[0].addcmul_(seen[1], first, value=-1)
            pairs[1].addcmul_(seen[0], second)
            return y
        return torch.addcmul(x * self.cos, self._swap(x), torch.stack((-first, second), dim=-2).flatten())

    @property
    def T(self) -> Givens:
        return Givens(self.cos, -self._swap(self.sin), self.group)

    def flops(self, tokens: int) -> float:
        return 4.0 * tokens * self.cos.shape[0]


@dataclass(frozen=True, eq=False)
class Householder(Operator):
    """The product `H_0 H_1 ... H_(r-1)` of reflections `H_i = I - 2 u_i u_i.T / |u_i|^2`: HRA (arXiv 2405.17484).

    It is kept in WY form, `I - U T U.T` with `T^-1 = triu(U.T U, 1) + I / 2` for columns of length one, so a token
    costs two thin products and nothing of the size n x n is built. Shapes: `u` (n, r).
    """

    u: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.u.shape[0]

    def _wy(self) -> tuple[Tensor, Tensor]:
        """U (n, r) with columns of length one, and T (r, r)."""
        u = F.normalize(widened(self.u), dim=0)
        eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        t = torch.linalg.solve_triangular(torch.triu(u.mT @ u, 1) + eye / 2, eye, upper=True)
        return u.to(self.u.dtype), t.to(self.u.dtype)

    def apply(self, x: Tensor) -> Tensor:
        u, t = self._wy()
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(flat, flat @ u, (u @ t).mT, alpha=-1).view(x.shape)

    def dense(self) -> Tensor:
        u, t = self._wy()
        return torch.eye(u.shape[0], dtype=u.dtype, device=u.device) - u @ t @ u.mT

    @property
    def T(self) -> Householder:
        return Householder(self.u.flip(1))

    def _flops_wy(self) -> float:
        size, rank = self.u.shape
        return gemm(size, rank, rank) + rank**3

    def flops(self, tokens: int) -> float:
        size, rank = self.u.shape
        return self._flops_wy() + gemm(tokens + rank, size, rank) + gemm(tokens, size, rank)

    def flops_dense(self, tokens: int) -> float:
        size, rank = self.u.shape
        return self._flops_wy() + gemm(size, rank, rank) + gemm(size, size, rank) + gemm(tokens, size, size)
