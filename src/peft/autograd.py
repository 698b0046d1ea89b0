"""Fused forms of what layers compute: fewer passes over memory, and only the input kept for backward.

A fused form never changes meaning: it stands in for the plain path where everything is a plain dense tensor, and tests
hold the two equal, gradients too. Under `torch.compile` and `torch.func` the plain path runs.

Adapters are cast to the dtype of the activations inside the nodes, so neither the casts nor what is made from them is
kept: everything thin is made again in backward, dropout masks from their seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from peft.operators import LowRank, Operator
from peft.updates import Add, Base, Before, Magnitude, Update

_PLAIN = (Tensor, nn.Parameter)
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


def _keep(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.bitwise_and(x.view(mask.dtype), mask).view(x.dtype)


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + s D(x) Aᵀ Bᵀ, D a dropout or the identity.

    Keeps x for backward, and nothing of size tokens × r or larger. Shapes: x (n, in), W (out, in), b (out,) or None, all
    of one dtype; A (r, in), B (out, r) of any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale, ctx.dropout = scale * (dropout.gain if dropout else 1.0), dropout
        seen = _keep(x, dropout.mask(x)) if dropout else x
        hidden = F.linear(seen, down.to(x.dtype)).mul_(ctx.scale)
        return F.linear(x, weight, bias).addmm_(hidden, up.to(x.dtype).mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        back, grad_down, grad_up = _thin_grads(needs[3:5], _keep(x, mask), grad, down, up, ctx.scale)
        grad_x = _plus_thin(grad @ weight, back, down, mask) if needs[0] else None
        return grad_x, None, grad.sum(0) if needs[2] else None, grad_down, grad_up, None, None


class MagnitudeLinear(torch.autograd.Function):
    """x Wᵀ + b + (g - 1) ⊙ D(x) Wᵀ + g ⊙ s D(x) Aᵀ Bᵀ with g = m / norm per output: DoRA (arXiv 2402.09353).

    Keeps x, and the product that g scales, which its gradient needs. Shapes as in `LowRankLinear`; g (out,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: Dropout | None,
        gain: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.dropout = scale * (dropout.gain if dropout else 1.0), dropout
        factor, wide, thin = gain.to(x.dtype), up.to(x.dtype), down.to(x.dtype)
        if dropout is None:
            product = F.linear(x, weight).addmm_(F.linear(x, thin).mul_(ctx.scale), wide.mT)
            y = product * factor if bias is None else torch.addcmul(bias, product, factor)
        else:
            seen = _keep(x, dropout.mask(x))
            hidden = F.linear(seen, thin).mul_(ctx.scale)
            base = F.linear(seen, weight).mul_(dropout.gain)
            y = F.linear(x, weight, bias).sub_(base)
            product = base.addmm_(hidden, wide.mT)
            y.addcmul_(product, factor)
        ctx.save_for_backward(x, weight, down, up, gain, product if ctx.needs_input_grad[7] else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gain, product = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        grad_gain = (grad * product).sum(0).to(gain.dtype) if needs[7] else None
        scaled = grad * gain.to(x.dtype)
        back, grad_down, grad_up = _thin_grads(needs[3:5], _keep(x, mask), scaled, down, up, ctx.scale)
        grad_x = None
        if needs[0] and mask is None:
            grad_x = _plus_thin(scaled @ weight, back, down, None)
        elif needs[0]:
            dropped = ((scaled - grad) @ weight).mul_(ctx.dropout.gain).addmm_(back, down.to(x.dtype))
            grad_x = (grad @ weight).add_(_keep(dropped, mask))
        return grad_x, None, grad.sum(0) if needs[2] else None, grad_down, grad_up, None, None, grad_gain


def _thin_grads(
    needs: Sequence[bool], x: Tensor, grad: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of s x Aᵀ Bᵀ: that of x Aᵀ (n, r), and where needed those of A and B."""
    back = (grad @ up.to(x.dtype)).mul_(scale)
    grad_down = (back.mT @ x).to(down.dtype) if needs[0] else None
    grad_up = None
    if needs[1]:
        hidden = F.linear(x, down.to(x.dtype)).mul_(scale)
        grad_up = (hidden.mT @ grad).mT.to(up.dtype, memory_format=torch.contiguous_format)
    return back, grad_down, grad_up


def _plus_thin(grad_x: Tensor, back: Tensor, down: Tensor, mask: Tensor | None) -> Tensor:
    down = down.to(grad_x.dtype)
    return grad_x.addmm_(back, down) if mask is None else grad_x.add_(_keep(back @ down, mask))


class OperatorLinear(torch.autograd.Function):
    """x Wᵀ + b + op D(x) for any operator, or W op D(x) + b where the operator comes before the weight.

    Keeps x and the operator's own tensors; what the operator makes of them is made again in backward, so that no dense
    form and no intermediate of the size of x outlives the call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Operator,
        before: bool,
        dropout: Dropout | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *parts)
        ctx.op, ctx.before, ctx.dropout = _without_tensors(op), before, dropout
        acting, seen = _with_tensors(op, iter(parts)).to(x.dtype), _seen(x, dropout)
        if before:
            return F.linear(_act(acting, seen), weight, bias)
        if _denser(acting, x):
            return F.linear(x, weight, bias).addmm_(seen, acting.dense().mT)
        return F.linear(x, weight, bias).add_(acting.apply(seen))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parts = ctx.saved_tensors
        needs, dropout = ctx.needs_input_grad, ctx.dropout
        create = torch.is_grad_enabled()
        mask = dropout.mask(x) if dropout else None
        seen = _keep(x, mask) * dropout.gain if dropout else x
        base = grad @ weight if needs[3] or ctx.before else None
        into = base if ctx.before else grad
        assert into is not None
        held = [t if create or not need else t.detach().requires_grad_() for t, need in zip(parts, needs[6:])]
        wanted = [t for t, need in zip(held, needs[6:]) if need]
        with torch.enable_grad():
            acting = _with_tensors(ctx.op, iter(held)).to(x.dtype)
            if _denser(acting, x):
                dense = acting.dense()
                found = torch.autograd.grad(dense, wanted, into.mT @ seen, create_graph=create) if wanted else ()
                back = None
                if needs[3] and not ctx.before and mask is None:
                    base.addmm_(grad, dense.detach())  # type: ignore[union-attr]
                elif needs[3]:
                    back = into @ dense.detach()
            else:
                inner = seen if create else seen.detach().requires_grad_(needs[3])
                sources = [inner, *wanted] if needs[3] else wanted
                found = torch.autograd.grad(acting.apply(inner), sources, into, create_graph=create) if sources else ()
                back, found = (found[0], found[1:]) if needs[3] else (None, found)
        if back is not None:
            back = _keep(back, mask).mul_(dropout.gain) if dropout else back
            base = back if ctx.before else base.add_(back)  # type: ignore[union-attr]
        rest = iter(found)
        grads = [next(rest) if need else None for need in needs[6:]]
        return (None, None, None, base if needs[3] else None, None, grad.sum(0) if needs[5] else None, *grads)
