"""Matrices that are thin products: LowRank, Bilinear and the doubly scaled product of VeRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.operators.base import Operator, Scale, Transposed, act, cheapest, expect, gemm, picked, scaled
from peft.operators.compose import Product, Scaled
from peft.operators.plain import Dense, Diagonal, as_operator


@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """`scale * up @ down`, the matrix of LoRA (arXiv 2106.09685).

    With `groups` > 1 it is the weight of a grouped convolution: the r rows of `down` and the rows of `up` are split
    in as many blocks, and block j of the result is `up_j @ down_j`.

    Shapes: `down` (r, in); `up` (out, r / groups); for a grouped convolution `in` counts one group's inputs.
    """

    down: Tensor
    up: Tensor
    scale: Scale = 1.0
    groups: int = 1

    def __post_init__(self) -> None:
        fits = self.up.shape[1] * self.groups == self.down.shape[0] and self.up.shape[0] % self.groups == 0
        expect(fits, self, "down (r, in) and up (out, r / groups) share r, and groups divides out")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return self.raised(F.linear(x, self.down))

    def dense(self) -> Tensor:
        down = scaled(self.down, self.scale)
        if self.groups == 1:
            return self.up @ down
        blocks = self.up.unflatten(0, (self.groups, -1)) @ down.unflatten(0, (self.groups, -1))
        return blocks.flatten(0, 1)

    def onto(self, weight: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            return weight + self.dense()
        if self.groups == 1:
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)
        blocks = (t.unflatten(0, (self.groups, -1)) for t in (weight, self.up, self.down))
        return torch.baddbmm(*blocks, alpha=self.scale).flatten(0, 1)

    def raised(self, h: Tensor) -> Tensor:
        """What the second product makes of h (…, r), in its dtype."""
        h, up = scaled(h, self.scale), self.up.to(h.dtype)
        if self.groups == 1:
            return F.linear(h, up)
        rank, up = up.shape[1], up.unflatten(0, (self.groups, -1))
        return torch.einsum("...gr,gor->...go", h.unflatten(-1, (self.groups, rank)), up).flatten(-2)

    def columns(self, index: Tensor) -> Tensor:
        return self.raised(picked(self.down, index))

    @property
    def T(self) -> Operator:
        return LowRank(self.up.mT, self.down.mT, self.scale) if self.groups == 1 else Transposed(self)

    def narrowed(self) -> tuple[Tensor, Operator] | None:
        learns = self.down.requires_grad or self.groups > 1
        return None if learns else (self.down, Dense(scaled(self.up, self.scale)))

    def factors(self) -> tuple[Tensor, Tensor]:
        up = self.up if self.groups == 1 else torch.block_diag(*self.up.chunk(self.groups))
        return up, scaled(self.down, self.scale)

    def flops(self, tokens: int) -> float:
        return gemm(tokens, self.down.shape[0], self.down.shape[1]) + gemm(tokens, *self.up.shape)

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        return gemm(out, inner, self.up.shape[1]) + gemm(tokens, out, inner)


@dataclass(frozen=True, eq=False)
class Bilinear(Operator):
    """`scale * up @ middle @ down`, where only the small middle learns (TinyLoRA, PSOFT, LoRA-XS).

    Shapes: `down` (r, in); `middle` (k, r), a tensor or an operator; `up` (out, k).
    """

    down: Tensor
    middle: Tensor | Operator
    up: Tensor
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        fits = tuple(self.middle.shape) == (self.up.shape[1], self.down.shape[0])
        expect(fits, self, "down (r, in), middle (k, r) and up (out, k) form a product")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def keeps(self, x: Tensor) -> bool:
        # The projection of x, before and after it is scaled. In 16 bits making it again is cheap.
        return isinstance(self.middle, Diagonal) and x.element_size() >= 4

    def _low_rank(self) -> LowRank:
        # the r x k middle goes to the input side, so that the tokens see two thin products and not three
        return LowRank(act(as_operator(self.middle), self.down.mT).mT, self.up, self.scale)

    def apply(self, x: Tensor) -> Tensor:
        return self._up(F.linear(x, self.down))

    def _up(self, h: Tensor) -> Tensor:
        return F.linear(scaled(act(as_operator(self.middle), h), self.scale), self.up)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if isinstance(self.scale, Tensor):
            return None
        middle, down, up = as_operator(self.middle), self.down.detach(), self.up.detach()
        hidden = F.linear(x, down)
        pulled = middle.pull(hidden, scaled(grad @ up, self.scale), need_x or self.down.requires_grad)
        if pulled is None:
            return None
        back, *ways = pulled
        found = [tuple(ways)]
        if self.down.requires_grad:
            found.append((self.down, back.mT @ x))  # type: ignore[union-attr]
        if self.up.requires_grad:
            with torch.no_grad():
                found.append((self.up, grad.mT @ scaled(act(middle, hidden), self.scale)))
        source, pull = (
            found[0] if len(found) == 1 else (torch.cat([t.flatten() for t in way]) for way in zip(*found, strict=True))
        )
        return back @ down if need_x else None, source, pull  # type: ignore[operator]

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.down.requires_grad or self.up.requires_grad or isinstance(self.scale, Tensor):
            return super().pull_dense(grad)
        return as_operator(self.middle).pull_dense(scaled(self.up.mT @ grad @ self.down.mT, self.scale))

    def dense(self) -> Tensor:
        return self._low_rank().dense()

    def columns(self, index: Tensor) -> Tensor:
        return self._up(picked(self.down, index))

    @property
    def T(self) -> Bilinear:
        middle = self.middle.T if isinstance(self.middle, Operator) else self.middle.mT
        return Bilinear(self.up.mT, middle, self.down.mT, self.scale)

    def narrowed(self) -> tuple[Tensor, Operator] | None:
        if self.down.requires_grad:
            return None
        rest = Product(Dense(self.up), as_operator(self.middle))
        return self.down, Scaled(rest, self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._low_rank().factors()

    def flops(self, tokens: int) -> float:
        (out, k), (r, inner) = self.up.shape, self.down.shape
        return gemm(tokens, r, inner) + cheapest(as_operator(self.middle), tokens) + gemm(tokens, out, k)

    def flops_dense(self, tokens: int) -> float:
        (out, k), inner = self.up.shape, self.down.shape[1]
        return cheapest(as_operator(self.middle), inner) + gemm(out, inner, k) + gemm(tokens, out, inner)


@dataclass(frozen=True, eq=False)
class DiagonalLowRank(Operator):
    """`diag(b) @ up @ diag(d) @ down`: frozen random factors under two learnt vectors (VeRA, arXiv 2310.11454).

    Shapes: `down` (r, in); `up` (out, r); `d` (r,); `b` (out,).
    """

    down: Tensor
    up: Tensor
    d: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        (out, rank), d = self.up.shape, self.down.shape[0]
        fits = rank == d and tuple(self.d.shape) == (rank,) and tuple(self.b.shape) == (out,)
        expect(fits, self, "down (r, in), up (out, r), d (r,) and b (out,) form a product")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def keeps(self, x: Tensor) -> bool:
        # The gradient of b needs the product that it scales, as large as the output and kept in place of x. In 16 bits
        # making it again is cheap.
        return x.element_size() >= 4

    def _up(self, h: Tensor) -> Tensor:
        return F.linear(h * self.d, self.up)

    def apply(self, x: Tensor) -> Tensor:
        return self._up(F.linear(x, self.down)) * self.b

    def over(self, y: Tensor, x: Tensor) -> Tensor:
        return y.addcmul_(self._up(F.linear(x, self.down)), self.b)

    def dense(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def columns(self, index: Tensor) -> Tensor:
        return self._up(picked(self.down, index)) * self.b

    def narrowed(self) -> tuple[Tensor, Operator] | None:
        rest = Product(Diagonal(self.b), Product(Dense(self.up), Diagonal(self.d)))
        return None if self.down.requires_grad else (self.down, rest)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.b[:, None] * self.up * self.d, self.down

    def flops(self, tokens: int) -> float:
        return gemm(tokens, *self.down.shape) + gemm(tokens, *self.up.shape)

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        return gemm(out, inner, self.up.shape[1]) + gemm(tokens, out, inner)
