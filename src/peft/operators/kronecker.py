"""Products of small matrices entry by entry: Kronecker, and the Hadamard product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.operators.base import Operator, Scale, act, cheapest, chunk, eager, expect, gemm, scaled
from peft.operators.plain import as_operator


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """`scale * kron(left, right)`, the matrix of LoKr (LyCORIS, arXiv 2309.14859).

    A vector of length p q is read as a p x q matrix X, and the result is `left @ X @ right.T`: nothing of the size of
    the whole matrix is built. `left` (l, p) and `right` (k, q) are tensors or operators; the shape is (l k, p q).
    """

    left: Tensor | Operator
    right: Tensor | Operator
    scale: Scale = 1.0
    brief = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def _dense_left(self) -> Tensor:
        return self.left.dense() if isinstance(self.left, Operator) else self.left

    def apply(self, x: Tensor) -> Tensor:
        left, right = scaled(self._dense_left(), self.scale), as_operator(self.right)
        grid = x.unflatten(-1, (left.shape[1], right.shape[1]))
        left_first, right_first = self._orders(1)
        y = act(right, left @ grid) if left_first < right_first else left @ act(right, grid)
        return y.flatten(-2)

    def dense(self) -> Tensor:
        # not torch.kron, which fails on transposed factors
        left, right = scaled(self._dense_left(), self.scale), as_operator(self.right).dense()
        return (left[:, None, :, None] * right[None, :, None, :]).reshape(self.shape)

    def columns(self, index: Tensor) -> Tensor:
        right = as_operator(self.right)
        inner = right.shape[1]
        left = F.embedding(index // inner, scaled(self._dense_left(), self.scale).mT)
        return (left[..., :, None] * right.columns(index % inner)[..., None, :]).flatten(-2)

    @property
    def T(self) -> Kronecker:
        return Kronecker(self._dense_left().mT, as_operator(self.right).T, self.scale)

    def _orders(self, tokens: int) -> tuple[float, float]:
        """Operations with the left factor first, and with the right one first."""
        right, ((rows, cols), (out, inner)) = as_operator(self.right), (self.left.shape, self.right.shape)
        left_first = gemm(tokens * inner, rows, cols) + cheapest(right, tokens * rows)
        return left_first, cheapest(right, tokens * cols) + gemm(tokens * out, rows, cols)

    def flops(self, tokens: int) -> float:
        return min(self._orders(tokens))

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        return as_operator(self.right).flops_dense(0) + out * inner + gemm(tokens, out, inner)


@dataclass(frozen=True, eq=False)
class HadamardLowRank(Operator):
    """`scale * (up1 @ down1) * (up2 @ down2)`, entry by entry: LoHa (FedPara, arXiv 2108.06098).

    The product has rank r s at most, with the Khatri-Rao products of the factors as its thin factors; `apply` uses
    them while they are cheaper than the matrix.

    Shapes: `up1` (out, r), `down1` (r, in), `up2` (out, s), `down2` (s, in).
    """

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: Scale = 1.0
    brief = True

    def __post_init__(self) -> None:
        fits = self.up1.shape[1] == self.down1.shape[0] and self.up2.shape[1] == self.down2.shape[0]
        same = self.up1.shape[0] == self.up2.shape[0] and self.down1.shape[1] == self.down2.shape[1]
        expect(fits and same, self, "up1 @ down1 and up2 @ down2 are two products of one shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up1.shape[0], self.down1.shape[1]

    @property
    def _rank(self) -> int:
        return self.up1.shape[1] * self.up2.shape[1]

    def _khatri_rao(self) -> tuple[Tensor, Tensor]:
        up = (self.up1[:, :, None] * self.up2[:, None, :]).flatten(1)
        down = (scaled(self.down1, self.scale)[:, None, :] * self.down2[None, :, :]).flatten(0, 1)
        return up, down

    def apply(self, x: Tensor) -> Tensor:
        tokens = x.shape[:-1].numel()
        if self._flops_thin(tokens) > self.flops_dense(tokens):
            return F.linear(x, self.dense())
        up, down = self._khatri_rao()
        return F.linear(F.linear(x, down), up)

    def dense(self) -> Tensor:
        first, second = self.up1 @ scaled(self.down1, self.scale), self.up2 @ self.down2
        return first * second if torch.is_grad_enabled() else first.mul_(second)

    def onto(self, weight: Tensor) -> Tensor:
        down = scaled(self.down1, self.scale)
        if torch.is_grad_enabled() or not eager():
            return torch.addcmul(weight, self.up1 @ down, self.up2 @ self.down2)
        # In chunks of rows that stay in the cache, into the one new matrix: fresh memory costs more than the products.
        y, rows = torch.empty_like(weight, memory_format=torch.contiguous_format), chunk(weight, weight.shape[1])
        for into, w, up1, up2 in zip(*(t.split(rows) for t in (y, weight, self.up1, self.up2)), strict=True):
            torch.addcmul(w, torch.mm(up1, down, out=into), up2 @ self.down2, out=into)
        return y

    def columns(self, index: Tensor) -> Tensor:
        first = F.linear(F.embedding(index, self.down1.mT), self.up1)
        return scaled(first, self.scale) * F.linear(F.embedding(index, self.down2.mT), self.up2)

    @property
    def T(self) -> HadamardLowRank:
        return HadamardLowRank(self.down1.mT, self.up1.mT, self.down2.mT, self.up2.mT, self.scale)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self._khatri_rao() if self._rank < min(self.shape) else None

    def _flops_thin(self, tokens: int) -> float:
        return (1 + 2.0 * tokens) * self._rank * sum(self.shape)

    def flops(self, tokens: int) -> float:
        return min(self._flops_thin(tokens), self.flops_dense(tokens))

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        return gemm(out, inner, self.up1.shape[1] + self.up2.shape[1]) + out * inner + gemm(tokens, out, inner)
