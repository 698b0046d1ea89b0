"""Autograd functions that write an update over an output that is there already."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.autograd.costs import thin_enough
from peft.autograd.dropout import Dropout, keep, keep_, kept_in, where
from peft.autograd.nodes import FrozenNarrow
from peft.autograd.products import act, added, again, narrow, product_over, pull, revived, spread, thin_grads
from peft.operators import Operator
from peft.operators.base import filled, shell, tensors_of


class LowRankOver(torch.autograd.Function):
    """y + s D(x) Aᵀ Bᵀ, D a dropout or the identity; over y if `write`.

    Keeps x for backward, and D(x) Aᵀ where it is small beside x. Shapes: y (…, out), x (…, in), A (r, in), B (out, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: Dropout | None,
        write: bool,
    ) -> Tensor:
        ctx.scale, ctx.dropout = scale * (dropout.gain if dropout else 1.0), dropout
        flat = x.reshape(-1, x.shape[-1])
        hidden = narrow(kept_in(dropout.mask(flat), flat) if dropout else flat, down).mul_(ctx.scale)
        ctx.save_for_backward(x, down, up, thin_enough(hidden, flat))
        if write:
            ctx.mark_dirty(y)
        return product_over(y, hidden, up, 1.0, write)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, needs = grads[0], ctx.needs_input_grad
        x, down, up, hidden = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        mask = ctx.dropout.mask(flat) if ctx.dropout else None
        into = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_y = grad if needs[0] else None
        if torch.is_grad_enabled():
            thin = F.linear(F.linear(where(flat, mask), down.to(x.dtype)) * ctx.scale, up.to(x.dtype))
            return grad_y, *again(thin, (x, down, up), needs[1:4], into), None, None, None
        back, grad_x = narrow(into, up.mT).mul_(ctx.scale), None
        if needs[1]:
            grad_x = back @ down.to(x.dtype)
            grad_x = (grad_x if mask is None else keep_(grad_x, mask)).view(x.shape)
        seen = flat if mask is None else kept_in(mask, flat)
        grad_down, grad_up = thin_grads(needs[2:4], seen, back, into, down, up, ctx.scale, hidden)
        return grad_y, grad_x, grad_down, grad_up, None, None, None


class OperatorOver(torch.autograd.Function):
    """y + op D(x) for any operator, over y if `write`; op D(x) where there is no y.

    Keeps x and the operator's own tensors, and makes the rest again, as `OperatorLinear` does. Shapes: y
    (…, out), x (…, in).
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Operator,
        dropout: Dropout | None,
        y: Tensor | None,
        x: Tensor,
        write: bool,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.op, ctx.dropout = shell(op), dropout
        flat = x.reshape(-1, x.shape[-1])
        acting, seen = op.to(x.dtype), keep(flat, dropout.mask(flat)) * dropout.gain if dropout else flat
        if y is None:
            return act(acting, seen).view(*x.shape[:-1], -1)
        if write:
            ctx.mark_dirty(y)
        return added(y, acting, seen, write)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, needs, need_parts = grads[0], ctx.needs_input_grad, ctx.needs_input_grad[5:]
        x, *parts = ctx.saved_tensors
        flat, dropout = x.reshape(-1, x.shape[-1]), ctx.dropout
        mask = dropout.mask(flat) if dropout else None
        into = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_y = grad if needs[2] else None
        if torch.is_grad_enabled():
            made = act(filled(ctx.op, iter(parts)).to(x.dtype), where(flat, mask) * (dropout.gain if dropout else 1))
            grad_x, *found = again(made, (x, *parts), (needs[3], *need_parts), into)
            return None, None, grad_y, grad_x, None, *found
        acting, wanted = revived(ctx.op, parts, need_parts, x.dtype)
        seen = keep(flat, mask) * dropout.gain if dropout else flat  # type: ignore[arg-type]
        back, found = pull(acting, seen, into, wanted, needs[3])
        if back is not None:
            back = (keep(back, mask).mul_(dropout.gain) if dropout else back).view(x.shape)
        return None, None, grad_y, back, None, *spread(found, need_parts)


def over_narrowed(y: Tensor, x: Tensor, parts: tuple[Tensor, Operator], dropout: Dropout | None, write: bool) -> Tensor:
    """y + op D(x) for an operator whose first factor is not trained: keeps what comes after that in place of x.

    Shapes: y (…, out), x (…, in); `parts` are those of `Operator.narrowed`, (k, in) and (out, k).
    """
    factor, rest = parts
    hidden = FrozenNarrow.apply(x.reshape(-1, x.shape[-1]), factor, dropout)
    return OperatorOver.apply(rest, None, y, hidden.view(*x.shape[:-1], -1), write, *tensors_of(rest))


class LowRankOnto(torch.autograd.Function):
    """y + s B h written over y, its channels second: the second half of a low-rank update of a convolution.

    Shapes: y (n, groups · out, …), contiguous; h (n, groups · r, …); B (groups · out, r).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float, groups: int) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(hidden, up)
        ctx.scale, ctx.groups = scale, groups
        return low_rank_onto(y, hidden, up, scale, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up = ctx.saved_tensors
        blocks, wide = _blocks(grad, hidden, up.to(grad.dtype), ctx.groups)
        grad_hidden = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_hidden = (torch.bmm(wide.mT, blocks[0]) * ctx.scale).view(hidden.shape)
        if ctx.needs_input_grad[2]:
            each = torch.bmm(blocks[0], blocks[1].mT) * ctx.scale
            grad_up = each.view(grad.shape[0], *up.shape).sum(0).to(up.dtype)
        return grad, grad_hidden, grad_up, None, None


def low_rank_onto(y: Tensor, hidden: Tensor, up: Tensor, scale: float, groups: int = 1) -> Tensor:
    """What `LowRankOnto` computes, with no part in any graph."""
    (over, seen), wide = _blocks(y, hidden, up.to(y.dtype), groups)
    over.baddbmm_(wide, seen, alpha=scale)
    return y


def _blocks(y: Tensor, hidden: Tensor, up: Tensor, groups: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A product for each sample and each group: y (n · groups, out, …) and h (n · groups, r, …) in one dimension, and
    B (n · groups, out, r)."""
    n, (out, rank) = y.shape[0] * groups, up.shape
    wide = up.expand(n, out, rank) if groups == 1 else up.view(groups, -1, rank).repeat(y.shape[0], 1, 1)
    return (y.reshape(n, out // groups, -1), hidden.reshape(n, rank, -1)), wide
