"""Dropouts that can be repeated, so that no mask is kept between forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEVELS = 1 << 16


@dataclass(frozen=True)
class Dropout:
    """A dropout that can be repeated: the same elements fall out whenever it is applied.

    Which ones is decided by 16 random bits per element, several times faster than a Bernoulli sample; `gain` is the
    inverse of the exact probability to stay, so the mean is kept.
    """

    rate: float
    seed: int

    @classmethod
    def draw(cls, rate: float) -> Dropout | None:
        """A new one, its seed drawn from torch's default generator; None for a rate of zero."""
        return cls(rate, int(torch.randint(2**62, (), dtype=torch.int64))) if rate else None

    @property
    def _cut(self) -> int:
        return min(round(self.rate * _LEVELS), _LEVELS - 1)

    @property
    def gain(self) -> float:
        """What the elements that stay are to be multiplied with."""
        return 0.0 if self.rate >= 1 else _LEVELS / (_LEVELS - self._cut)

    def mask(self, x: Tensor) -> Tensor:
        """Integers of the shape and item size of x: all bits set where an element stays, none where it falls out."""
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return bits.ge_(self._cut - _LEVELS // 2).neg_().to(_BITS[x.element_size()])


def keep(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask (of `Dropout.mask`) stays, zero elsewhere; x itself without one."""
    return x if mask is None else torch.bitwise_and(x.view(mask.dtype), mask).view(x.dtype)


def keep_(x: Tensor, mask: Tensor) -> Tensor:
    """`keep` in place of x."""
    x.view(mask.dtype).bitwise_and_(mask)
    return x


def kept_in(mask: Tensor, x: Tensor) -> Tensor:
    """`keep` in place of the mask: fresh memory costs more than the operation."""
    return mask.bitwise_and_(x.view(mask.dtype)).view(x.dtype)


def where(x: Tensor, mask: Tensor | None) -> Tensor:
    """`keep`, differentiable."""
    return x if mask is None else torch.where(mask.bool(), x, torch.zeros_like(x))
