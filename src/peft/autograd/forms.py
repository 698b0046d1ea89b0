"""Which updates of a linear layer have a fused form, and which of its nodes run for an input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.autograd.costs import beside, denser, is_small, narrowed
from peft.autograd.dropout import Dropout
from peft.autograd.guards import computes_in, no_autocast, plain
from peft.autograd.nodes import Dropped, LowRankLinear, MagnitudeLinear, NarrowedLinear, OperatorLinear
from peft.autograd.products import act, linear, narrow, with_operator
from peft.operators import Diagonal, LowRank, Operator
from peft.operators.base import tensors_of
from peft.updates import Add, After, Base, Before, Magnitude, Shift, Update


@dataclass(frozen=True)
class Form:
    """An update in the form in which a linear layer runs it; see `form`."""

    update: Any
    add: Any
    """The update itself, or the one whose result it rescales."""
    op: Any
    dropout: nn.Dropout | None
    thin: bool
    """Whether it is a low-rank update in the form of LoRA's."""
    parts: list[Tensor]

    def run(self, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output of a linear layer under the update; None where tensors are not plain, or dtypes don't fit.

        Args:
            base: The frozen layer.
            x: Input (…, in).
            weight: W (out, in), with whatever is merged.
            bias: b (out,), or None.
        """
        dtype = self.dtype(base, x, weight, bias)
        if dtype is None:
            return None
        with no_autocast(x):
            flat = x if x.dtype == dtype else x.to(dtype)
            if flat.dim() != 2:
                flat = flat.reshape(-1, x.shape[-1])
            y = self._run(base, flat, weight, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])

    def dtype(self, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
        """What a layer computes in under the update; None where tensors are not plain, or dtypes don't fit."""
        if not x.is_floating_point() or not x.numel() or weight.requires_grad or not plain(x, weight, bias):
            return None
        device = x.device.type
        if device == "meta":
            return None
        if self.update is not self.add and weight.data_ptr() != base.weight.data_ptr():
            return None  # magnitudes are those of the frozen weight, whatever is merged into this one
        return computes_in(x, weight, torch.is_autocast_enabled(device))

    def moved(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias and what an `Add` or a `Shift` adds to it; in `dtype` where the layer has none."""
        add, kind = self.add, type(self.add)
        shift = add.vector if kind is Shift else add.shift if kind is Add else None
        if shift is None:
            return bias
        return shift.to(dtype) if bias is None else bias + shift.to(bias.dtype)

    def _run(self, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        add: Any = self.add
        kind = type(add)
        if kind is After:
            y = self.op.on(linear(x, weight, None if add.keep_bias else bias))
            return y + bias.to(y.dtype) if add.keep_bias and bias is not None else y
        if kind is Before and self.dropout is None and not torch.is_grad_enabled() and type(self.op) is Diagonal:
            return linear(self.op.on(x), weight, bias)
        bias = self.moved(bias, x.dtype)
        if kind is Shift:
            return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).mT)  # type: ignore[union-attr]
        if self.thin:
            return _low_rank(
                x, weight, bias, self.op, self.dropout, None if self.update is add else self.update.gain(base)
            )
        return _operator(x, weight, bias, self.op, kind is Before, self.dropout, self.parts)


def form(updates: list[Update]) -> Form | None:
    """The fused form of a stack of updates, if there is one for it; else None."""
    update: Any = updates[0] if len(updates) == 1 else _together(updates)
    add: Any = update.inner if isinstance(update, Magnitude) else update
    kind = type(add)
    if kind not in (Add, Before, After, Shift):  # subclasses run in their own way
        return None
    op: Any = None if kind is Shift else add.op
    dropout: Any = add.dropout if kind in (Add, Before) else None
    thin = type(op) is LowRank and kind is Add and op.groups == 1 and not isinstance(op.scale, Tensor)
    parts = [op.down, op.up] if thin else [add.vector] if kind is Shift else tensors_of(op)
    if not (dropout is None or type(dropout) is nn.Dropout) or not plain(*parts) or (update is not add and not thin):
        return None
    return Form(update, add, op, dropout, thin, parts)


def _together(updates: list[Update]) -> Update | None:
    """Several low-rank updates as one, of the sum of their ranks."""
    downs, ups, shift = [], [], None
    for update in updates:
        if not isinstance(update, Add) or not isinstance(update.op, LowRank) or update.op.groups != 1:
            return None
        if update.dropout is not None:
            return None
        downs.append(update.op.down)
        ups.append(update.op.up * update.op.scale)
        shift = update.add_bias(shift, None)  # type: ignore[arg-type]
    return Add(LowRank(torch.cat(downs), torch.cat(ups, 1)), shift) if downs else None


def _low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, op: LowRank, dropout: nn.Dropout | None, gain: Tensor | None
) -> Tensor:
    """Low-rank updates, on x (n, in); `gain` (out,) if they are normalised."""
    small = is_small(x.shape[0] * (weight.shape[0] + weight.shape[1]))
    few = small or (dropout is None and beside(x, weight))
    # With or without gradients the same elements drop out: reentrant checkpointing runs both ways.
    if (not few and (torch.is_grad_enabled() or dropout)) or (gain is not None and dropout):
        draw = Dropout.draw(dropout.p if dropout else 0.0)
        y = _narrowed(x, weight, bias, op, draw) if gain is None else None
        if y is not None:
            return y
        factors = op.down, op.up, float(op.scale), draw
        if gain is None:
            return LowRankLinear.apply(x, weight, bias, *factors)
        return MagnitudeLinear.apply(x, weight, bias, *factors, gain)
    dtype = op.down.dtype if small else x.dtype
    seen = x if dropout is None else dropout(x)
    hidden = linear(seen if seen.dtype == dtype else seen.to(dtype), op.down) if small else narrow(seen, op.down)
    y, up = linear(x, weight, bias if gain is None else None), op.up if op.up.dtype == dtype else op.up.to(dtype)
    if dtype == x.dtype and not (small and torch.is_grad_enabled()):  # backward of two calls is faster than of one
        y.addmm_(hidden, up.mT, alpha=op.scale)  # type: ignore[arg-type]
    else:
        y.add_(F.linear(hidden, up), alpha=op.scale)  # type: ignore[arg-type]
    if gain is None:
        return y
    factor = gain.to(y.dtype)
    return y * factor if bias is None else torch.addcmul(bias.to(y.dtype), y, factor)


def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    op: Operator,
    before: bool,
    dropout: nn.Dropout | None,
    parts: list[Tensor],
) -> Tensor:
    """Any other update by an operator, on x (n, in)."""
    small = is_small(x.shape[0] * (weight.shape[0] + weight.shape[1]))
    draw = Dropout.draw(dropout.p if dropout and not small else 0.0)
    if not small and (torch.is_grad_enabled() or draw) and (denser(op, x) or not _lean(op, x, weight)):
        y = None if before else _narrowed(x, weight, bias, op, draw)
        if y is not None:
            return y
        return OperatorLinear.apply(op, before, draw, x, weight, bias, *parts)
    seen = Dropped.apply(x, draw) if draw else dropout(x) if dropout else x
    # Several, where methods compute under autocast, or with W.
    dtypes = {part.dtype for part in parts if part.is_floating_point()}
    wide = x.dtype
    if dtypes and small and not op.rounds and (len(dtypes) == 1 or is_small(weight.numel())):
        wide = reduce(torch.promote_types, dtypes)
    if dtypes != {wide}:
        op = op.to(wide)
    if wide == x.dtype:
        return with_operator(op, before, x, seen, weight, bias, dropout is not None)
    changed = act(op, seen.to(wide))
    if before:
        return linear(changed.to(x.dtype), weight, bias)
    return linear(x, weight, bias).add_(changed)


def _narrowed(x: Tensor, weight: Tensor, bias: Tensor | None, op: Operator, draw: Dropout | None) -> Tensor | None:
    """The output where the operator's first factor is not trained; None where it is, or where that does not pay."""
    parts = narrowed(op, x, draw is not None)
    if parts is None:
        return None
    factor, rest = parts
    return NarrowedLinear.apply(rest, draw, x, weight, bias, factor, *tensors_of(rest))[0]


def _lean(op: Operator, x: Tensor, weight: Tensor) -> bool:
    """Whether nodes of torch's own run the operator on x: they keep little for backward, or what is worth keeping."""
    return op.keeps(x) or beside(x, weight)
