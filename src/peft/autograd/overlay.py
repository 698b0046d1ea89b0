"""Fused forms over layers that run themselves (quantised ones): what adapters add to an output that is there already.

The counterpart of `forms` and `nodes`: only x and thin things are kept for backward, and adapters are cast to the dtype
of the activations, never x to theirs. The layer's weight is not read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.autograd.costs import denser, is_small, narrowed
from peft.autograd.dropout import Dropout
from peft.autograd.forms import Form
from peft.autograd.guards import no_autocast, plain
from peft.autograd.nodes import Dropped
from peft.autograd.over import LowRankOver, OperatorOver, over_narrowed
from peft.autograd.products import act, plus, product_over
from peft.operators import LowRank, Operator
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
    if kind not in (Add, Before) or not plain(x) or not x.is_floating_point() or not x.numel():
        return None
    if x.device.type == "meta" or (form.update is not add and layer != base.run):
        return None  # magnitudes are those of the frozen weight, whatever is merged into this one
    if kind is Before:
        seen = x.to(_dtype(x, x))
        with no_autocast(x):
            turned = _operator(None, seen, form, False)
        return layer(turned)
    y = layer(x)
    if not isinstance(y, Tensor) or not plain(y):
        return form.update.forward(x, lambda _: y, None, base)
    dtype = _dtype(x, y)
    seen = x if x.element_size() < dtype.itemsize else x.to(dtype)
    write = fresh and _may_be_written(y)
    if form.update is not add:
        y = _magnitude(y, seen, form, base, layer, write)
    else:
        with no_autocast(x):
            y = _low_rank(y, seen, form, write) if form.thin else _operator(y, seen, form, write)
    return base.shift(y, add.shift)


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype that the adapter computes in."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else y.dtype


def _may_be_written(y: Tensor) -> bool:
    """Whether autograd lets an output be written over: not leaves, nor views that a function of its own has made."""
    return y.is_contiguous() and not (torch.is_grad_enabled() and (y._is_view() or (y.is_leaf and y.requires_grad)))


def _low_rank(y: Tensor, x: Tensor, form: Form, write: bool, dropout: Dropout | None = None) -> Tensor:
    """y + s D(x) Aᵀ Bᵀ, of a dropout that was drawn or is drawn here."""
    op: LowRank = form.op
    small = is_small(x.numel() + y.numel())
    if dropout or (not small and (torch.is_grad_enabled() or form.dropout)):
        dropout, pair = dropout or _draw(form), narrowed(op, x.reshape(-1, x.shape[-1]), True)
        if pair is not None:
            return over_narrowed(y, x, pair, dropout, write)
        return LowRankOver.apply(y, x, op.down, op.up, float(op.scale), dropout, write)
    dtype = op.down.dtype if small else x.dtype
    hidden = F.linear(_dropped(x, form.dropout).to(dtype), op.down.to(dtype))
    if torch.is_grad_enabled():
        return plus(y, F.linear(hidden, op.up.to(dtype)), write, float(op.scale))
    return product_over(y, hidden.flatten(0, -2), op.up, float(op.scale), write)


def _magnitude(y: Tensor, x: Tensor, form: Form, base: Base, layer: Callable[[Tensor], Tensor], write: bool) -> Tensor:
    """y + (g - 1) (layer(D(x)) - b) + g s D(x) Aᵀ Bᵀ for y = layer(x) and the gain g of a `Magnitude`, (out,)."""
    gain, dropout = form.update.gain(base).to(y.dtype), _draw(form)
    frozen = base.shift(layer(Dropped.apply(x, dropout)) if dropout else y, base.bias, -1)
    over = write or base.bias is not None
    with no_autocast(x):
        if dropout is None:
            return base.shift(_low_rank(frozen, x, form, over) * gain, base.bias)
        y = plus(y, frozen, write, -1.0)
        return torch.addcmul(y, _low_rank(frozen, x, form, over, dropout), gain)


def _operator(y: Tensor | None, x: Tensor, form: Form, write: bool) -> Tensor:
    """y + op D(x) for any operator; op D(x) without y."""
    op: Operator = form.op
    flat = x.reshape(-1, x.shape[-1])
    small = is_small(x.numel() + (x if y is None else y).numel())
    if not small and (form.dropout or (torch.is_grad_enabled() and (denser(op, flat) or not op.keeps(flat)))):
        draw, pair = _draw(form), None if y is None else narrowed(op, flat, True)
        if y is not None and pair is not None:
            return over_narrowed(y, x, pair, draw, write)
        return OperatorOver.apply(op, draw, y, x, write, *form.parts)
    dtypes = {part.dtype for part in form.parts if part.is_floating_point()}
    dtype = dtypes.pop() if small and len(dtypes) == 1 else x.dtype
    made = act(op.to(dtype), _dropped(flat, form.dropout).to(dtype))
    made = made.view(*x.shape[:-1], made.shape[-1])
    return made.to(x.dtype) if y is None else plus(y, made, write)


def _draw(form: Form) -> Dropout | None:
    return Dropout.draw(form.dropout.p if form.dropout else 0.0)


def _dropped(x: Tensor, dropout: nn.Dropout | None) -> Tensor:
    return x if dropout is None else dropout(x)
