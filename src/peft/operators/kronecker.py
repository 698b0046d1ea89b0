"""Products entry by entry: Kronecker, and Hadamard products with thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.operators.base import Operator, Scale, act, cheapest, chunk, eager, expect, gemm, picked, scaled, sources
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
        first = F.linear(picked(self.down1, index), self.up1)
        return scaled(first, self.scale) * F.linear(picked(self.down2, index), self.up2)

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


@dataclass(frozen=True, eq=False)
class Modulated(Operator):
    """`weight * (up @ down) + up2 @ down2`: a product entry by entry (HiRA), and one added (GLoRA).

    Shapes: `up` (out, r), `down` (r, in); `weight` (out, in), which is a constant; `up2` (out, q), `down2` (q, in) or
    neither.
    """

    up: Tensor
    down: Tensor
    weight: Tensor
    up2: Tensor | None = None
    down2: Tensor | None = None
    brief = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def _second(self) -> int:
        return 0 if self.up2 is None else self.up2.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        # weight * (u ⊗ d) is diag(u) weight diag(d), for each column of `up` and row of `down`
        turned = F.linear(x[..., None, :] * self.down, self.weight)
        y = (turned * self.up.mT).sum(-2)
        return y if self.up2 is None else y + F.linear(F.linear(x, self.down2), self.up2)  # type: ignore[arg-type]

    def dense(self) -> Tensor:
        return self._added(self._product())

    def onto(self, weight: Tensor) -> Tensor:
        return self._added(self._product().add_(weight))

    def _product(self) -> Tensor:
        # In place, since fresh memory costs more than the operations; and in the layout of the weight, or a product of
        # rows with columns would take five times as long.
        up, down = self.up, self.down
        return (up @ down if self.weight.is_contiguous() else (down.mT @ up.mT).mT).mul_(self.weight)

    def _added(self, product: Tensor) -> Tensor:
        up, down = self.up2, self.down2
        return product if up is None else product.addmm_(up.to(product.dtype), down.to(product.dtype))  # type: ignore[union-attr]

    def columns(self, index: Tensor) -> Tensor:
        factor = F.linear(picked(self.down, index), self.up)
        y = F.embedding(index, self.weight.mT) * factor
        return y if self.up2 is None else y + F.linear(picked(self.down2, index), self.up2)  # type: ignore[arg-type]

    @property
    def T(self) -> Modulated:
        second = () if self.up2 is None else (self.down2.mT, self.up2.mT)  # type: ignore[union-attr]
        return Modulated(self.down.mT, self.up.mT, self.weight.mT, *second)

    def pull_dense(self, grad: Tensor) -> tuple[Any, Any]:
        with torch.no_grad():
            inner = grad * self.weight
            pairs = [(self.up, inner @ self.down.mT), (self.down, self.up.mT @ inner)]
            if self.up2 is not None and self.down2 is not None:
                pairs += (self.up2, grad @ self.down2.mT), (self.down2, self.up2.mT @ grad)
            return sources(*pairs)

    def flops(self, tokens: int) -> float:
        return gemm(tokens * self.up.shape[1], *self.shape) + gemm(tokens, self._second, sum(self.shape))

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        ranks = self.up.shape[1] + self._second
        # The factors are so thin that it is writing the products that costs.
        return gemm(out, inner, ranks) + 40.0 * out * inner + gemm(tokens, out, inner)
