"""The plain matrices: stored whole, diagonal, identity, zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft.operators.base import Operator, narrow


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """A matrix that is stored whole: `matrix` (out, in)."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        return self.matrix

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        return narrow(grad, self.matrix.detach().mT) if need_x else None, self.matrix, (x.mT @ grad).mT

    @property
    def T(self) -> Dense:
        return Dense(self.matrix.mT)


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """A square matrix with the n numbers of `d`, of any shape, on its diagonal and zeros elsewhere."""

    d: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.numel(), self.d.numel()

    @property
    def _flat(self) -> Tensor:
        return self.d if self.d.dim() == 1 else self.d.flatten()

    @property
    def reach(self) -> int:
        return 1

    def apply(self, x: Tensor) -> Tensor:
        return x * self._flat

    def on(self, x: Tensor) -> Tensor:
        factors = self._flat
        return x * (factors if factors.dtype == x.dtype else factors.to(x.dtype))

    def dense(self) -> Tensor:
        return torch.diag(self._flat)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        back = grad * self._flat.detach() if need_x else None
        return back, self.d, (grad * x).sum(0).view(self.d.shape)

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return self.d, grad.diagonal().reshape(self.d.shape)

    @property
    def T(self) -> Diagonal:
        return self

    def columns(self, index: Tensor) -> Tensor:
        empty = self.d.new_zeros(*index.shape, self.d.numel())
        return empty.scatter(-1, index[..., None], self._flat[index][..., None])

    def flops(self, tokens: int) -> float:
        return float(tokens * self.d.numel())


@dataclass(frozen=True, eq=False)
class Identity(Operator):
    """The identity on vectors of length `size`."""

    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def apply(self, x: Tensor) -> Tensor:
        return x

    def dense(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    @property
    def T(self) -> Identity:
        return self

    def flops(self, tokens: int) -> float:
        return 0.0

    def like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Zero(Operator):
    """The matrix of zeros: `out` rows and `inner` columns."""

    out: int
    inner: int
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    def apply(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out)

    def dense(self) -> Tensor:
        return self.like().new_zeros(self.out, self.inner)

    @property
    def T(self) -> Zero:
        return Zero(self.inner, self.out, self.dtype, self.device)

    def columns(self, index: Tensor) -> Tensor:
        return self.like().new_zeros(*index.shape, self.out)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.like().new_zeros(self.out, 0), self.like().new_zeros(0, self.inner)

    def flops(self, tokens: int) -> float:
        return 0.0

    def like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)


def as_operator(matrix: Tensor | Operator) -> Operator:
    """A tensor (out, in) as an operator; an operator as it is."""
    return matrix if isinstance(matrix, Operator) else Dense(matrix)
