"""Fused forms of what layers compute: fewer passes over memory, and only the input kept for backward.

A fused form never changes meaning: it stands in for the plain path where everything is a plain dense tensor, and tests
hold the two equal, gradients too. Under `torch.compile` the plain path runs, which the compiler fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.operators import LowRank
from peft.updates import Add, Base, Magnitude, Update

_PLAIN = (Tensor, nn.Parameter)


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + s (D x) Aᵀ Bᵀ, D a dropout or the identity.

    Keeps x for backward, and nothing of size tokens × r or larger: the product with A and the dropout mask are made
    again. Shapes: x (n, in), W (out, in), b (out,) or None, A (r, in), B (out, r); all of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, rate: float) -> Tensor:
        state = _draw(x) if rate else None
        hidden = F.linear(_drop(x, rate, state), down)
        y = F.linear(x, weight, bias)
        y.addmm_(hidden, up.mT, alpha=scale)
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale, ctx.rate, ctx.state = scale, rate, state
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_hidden = (grad @ up).mul_(ctx.scale) if needs[0] or needs[3] else None
        grad_x = grad_down = grad_up = grad_bias = None
        if needs[3] or needs[4]:
            seen = _drop(x, ctx.rate, ctx.state)
            if needs[4]:
                grad_up = grad.mT @ F.linear(seen, down).mul_(ctx.scale)
            if needs[3]:
                grad_down = grad_hidden.mT @ seen  # type: ignore[union-attr]
            del seen
        if needs[0]:
            grad_x = grad @ weight
            if ctx.rate:
                grad_x.add_(_drop(grad_hidden @ down, ctx.rate, ctx.state))  # type: ignore[operator]
            else:
                grad_x.addmm_(grad_hidden, down)  # type: ignore[arg-type]
        if needs[2]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None


class MagnitudeLinear(torch.autograd.Function):
    """g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / norm per output: DoRA in one pass (arXiv 2402.09353).

    Keeps x and the product before scaling. Shapes as in `LowRankLinear`; gain (out,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, gain: Tensor) -> Tensor:
        z = F.linear(x, weight)
        z.addmm_(F.linear(x, down), up.mT, alpha=scale)
        ctx.save_for_backward(x, weight, down, up, gain, z)
        ctx.scale = scale
        return z * gain if bias is None else torch.addcmul(bias, z, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gain, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_gain = (grad * z).sum(0) if needs[6] else None
        grad_bias = grad.sum(0) if needs[2] else None
        grad = grad * gain
        grad_hidden = (grad @ up).mul_(ctx.scale)
        grad_up = grad.mT @ F.linear(x, down).mul_(ctx.scale) if needs[4] else None
        grad_down = grad_hidden.mT @ x if needs[3] else None
        grad_x = None
        if needs[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_hidden, down)
        return grad_x, None, grad_bias, grad_down, grad_up, None, grad_gain


def fused(updates: list[Update], base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a linear layer under these updates, if there is a fused form for them; else None.

    Args:
        updates: The stack.
        base: The frozen layer.
        x: Input (…, in).
        weight: W (out, in), with whatever is merged.
        bias: b (out,), or None.
    """
    if len(updates) != 1 or not x.is_floating_point() or x.device.type == "meta":
        return None
    update = updates[0]
    add = update.inner if isinstance(update, Magnitude) else update
    if not isinstance(add, Add) or not isinstance(add.op, LowRank) or add.op.groups != 1 or add.shift is not None:
        return None
    op = add.op
    if not _plain(x, weight, bias, op.down, op.up) or weight.requires_grad or isinstance(op.scale, Tensor):
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if x.dtype != dtype and x.dtype == torch.float64:
        return None
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    rate = getattr(add.dropout, "p", None) if add.dropout is not None else 0.0
    if rate is None or type(add.dropout) not in (type(None), nn.Dropout):
        return None
    frozen = weight.to(dtype), None if bias is None else bias.to(dtype)
    thin = op.down.to(dtype), op.up.to(dtype), float(op.scale)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(update, Magnitude):
            if rate or weight.data_ptr() != base.weight.data_ptr():  # magnitudes are those of the frozen weight
                return None
            y = MagnitudeLinear.apply(flat, *frozen, *thin, update.gain(base).to(dtype))
        else:
            y = LowRankLinear.apply(flat, *frozen, *thin, rate)
    return y.view(*x.shape[:-1], weight.shape[0])


def can_fuse(module: nn.Module, *leaves: Any) -> bool:
    """Whether nothing watches these modules being called, so that they may be computed past."""
    if torch.compiler.is_compiling():
        return False
    for item in (module, *leaves):
        if isinstance(item, nn.Module) and (
            item._forward_hooks or item._forward_pre_hooks or item._backward_hooks or item._backward_pre_hooks
        ):
            return False
    return not (torch.nn.modules.module._has_any_global_hook())


def _plain(*tensors: Tensor | None) -> bool:
    return all(t is None or (type(t) in _PLAIN and t.layout is torch.strided) for t in tensors)


def _draw(x: Tensor) -> Any:
    """What it takes to make the same random mask again: a seed drawn from the default generator."""
    if x.device.type == "cpu":
        return int(torch.randint(2**62, (), dtype=torch.int64))
    return torch.get_device_module(x.device.type).get_rng_state(x.device)


def _drop(x: Tensor, rate: float, state: Any) -> Tensor:
    """x with a share `rate` of its elements zeroed and the others scaled up, the same ones for the same state."""
    if not rate:
        return x
    if rate >= 1:
        return torch.zeros_like(x)
    generator = torch.Generator(device=x.device)
    if x.device.type == "cpu":
        generator.manual_seed(state)
    else:
        generator.set_state(state)
    mask = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return mask.mul_(1 / (1 - rate)).mul_(x)
