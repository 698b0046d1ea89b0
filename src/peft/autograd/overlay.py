"""Fused forms over layers that run themselves (quantised ones): what adapters add to an output that is there already.

The counterpart of `forms` and `nodes`: only x and thin things are kept for backward, and adapters are cast to the dtype
of the activations, never x to theirs. The layer's weight is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.autograd.costs import denser, is_small, thin_enough
from peft.autograd.dropout import Dropout, keep, keep_, kept_in, where
from peft.autograd.forms import Form
from peft.autograd.guards import no_autocast, plain
from peft.autograd.products import act, again, narrow, pull, revived, spread, thin_grads
from peft.operators import LowRank, Operator
from peft.operators.base import filled, shell
from peft.updates import Add, Base, Before


def run(form: Form, base: Base, x: Tensor, layer: Callable[[Tensor], Tensor], fresh: bool) -> Tensor | None:
    """The output of a linear layer that runs itself, under an update; None where there is no fused form.

    Args:
        form: The update.
        base: The frozen layer, as updates see it.
        x: Input (…, in).
        layer: The layer, with whatever is merged into it.
        fresh: Whether nobody else holds what the layer returns, so that it may be written over.
    """
    add, kind = form.add, type(form.add)
    if form.update is not add or kind not in (Add, Before) or not plain(x) or not x.is_floating_point():
        return None
    if not x.numel() or x.device.type == "meta":
        return None
    if kind is Before:
        seen = x.to(_dtype(x, x))
        with no_autocast(x):
            turned = _operator(None, seen, form, False)
        return layer(turned)
    y = layer(x)
    if not isinstance(y, Tensor) or not plain(y):
        return add.forward(x, lambda _: y, None, base)
    dtype = _dtype(x, y)
    seen = x if x.element_size() < dtype.itemsize else x.to(dtype)
    with no_autocast(x):
        over = _low_rank if form.thin else _operator
        y = over(y, seen, form, fresh and _may_be_written(y))
    return base.shift(y, add.shift)


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype that the adapter computes in."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else y.dtype


def _may_be_written(y: Tensor) -> bool:
    """Whether autograd lets an output be written over: not leaves, nor views that a function of its own has made."""
    return y.is_contiguous() and not (torch.is_grad_enabled() and (y._is_view() or (y.is_leaf and y.requires_grad)))


def _low_rank(y: Tensor, x: Tensor, form: Form, write: bool) -> Tensor:
    """y + s D(x) Aᵀ Bᵀ."""
    op: LowRank = form.op
    rate = form.dropout.p if form.dropout else 0.0
    small = is_small(x.numel() + y.numel())
    if not small and (torch.is_grad_enabled() or rate):
        return LowRankOver.apply(y, x, op.down, op.up, float(op.scale), Dropout.draw(rate), write)
    dtype = op.down.dtype if small else x.dtype
    hidden = F.linear(_dropped(x, form.dropout).to(dtype), op.down.to(dtype))
    if torch.is_grad_enabled():
        return _sum(y, F.linear(hidden, op.up.to(dtype)), write, float(op.scale))
    return _product_over(y, hidden.flatten(0, -2), op.up, float(op.scale), write)


def _operator(y: Tensor | None, x: Tensor, form: Form, write: bool) -> Tensor:
    """y + op D(x) for any operator; op D(x) without y."""
    op: Operator = form.op
    flat = x.reshape(-1, x.shape[-1])
    small = is_small(x.numel() + (x if y is None else y).numel())
    if not small and (form.dropout or (torch.is_grad_enabled() and (denser(op, flat) or not op.keeps(flat)))):
        draw = Dropout.draw(form.dropout.p if form.dropout else 0.0)
        return OperatorOver.apply(op, draw, y, x, write, *form.parts)
    dtypes = {part.dtype for part in form.parts if part.is_floating_point()}
    dtype = dtypes.pop() if small and len(dtypes) == 1 else x.dtype
    made = act(op.to(dtype), _dropped(flat, form.dropout).to(dtype))
    made = made.view(*x.shape[:-1], made.shape[-1])
    return made.to(x.dtype) if y is None else _sum(y, made, write)


def _dropped(x: Tensor, dropout: nn.Dropout | None) -> Tensor:
    return x if dropout is None else dropout(x)


def _sum(y: Tensor, more: Tensor, write: bool, scale: float = 1.0) -> Tensor:
    """y + scale · more, in the dtype of y, and over it if `write`."""
    return y.add_(more, alpha=scale) if write else torch.add(y, more.to(y.dtype), alpha=scale)


def _product_over(y: Tensor, hidden: Tensor, up: Tensor, scale: float, write: bool) -> Tensor:
    """y (…, out) + scale · hidden (n, r) upᵀ, over y if `write`; no gradients."""
    up = up.to(hidden.dtype)
    if hidden.dtype != y.dtype:
        return _sum(y, (hidden @ up.mT).view(y.shape), write, scale)
    flat = y.reshape(-1, y.shape[-1])
    if write:
        flat.addmm_(hidden, up.mT, alpha=scale)
        return y
    return torch.addmm(flat, hidden, up.mT, alpha=scale).view(y.shape)


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
        return _product_over(y, hidden, up, 1.0, write)

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
        made = act(op.to(x.dtype), keep(flat, dropout.mask(flat)) * dropout.gain if dropout else flat)
        made = made.view(*x.shape[:-1], made.shape[-1])
        if y is None:
            return made
        if write:
            ctx.mark_dirty(y)
        return _sum(y, made, write)

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
