"""Fused forms of what layers compute: fewer passes over memory, and only the input kept for backward.

A fused form never changes meaning: it stands in for the plain path where everything is a plain dense tensor, and tests
hold the two equal, gradients too. Under `torch.compile` and `torch.func` the plain path runs.

Adapters are cast to the dtype of the activations inside the nodes, so neither the casts nor anything of the size of the
activations is kept, but the input: dropout masks are made again from their seeds. Inputs that are little beside the
weight run by as few of autograd's own nodes as it takes, and small ones, where calls cost more than arithmetic, in the
dtype of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from peft.operators import Bilinear, Diagonal, LowRank, Operator
from peft.operators.base import SMALL, filled, shell, tensors_of
from peft.operators.plain import as_operator
from peft.routing import Route
from peft.updates import Add, After, Base, Before, Magnitude, Shift, Update

_PLAIN = (Tensor, nn.Parameter)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEVELS = 1 << 16
_SMALL = SMALL
_BESIDE = 16
"""How many times the elements of input and output a weight has that they are little beside."""
_FRESH = 32.0
"""What an element of a new matrix costs, in operations of a product (measured on a CPU)."""
_AS_IT_IS = nullcontext()
_THIN = 16
"""A projection of the input is kept for backward where it is so many times smaller than the input."""


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


def _keep_(x: Tensor, mask: Tensor) -> Tensor:
    """`_keep` in place of x."""
    x.view(mask.dtype).bitwise_and_(mask)
    return x


def _kept_in(mask: Tensor, x: Tensor) -> Tensor:
    """`_keep` in place of the mask: fresh memory costs more than the operation."""
    return mask.bitwise_and_(x.view(mask.dtype)).view(x.dtype)


def _where(x: Tensor, mask: Tensor | None) -> Tensor:
    """`_keep`, differentiable."""
    return x if mask is None else torch.where(mask.bool(), x, torch.zeros_like(x))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return F.linear(x, weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype))


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """x (n, k) times the transpose of a factor (r, k) of few rows."""
    # oneDNN's 16-bit product is half as fast where the narrow side comes last.
    factor = factor.to(x.dtype)
    return (factor @ x.mT).mT if x.element_size() == 2 else F.linear(x, factor)


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
        seen = _kept_in(dropout.mask(x), x) if dropout else x
        hidden = _narrow(seen, down).mul_(ctx.scale)
        ctx.save_for_backward(x, weight, down, up, _thin_enough(hidden, x))
        del seen
        return _linear(x, weight, bias).addmm_(hidden, up.to(x.dtype).mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        grad_bias = grad.sum(0) if needs[2] else None
        if torch.is_grad_enabled():
            thin = F.linear(F.linear(_where(x, mask), down.to(x.dtype)) * ctx.scale, up.to(x.dtype))
            y = _linear(x, weight) + thin
            grad_x, grad_down, grad_up = _again(y, (x, down, up), (needs[0], *needs[3:5]), grad)
            return grad_x, None, grad_bias, grad_down, grad_up, None, None
        back, grad_x = _narrow(grad, up.mT).mul_(ctx.scale), None
        if needs[0] and mask is None:
            grad_x = (grad @ weight.to(x.dtype)).addmm_(back, down.to(x.dtype))
        elif needs[0]:
            grad_x = _keep_(back @ down.to(x.dtype), mask).addmm_(grad, weight.to(x.dtype))  # type: ignore[arg-type]
        seen = x if mask is None else _kept_in(mask, x)
        grad_down, grad_up = _thin_grads(needs[3:5], seen, back, grad, down, up, ctx.scale, hidden)
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
            hidden = _narrow(x, thin).mul_(ctx.scale)
            product = _linear(x, weight).addmm_(hidden, wide.mT)
            y = product * factor if bias is None else torch.addcmul(bias.to(x.dtype), product, factor)
        else:
            seen = _kept_in(dropout.mask(x), x)
            hidden = _narrow(seen, thin).mul_(ctx.scale)
            base = _linear(seen, weight).mul_(dropout.gain)
            y = _linear(x, weight, bias).sub_(base)
            product = base.addmm_(hidden, wide.mT)
            y.addcmul_(product, factor)
        product = product if ctx.needs_input_grad[7] else None
        ctx.save_for_backward(x, weight, down, up, gain, product, _thin_enough(hidden, x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gain, product, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = ctx.dropout.mask(x) if ctx.dropout else None
        grad_bias = grad.sum(0) if needs[2] else None
        if torch.is_grad_enabled():
            seen, factor = _where(x, mask) * (ctx.dropout.gain if ctx.dropout else 1.0), gain.to(x.dtype)
            base, scale = _linear(seen, weight), ctx.scale / (ctx.dropout.gain if ctx.dropout else 1.0)
            thin = F.linear(F.linear(seen, down.to(x.dtype)) * scale, up.to(x.dtype))
            y = _linear(x, weight) + (factor - 1) * base + factor * thin
            found = _again(y, (x, down, up, gain), (needs[0], *needs[3:5], needs[7]), grad)
            grad_x, grad_down, grad_up, grad_gain = found
            return grad_x, None, grad_bias, grad_down, grad_up, None, None, grad_gain
        grad_gain = grad_x = buffer = None
        if needs[7]:
            buffer = grad * product
            grad_gain = buffer.sum(0).to(gain.dtype)
        scaled, weight, thin = torch.mul(grad, gain.to(x.dtype), out=buffer), weight.to(x.dtype), down.to(x.dtype)
        back = _narrow(scaled, up.mT).mul_(ctx.scale)
        if needs[0] and mask is None:
            grad_x = (scaled @ weight).addmm_(back, thin)
        elif needs[0]:
            grad_x = (back @ thin).addmm_(scaled - grad, weight, alpha=ctx.dropout.gain)
            grad_x = _keep_(grad_x, mask).addmm_(grad, weight)  # type: ignore[arg-type]
        seen = x if mask is None else _kept_in(mask, x)
        grad_down, grad_up = _thin_grads(needs[3:5], seen, back, scaled, down, up, ctx.scale, hidden)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None, grad_gain


def _thin_enough(hidden: Tensor, x: Tensor) -> Tensor | None:
    """What is kept of s x Aᵀ."""
    return hidden if _THIN * hidden.shape[1] <= x.shape[1] else None


def _thin_grads(
    needs: Sequence[bool],
    x: Tensor,
    back: Tensor,
    grad: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    hidden: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B in s x Aᵀ Bᵀ, given those of x Aᵀ (`back`) and of the whole; `hidden` is s x Aᵀ if kept."""
    grad_down = (back.mT @ x).to(down.dtype) if needs[0] else None
    grad_up = None
    if needs[1]:
        if hidden is None:
            hidden = _narrow(x, down).mul_(scale)
        grad_up = (hidden.mT @ grad).mT.to(up.dtype, memory_format=torch.contiguous_format)
    return grad_down, grad_up


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
        seen = _keep(x, dropout.mask(x)) * dropout.gain if dropout else x
        return _run(op.to(x.dtype), before, x, seen, weight, bias, dropout is not None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parts = ctx.saved_tensors
        before, dropout, needs, need_parts = ctx.before, ctx.dropout, ctx.needs_input_grad, ctx.needs_input_grad[6:]
        mask = dropout.mask(x) if dropout else None
        grad_bias = grad.sum(0) if needs[5] else None
        if torch.is_grad_enabled():
            acting = filled(ctx.op, iter(parts)).to(x.dtype)
            with torch.enable_grad():
                seen = x if mask is None else _where(x, mask) * dropout.gain
                y = _act(acting, seen)
                y = _linear(y, weight) if before else _linear(x, weight) + y
            return None, None, None, *_again(y, (x, weight, None, *parts), (needs[3], False, False, *need_parts), grad)
        seen = _keep(x, mask) * dropout.gain if dropout else x
        held = [t.detach().requires_grad_() if need else t for t, need in zip(parts, need_parts, strict=True)]
        wanted = [t for t, need in zip(held, need_parts, strict=True) if need]
        with torch.enable_grad():
            acting = filled(ctx.op, iter(held)).to(x.dtype)
        if not before and _denser(acting, x) and _summed(acting, x, dropout is not None):
            grad_x = grad @ acting.onto(weight.to(x.dtype)) if needs[3] else None
            found = ()
            if wanted:
                with torch.enable_grad():
                    found = torch.autograd.grad(*_sources(acting.pull_dense(grad.mT @ x), wanted))
            rest = iter(found)
            return None, None, None, grad_x, None, grad_bias, *(next(rest) if need else None for need in need_parts)
        base = grad @ weight.to(x.dtype) if needs[3] or before else None
        into = base if before else grad
        assert into is not None
        back, found = _pull(acting, seen, into, wanted, needs[3])
        if needs[3] and dropout:
            back = _keep(back, mask).mul_(dropout.gain)  # type: ignore[union-attr]
        grad_x = None if not needs[3] else back if before else base.add_(back)  # type: ignore[union-attr]
        rest = iter(found)
        return None, None, None, grad_x, None, grad_bias, *(next(rest) if need else None for need in need_parts)


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b for a W that is not trained. Keeps W, in the dtype that it has, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = FrozenLinear.apply(grad, weight.mT, None) if needs[0] else None
        return grad_x, None, grad.sum(0) if needs[2] else None


def _summed(op: Operator, x: Tensor, dropped: bool) -> bool:
    """Whether W + op runs as one matrix where op is dense anyway: if the sum is not rounded to 16 bits (or is, by
    definition of the method)."""
    return not dropped and (x.element_size() >= 4 or op.rounds)


def _pull(
    op: Operator, x: Tensor, grad: Tensor, wanted: list[Tensor], need_x: bool
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Gradients of op x: that of x, and those of the tensors the operator is made of."""
    with torch.enable_grad():
        if _denser(op, x):
            with torch.no_grad():
                back = grad @ op.dense() if need_x else None
            return back, torch.autograd.grad(*_sources(op.pull_dense(grad.mT @ x), wanted)) if wanted else ()
        pulled = op.pull(x, grad, need_x)
        if pulled is not None:
            return pulled[0], torch.autograd.grad(*_sources(pulled[1:], wanted)) if wanted else ()
        inner = x.detach().requires_grad_(need_x and not op.by_adjoint)
        y = op.apply(inner) if wanted or inner.requires_grad else None
    if op.by_adjoint:
        with torch.no_grad():
            back = op.T.apply(grad) if need_x else None
        return back, torch.autograd.grad(y, wanted, grad) if wanted else ()  # type: ignore[arg-type]
    sources = [inner, *wanted] if need_x else wanted
    found: Any = torch.autograd.grad(y, sources, grad) if sources else ()  # type: ignore[arg-type]
    return (found[0], found[1:]) if need_x else (None, found)


def _sources(pulled: tuple[Tensor, Tensor], wanted: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Arguments of `torch.autograd.grad`, given a tensor on the way and its gradient."""
    return pulled[0], wanted, pulled[1]


def _again(y: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor) -> Iterator[Tensor | None]:
    """Gradients that can be differentiated once more (`create_graph`), of a result of the plain formula."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return (next(found) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))


def _act(op: Operator, x: Tensor) -> Tensor:
    return F.linear(x, op.dense()) if _denser(op, x) else op.apply(x)


def _denser(op: Operator, x: Tensor) -> bool:
    """Whether a step with the dense form costs less: built twice and differentiated, but no part of it run twice."""
    if type(op).apply is Operator.apply:
        return True
    tokens = x.shape[0]
    if _tiny(op, x):
        return op.brief
    if op.rounds and x.element_size() == 2:
        return True
    build = op.flops_dense(0)
    return 4 * op.flops(tokens) > 3 * op.flops_dense(tokens) + build


def _cheaper_whole(op: Operator, x: Tensor) -> bool:
    """Whether making W + op, in place of which W need not run, costs less than op x."""
    if type(op).apply is Operator.apply or (op.brief and _tiny(op, x)):
        return True
    return op.flops(x.shape[0]) > op.flops_dense(0) + _FRESH * math.prod(op.shape)


def _tiny(op: Operator, x: Tensor) -> bool:
    return math.prod(op.shape) <= _SMALL and x.shape[0] * sum(op.shape) <= _SMALL


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
        if not x.is_floating_point() or not x.numel() or weight.requires_grad or not _plain(x, weight, bias):
            return None
        device = x.device.type
        if device == "meta":
            return None
        if self.update is not self.add and weight.data_ptr() != base.weight.data_ptr():
            return None  # magnitudes are those of the frozen weight, whatever is merged into this one
        return _dtype(x, weight, torch.is_autocast_enabled(device))

    def moved(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias under a sum; `dtype` where the layer has none."""
        add, kind = self.add, type(self.add)
        shift = add.vector if kind is Shift else add.shift if kind is Add else None
        if shift is None:
            return bias
        return shift.to(dtype) if bias is None else bias + shift.to(bias.dtype)

    def _run(self, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        add: Any = self.add
        kind = type(add)
        if kind is After:
            y = self.op.on(_linear(x, weight, None if add.keep_bias else bias))
            return y + bias.to(y.dtype) if add.keep_bias and bias is not None else y
        if kind is Before and self.dropout is None and not torch.is_grad_enabled() and type(self.op) is Diagonal:
            return _linear(self.op.on(x), weight, bias)
        bias = self.moved(bias, x.dtype)
        if kind is Shift:
            return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).mT)  # type: ignore[union-attr]
        if self.thin:
            return _low_rank(
                x, weight, bias, self.op, self.dropout, None if self.update is add else self.update.gain(base)
            )
        return _operator(x, weight, bias, self.op, kind is Before, self.dropout, self.parts)


def no_autocast(x: Tensor) -> Any:
    """A context without autocast on the device of x, where it is on: what runs there has its dtype already."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


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
    if not (dropout is None or type(dropout) is nn.Dropout) or not _plain(*parts) or (update is not add and not thin):
        return None
    return Form(update, add, op, dropout, thin, parts)


def _low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, op: LowRank, dropout: nn.Dropout | None, gain: Tensor | None
) -> Tensor:
    """Low-rank updates, on x (n, in); `gain` (out,) if they are normalised."""
    small = _small(x, weight)
    few = small or (dropout is None and _beside(x, weight))
    # With or without gradients the same elements drop out: reentrant checkpointing runs both ways.
    if (not few and (torch.is_grad_enabled() or dropout)) or (gain is not None and dropout):
        factors = op.down, op.up, float(op.scale), Dropout.draw(dropout.p if dropout else 0.0)
        if gain is None:
            return LowRankLinear.apply(x, weight, bias, *factors)
        return MagnitudeLinear.apply(x, weight, bias, *factors, gain)
    dtype = op.down.dtype if small else x.dtype
    seen = x if dropout is None else dropout(x)
    hidden = _linear(seen if seen.dtype == dtype else seen.to(dtype), op.down) if small else _narrow(seen, op.down)
    y, up = _linear(x, weight, bias if gain is None else None), op.up if op.up.dtype == dtype else op.up.to(dtype)
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
    small = _small(x, weight)
    if not small and (dropout or (torch.is_grad_enabled() and (_denser(op, x) or not _lean(op, x, weight)))):
        if dropout is None and _only_middle(op, x):
            return _through(x, weight, bias, op)
        draw = Dropout.draw(dropout.p if dropout else 0.0)
        return OperatorLinear.apply(op, before, draw, x, weight, bias, *parts)
    seen = x if dropout is None else dropout(x)
    # Several, where methods compute under autocast, or with W.
    dtypes = {part.dtype for part in parts if part.is_floating_point()}
    wide = x.dtype
    if dtypes and small and not op.rounds and (len(dtypes) == 1 or weight.numel() <= _SMALL):
        wide = reduce(torch.promote_types, dtypes)
    op = op.to(wide)
    if wide == x.dtype:
        return _run(op, before, x, seen, weight, bias, dropout is not None)
    changed = _act(op, seen.to(wide))
    if before:
        return _linear(changed.to(x.dtype), weight, bias)
    return _linear(x, weight, bias).add_(changed)


def _only_middle(op: Operator, x: Tensor) -> TypeGuard[Bilinear]:
    """Whether only the middle of a product learns and is no wider than x, and a step with the dense form costs more."""
    if type(op) is not Bilinear or isinstance(op.scale, Tensor) or op.down.requires_grad or op.up.requires_grad:
        return False
    dense = 3 * op.flops_dense(x.shape[0]) + op.flops_dense(0)
    return op.down.shape[0] <= op.down.shape[1] and 2 * op.flops(x.shape[0]) <= dense


def _through(x: Tensor, weight: Tensor, bias: Tensor | None, op: Bilinear) -> Tensor:
    """x Wᵀ + b + op x where `_only_middle` learns: keeps what the middle sees, in place of x."""
    hidden, middle = FrozenLinear.apply(x, op.down, None), as_operator(op.middle)
    changed = OperatorLinear.apply(middle, True, None, hidden, op.up, None, *tensors_of(middle))
    return FrozenLinear.apply(x, weight, bias).add_(changed, alpha=op.scale)


def _lean(op: Operator, x: Tensor, weight: Tensor) -> bool:
    """Whether nodes of torch's own, running the operator on x, keep little for backward."""
    return op.keeps(x) or _beside(x, weight)


def _run(
    op: Operator, before: bool, x: Tensor, seen: Tensor, weight: Tensor, bias: Tensor | None, dropped: bool
) -> Tensor:
    """x Wᵀ + b + op seen, or W op seen + b; all of one dtype, `dropped` if x and `seen` are not the same."""
    if before:
        return _linear(_act(op, seen), weight, bias)
    whole = _summed(op, x, dropped)
    if not (_cheaper_whole(op, x) if whole and not torch.is_grad_enabled() else _denser(op, x)):
        return _linear(x, weight, bias).add_(op.apply(seen))
    if whole:
        return _linear(x, op.onto(weight.to(x.dtype)), bias)
    return _linear(x, weight, bias).addmm_(seen, op.dense().mT)


def _small(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] * (weight.shape[0] + weight.shape[1]) <= _SMALL


def _beside(x: Tensor, weight: Tensor) -> bool:
    """Whether x and y are little beside W: what nodes of torch's own keep of them is, too."""
    out, inner = weight.shape
    return x.shape[0] * (out + inner) * _BESIDE <= out * inner


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


@dataclass(frozen=True)
class Stack:
    """Low-rank updates side by side, padded to one rank: `down` (n, r, in), `up` (n, r, out), scaled."""

    down: Tensor
    up: Tensor
    rate: float
    """Of the dropout that they share."""


def stack(
    updates: Sequence[Update | None], x: Tensor, shape: tuple[int, int], dtype: torch.dtype | None
) -> Stack | None:
    """Low-rank updates (None: none at all) for `mixed`; None if they are not all such, or not plain tensors.

    Args:
        updates: Them.
        x: The input.
        shape: (out, in) of the layer.
        dtype: What the layer computes in, or None: it would refuse x.
    """
    there = [u for u in updates if u is not None]
    rates = set()
    for u in there:
        if not isinstance(u, Add) or not isinstance(u.op, LowRank) or u.op.groups != 1 or u.shift is not None:
            return None
        dropout: Any = u.dropout
        rates.add(0.0 if dropout is None else dropout.p if type(dropout) is nn.Dropout else None)
    if dtype is None or not x.is_floating_point() or len(rates) > 1 or None in rates:
        return None
    ops = [None if u is None else u.op for u in updates]  # type: ignore[union-attr]
    factors = [(None, None) if op is None else (op.down, op.up.mT * op.scale) for op in ops]  # type: ignore[union-attr]
    if not _plain(x, *(factor for pair in factors for factor in pair)):
        return None
    rank = max((down.shape[0] for down, _ in factors if down is not None), default=1)
    return Stack(
        torch.stack([_tall(down, rank, shape[1], x, dtype) for down, _ in factors]),
        torch.stack([_tall(up, rank, shape[0], x, dtype) for _, up in factors]),
        rates.pop() if rates else 0.0,  # type: ignore[arg-type]
    )


def mixed(held: Stack, route: Route, x: Tensor, layer: Callable[[Tensor], Tensor], write: bool = True) -> Tensor:
    """The output of a linear layer for samples with their own low-rank updates, in two products for all of them.

    Samples are gathered by adapter where they are smaller than factors, and factors by sample elsewhere: the cost
    hardly depends on the number of adapters.

    Args:
        held: The distinct updates.
        route: Whose `rows` say which of them each sample has.
        x: Input (batch, …, in).
        layer: Gives the output without them, (batch, tokens, out), in the dtype of the stack, for x of that dtype,
            (batch, tokens, in).
        write: Whether what it gives may be written over.
    """
    samples, out = x.shape[0], held.up.shape[2]
    flat = x.to(held.down.dtype).reshape(samples, -1, x.shape[-1])
    with no_autocast(x):
        y, seen = layer(flat), F.dropout(flat, held.rate) if held.rate else flat
        tokens = flat.shape[1]
        order, back = route.groups(samples, x.device)
        if 2 * order.numel() * tokens <= samples * held.down.shape[1]:
            groups = seen.index_select(0, order.view(-1)).view(order.shape[0], -1, x.shape[-1])
            delta = torch.bmm(torch.bmm(groups, held.down.mT), held.up).view(-1, tokens, out)
            delta = delta.index_select(0, back)
            y = y.add_(delta) if write else y + delta
        else:
            index = route.index(samples, x.device)
            down, up = held.down.index_select(0, index), held.up.index_select(0, index)
            hidden = torch.bmm(seen, down.mT)
            y = y.baddbmm_(hidden, up) if write and not torch.is_grad_enabled() else torch.baddbmm(y, hidden, up)
    return y.view(*x.shape[:-1], out)


def _tall(factor: Tensor | None, rank: int, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor (r, size) with rows of zeros up to `rank`; all zeros for none."""
    if factor is None:
        return like.new_zeros(rank, size, dtype=dtype)
    short = rank - factor.shape[0]
    return F.pad(factor, (0, 0, 0, short)).to(dtype) if short else factor.to(dtype)


def _dtype(x: Tensor, weight: Tensor, autocast: bool) -> torch.dtype | None:
    """The dtype that a linear layer computes in; None where it would refuse, or where autocast leaves x alone."""
    if not autocast:
        return weight.dtype if x.dtype == weight.dtype else None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def can_fuse(module: nn.Module) -> bool:
    """Whether a base layer may be computed past: nothing compiles or transforms its call, or watches it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or _has_any_global_hook():
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _plain(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110  (a loop, since this runs for each layer of each token)
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided):
            return False
    return True
