"""Matrices made of matrices: Sum, Product, Scaled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from peft.operators.base import Operator, Scale, act, cheapest, expect, gemm, scaled
from peft.operators.plain import Dense, Diagonal


@dataclass(frozen=True, eq=False)
class Sum(Operator):
    """The sum of one or more operators of one shape."""

    terms: tuple[Operator, ...]

    def __post_init__(self) -> None:
        same = len(self.terms) > 0 and all(term.shape == self.terms[0].shape for term in self.terms)
        expect(same, self, "a sum needs one or more terms, all of one shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def apply(self, x: Tensor) -> Tensor:
        return reduce(torch.add, [act(term, x) for term in self.terms])

    def dense(self) -> Tensor:
        return reduce(torch.add, [term.dense() for term in self.terms])

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        pulled = [term.pull(x, grad, need_x) for term in self.terms]
        if None in pulled:
            return None
        backs, *ways = zip(*pulled, strict=True)  # type: ignore[arg-type]
        way, found = map(_joined, ways)
        return reduce(torch.add, backs) if need_x else None, way, found

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        sources, found = zip(*(term.pull_dense(grad) for term in self.terms), strict=True)
        return _joined(sources), _joined(found)

    def columns(self, index: Tensor) -> Tensor:
        return reduce(torch.add, [term.columns(index) for term in self.terms])

    @property
    def T(self) -> Sum:
        return Sum(tuple(term.T for term in self.terms))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        ups, downs = [], []
        for term in self.terms:
            pair = term.factors()
            if pair is None:
                return None
            ups.append(pair[0])
            downs.append(pair[1])
        return torch.cat(ups, dim=1), torch.cat(downs, dim=0)

    def flops(self, tokens: int) -> float:
        return sum(cheapest(term, tokens) for term in self.terms)

    def flops_dense(self, tokens: int) -> float:
        return sum(term.flops_dense(0) for term in self.terms) + gemm(tokens, *self.shape)


@dataclass(frozen=True, eq=False)
class Product(Operator):
    """`left @ right`: the right one acts first."""

    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        expect(self.left.shape[1] == self.right.shape[0], self, "the columns of left are the rows of right")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return act(self.left, act(self.right, x))

    def dense(self) -> Tensor:
        # a row of right.T is a column of right: `left` acts on it without being built
        return act(self.left, self.right.dense().mT).mT

    def over(self, y: Tensor, x: Tensor) -> Tensor:
        if type(self.left) is not Diagonal:
            return super().over(y, x)
        return y.addcmul_(act(self.right, x), self.left.d)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if type(self.left) is not Dense or self.left.matrix.requires_grad:
            return None
        return self.right.pull(x, grad @ self.left.matrix, need_x)  # what comes after it need not be made again

    def columns(self, index: Tensor) -> Tensor:
        return act(self.left, self.right.columns(index))

    @property
    def T(self) -> Product:
        return Product(self.right.T, self.left.T)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        pair = self.right.factors()
        if pair is not None:
            return act(self.left, pair[0].mT).mT, pair[1]
        pair = self.left.factors()
        return None if pair is None else (pair[0], act(self.right.T, pair[1]))

    def flops(self, tokens: int) -> float:
        return cheapest(self.left, tokens) + cheapest(self.right, tokens)

    def flops_dense(self, tokens: int) -> float:
        build = self.right.flops_dense(0) + cheapest(self.left, self.shape[1])
        return build + gemm(tokens, *self.shape)


@dataclass(frozen=True, eq=False)
class Scaled(Operator):
    """`scale * op`, the scale a number or a 0-d tensor."""

    op: Operator
    scale: Scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.op.shape

    def apply(self, x: Tensor) -> Tensor:
        return scaled(act(self.op, x), self.scale)

    def dense(self) -> Tensor:
        return scaled(self.op.dense(), self.scale)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        return None if isinstance(self.scale, Tensor) else self.op.pull(x, scaled(grad, self.scale), need_x)

    def columns(self, index: Tensor) -> Tensor:
        return scaled(self.op.columns(index), self.scale)

    @property
    def T(self) -> Scaled:
        return Scaled(self.op.T, self.scale)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        pair = self.op.factors()
        return None if pair is None else (pair[0], scaled(pair[1], self.scale))

    def flops(self, tokens: int) -> float:
        return self.op.flops(tokens)

    def flops_dense(self, tokens: int) -> float:
        return self.op.flops_dense(tokens)


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
