"""Autograd functions of linear layers and convolutions under an update, weight and all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.autograd.costs import denser, summed, thin_enough
from peft.autograd.dropout import Dropout, keep, keep_, kept_in, where
from peft.autograd.products import (
    act,
    added,
    again,
    linear,
    narrow,
    pull,
    pull_dense,
    pulled,
    revived,
    spread,
    thin_grads,
    with_operator,
)
from peft.operators import Operator
from peft.operators.base import filled, shell


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + s D(x) Aᵀ Bᵀ, D a dropout or the identity.

    Keeps x for backward, and D(x) Aᵀ where it is small beside x. Shapes: x (n, in), W (out, in), b (out,) or None;
    A (r, in), B (out, r).
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
        ctx.scale, ctx.dropout = scale * (dropout.gain if dropout else 1.0), dropout
        seen = kept_in(dropout.mask(x), x) if dropout else x
        hidden = narrow(seen, down).mul_(ctx.scale)
        ctx.save_for_backward(x, weight, down, up, thin_enough(hidden, x))
        del seen
        return linear(x, weight, bias).addmm_(hidden, up.to(x.dtype).mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        grad_bias = grad.sum(0) if needs[2] else None
        if torch.is_grad_enabled():
            thin = F.linear(F.linear(where(x, mask), down.to(x.dtype)) * ctx.scale, up.to(x.dtype))
            y = linear(x, weight) + thin
            grad_x, grad_down, grad_up = again(y, (x, down, up), (needs[0], *needs[3:5]), grad)
            return grad_x, None, grad_bias, grad_down, grad_up, None, None
        back, grad_x = narrow(grad, up.mT).mul_(ctx.scale), None
        if needs[0] and mask is None:
            grad_x = (grad @ weight.to(x.dtype)).addmm_(back, down.to(x.dtype))
        elif needs[0]:
            grad_x = keep_(back @ down.to(x.dtype), mask).addmm_(grad, weight.to(x.dtype))  # type: ignore[arg-type]
        seen = x if mask is None else kept_in(mask, x)
        grad_down, grad_up = thin_grads(needs[3:5], seen, back, grad, down, up, ctx.scale, hidden)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None


class MagnitudeLinear(torch.autograd.Function):
    """x Wᵀ + b + (g - 1) ⊙ D(x) Wᵀ + g ⊙ s D(x) Aᵀ Bᵀ with g = m / norm per output: DoRA (arXiv 2402.09353).

    Keeps what `LowRankLinear` keeps, and the product that g scales, which its gradient needs. Shapes as there, and
    g (out,).
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
            hidden = narrow(x, thin).mul_(ctx.scale)
            product = linear(x, weight).addmm_(hidden, wide.mT)
            y = product * factor if bias is None else torch.addcmul(bias.to(x.dtype), product, factor)
        else:
            seen = kept_in(dropout.mask(x), x)
            hidden = narrow(seen, thin).mul_(ctx.scale)
            base = linear(seen, weight).mul_(dropout.gain)
            y = linear(x, weight, bias).sub_(base)
            product = base.addmm_(hidden, wide.mT)
            y.addcmul_(product, factor)
        product = product if ctx.needs_input_grad[7] else None
        ctx.save_for_backward(x, weight, down, up, gain, product, thin_enough(hidden, x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gain, product, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        grad_bias = grad.sum(0) if needs[2] else None
        if torch.is_grad_enabled():
            seen, factor = where(x, mask) * (ctx.dropout.gain if ctx.dropout else 1.0), gain.to(x.dtype)
            base, scale = linear(seen, weight), ctx.scale / (ctx.dropout.gain if ctx.dropout else 1.0)
            thin = F.linear(F.linear(seen, down.to(x.dtype)) * scale, up.to(x.dtype))
            y = linear(x, weight) + (factor - 1) * base + factor * thin
            found = again(y, (x, down, up, gain), (needs[0], *needs[3:5], needs[7]), grad)
            grad_x, grad_down, grad_up, grad_gain = found
            return grad_x, None, grad_bias, grad_down, grad_up, None, None, grad_gain
        grad_gain = grad_x = buffer = None
        if needs[7]:
            buffer = grad * product
            grad_gain = buffer.sum(0).to(gain.dtype)
        scaled, weight, thin = torch.mul(grad, gain.to(x.dtype), out=buffer), weight.to(x.dtype), down.to(x.dtype)
        back = narrow(scaled, up.mT).mul_(ctx.scale)
        if needs[0] and mask is None:
            grad_x = (scaled @ weight).addmm_(back, thin)
        elif needs[0]:
            grad_x = (back @ thin).addmm_(scaled - grad, weight, alpha=ctx.dropout.gain)
            grad_x = keep_(grad_x, mask).addmm_(grad, weight)  # type: ignore[arg-type]
        seen = x if mask is None else kept_in(mask, x)
        grad_down, grad_up = thin_grads(needs[3:5], seen, back, scaled, down, up, ctx.scale, hidden)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None, grad_gain


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
        ctx.op, ctx.before, ctx.dropout = shell(op), before, dropout
        seen = keep(x, dropout.mask(x)) * dropout.gain if dropout else x
        return with_operator(op.to(x.dtype), before, x, seen, weight, bias, dropout is not None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parts = ctx.saved_tensors
        before, dropout, needs, need_parts = ctx.before, ctx.dropout, ctx.needs_input_grad, ctx.needs_input_grad[6:]
        mask = dropout.mask(x) if dropout else None
        grad_bias = grad.sum(0) if needs[5] else None
        if torch.is_grad_enabled():
            y = act(filled(ctx.op, iter(parts)).to(x.dtype), x if mask is None else where(x, mask) * dropout.gain)
            y = linear(y, weight) if before else linear(x, weight) + y
            return None, None, None, *again(y, (x, weight, None, *parts), (needs[3], False, False, *need_parts), grad)
        seen = keep(x, mask) * dropout.gain if dropout else x
        acting, wanted = revived(ctx.op, parts, need_parts, x.dtype)
        dense = denser(acting, x)
        if not before and dense and summed(acting, x, dropout is not None):
            grad_x = grad @ acting.onto(weight.to(x.dtype)) if needs[3] else None
            found = pull_dense(acting, x, grad, wanted)
            return None, None, None, grad_x, None, grad_bias, *spread(found, need_parts)
        base = grad @ weight.to(x.dtype) if needs[3] or before else None
        into = base if before else grad
        assert into is not None
        back, found = pull(acting, seen, into, wanted, needs[3], dense)
        if needs[3] and dropout:
            back = keep(back, mask).mul_(dropout.gain)  # type: ignore[union-attr]
        grad_x = None if not needs[3] else back if before else base.add_(back)  # type: ignore[union-attr]
        return None, None, None, grad_x, None, grad_bias, *spread(found, need_parts)


class NarrowedLinear(torch.autograd.Function):
    """x Wᵀ + b + rest(D(x) Aᵀ), D a dropout or the identity, where neither W nor A is trained; and D(x) Aᵀ.

    Keeps D(x) Aᵀ in place of x, as an output, so that gradients of gradients reach x by it. Shapes: x (n, in), W
    (out, in), b (out,) or None, A (k, in); `rest` is an operator (out, k) of the tensors `parts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rest: Operator,
        dropout: Dropout | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden = narrow_dropped(x, factor, dropout)
        ctx.save_for_backward(weight, factor, hidden, *parts)
        ctx.rest, ctx.dropout = shell(rest), dropout
        ctx.set_materialize_grads(False)
        return added(linear(x, weight, bias), rest.to(x.dtype), hidden, True), hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, factor, hidden, *parts = ctx.saved_tensors
        (grad, back), need_x, need_parts = grads, ctx.needs_input_grad[2], ctx.needs_input_grad[6:]
        if grad is None:
            grad_x = widen_dropped(back, factor, ctx.dropout) if need_x and back is not None else None
            return None, None, grad_x, *[None] * (3 + len(parts))
        more, found = pulled(ctx.rest, parts, hidden, grad, need_x, need_parts)
        back = more if back is None or more is None else more + back
        grad_x = widen_dropped(back, factor, ctx.dropout, (grad, weight)) if need_x and back is not None else None
        return None, None, grad_x, None, grad.sum(0) if ctx.needs_input_grad[4] else None, None, *found


class FrozenNarrow(torch.autograd.Function):
    """D(x) Aᵀ for a matrix A (k, in) that is not trained, D a dropout or the identity. Keeps A and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, dropout: Dropout | None) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dropout = dropout
        return narrow_dropped(x, factor, dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return widen_dropped(grad, ctx.saved_tensors[0], ctx.dropout), None, None


class Dropped(torch.autograd.Function):
    """D(x). Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return kept_in(dropout.mask(x), x).mul_(dropout.gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, gain = ctx.dropout.mask(grad), ctx.dropout.gain
        return (where(grad, mask) * gain if torch.is_grad_enabled() else kept_in(mask, grad).mul_(gain)), None


def narrow_dropped(x: Tensor, factor: Tensor, dropout: Dropout | None) -> Tensor:
    """D(x) Aᵀ for x (n, in) and A (k, in)."""
    return narrow(kept_in(dropout.mask(x), x), factor).mul_(dropout.gain) if dropout else narrow(x, factor)


def widen_dropped(
    back: Tensor, factor: Tensor, dropout: Dropout | None, base: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The gradient of x, given that of D(x) Aᵀ (n, k); with a `base`, (n, out) and W (out, in), x Wᵀ's as well."""
    thin, (grad, weight) = factor.to(back.dtype), base or (None, None)
    if grad is None or weight is None or torch.is_grad_enabled():
        wide = back @ thin
        if dropout is not None:
            wide = where(wide, dropout.mask(wide)) * dropout.gain
        return wide if grad is None or weight is None else wide + grad @ weight.to(back.dtype)
    if dropout is None:
        return (grad @ weight.to(back.dtype)).addmm_(back, thin)
    wide = back.mul(dropout.gain) @ thin
    return keep_(wide, dropout.mask(wide)).addmm_(grad, weight.to(back.dtype))
