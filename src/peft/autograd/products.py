"""Products of activations with weights, thin factors and operators, and the gradients of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.autograd.costs import cheaper_whole, denser, summed
from peft.operators import Dense, Operator
from peft.operators.base import filled, narrow


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in the dtype of x."""
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return F.linear(x, weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype))


def thin_grads(
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
            hidden = narrow(x, down).mul_(scale)
        grad_up = (hidden.mT @ grad).mT.to(up.dtype, memory_format=torch.contiguous_format)
    return grad_down, grad_up


def act(op: Operator, x: Tensor) -> Tensor:
    """op x for x (n, in) of the operator's dtype, by its dense form where that costs less."""
    return F.linear(x, op.dense()) if denser(op, x) else op.apply(x)


def with_operator(
    op: Operator, before: bool, x: Tensor, seen: Tensor, weight: Tensor, bias: Tensor | None, dropped: bool
) -> Tensor:
    """x Wᵀ + b + op seen, or W op seen + b; all of one dtype, `dropped` if x and `seen` are not the same."""
    if before:
        return linear(act(op, seen), weight, bias)
    whole = summed(op, x, dropped)
    if not (cheaper_whole(op, x) if whole and not torch.is_grad_enabled() else denser(op, x)):
        return op.over(linear(x, weight, bias), seen)
    if whole:
        return linear(x, op.onto(weight.to(x.dtype)), bias)
    return linear(x, weight, bias).addmm_(seen, op.dense().mT)


def plus(y: Tensor, more: Tensor, write: bool, scale: float = 1.0) -> Tensor:
    """y + scale · more, in the dtype of y, and over it if `write`."""
    return y.add_(more, alpha=scale) if write else torch.add(y, more.to(y.dtype), alpha=scale)


def product_over(y: Tensor, hidden: Tensor, up: Tensor, scale: float, write: bool) -> Tensor:
    """y (…, out) + scale · hidden (n, r) upᵀ, over y if `write`; no gradients."""
    up = up.to(hidden.dtype)
    if hidden.dtype != y.dtype:
        return plus(y, (hidden @ up.mT).view(y.shape), write, scale)
    flat = y.reshape(-1, y.shape[-1])
    if write:
        flat.addmm_(hidden, up.mT, alpha=scale)
        return y
    return torch.addmm(flat, hidden, up.mT, alpha=scale).view(y.shape)


def added(y: Tensor, op: Operator, x: Tensor, write: bool) -> Tensor:
    """y (…, out) + op x for x (n, in) of the operator's dtype, over y if `write`; no gradients."""
    if isinstance(op, Dense):
        return product_over(y, x, op.matrix, 1.0, write)
    if write and x.dtype == y.dtype and not denser(op, x):
        op.over(y.view(-1, y.shape[-1]), x)
        return y
    return plus(y, act(op, x).view(y.shape), write)


def pulled(
    held: Any, parts: Sequence[Tensor], x: Tensor, grad: Tensor, need_x: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of op x, given the operator's shell and `parts`: that of x, and those of the parts that need one."""
    if torch.is_grad_enabled():
        found = again(act(filled(held, iter(parts)).to(x.dtype), x), (x, *parts), (need_x, *needs), grad)
        return next(found), list(found)
    acting, wanted = revived(held, parts, needs, x.dtype)
    back, some = pull(acting, x, grad, wanted, need_x)
    return back, list(spread(some, needs))


def pull(
    op: Operator, x: Tensor, grad: Tensor, wanted: list[Tensor], need_x: bool, dense: bool | None = None
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Gradients of op x: that of x, and those of the tensors the operator is made of; by its dense form if `dense`
    (None: where that costs less)."""
    if not isinstance(op, Dense) and (denser(op, x) if dense is None else dense):
        with torch.no_grad():
            back = grad @ op.dense() if need_x else None
        return back, pull_dense(op, x, grad, wanted)
    with torch.enable_grad():
        pulled = op.pull(x, grad, need_x)
        if pulled is not None:
            return pulled[0], _through(*pulled[1:], wanted)
        inner = x.detach().requires_grad_(need_x and not op.by_adjoint)
        y = op.apply(inner) if wanted or inner.requires_grad else None
    if op.by_adjoint:
        with torch.no_grad():
            back = op.T.apply(grad) if need_x else None
        return back, torch.autograd.grad(y, wanted, grad) if wanted else ()  # type: ignore[arg-type]
    sources = [inner, *wanted] if need_x else wanted
    found: Any = torch.autograd.grad(y, sources, grad) if sources else ()  # type: ignore[arg-type]
    return (found[0], found[1:]) if need_x else (None, found)


def pull_dense(op: Operator, x: Tensor, grad: Tensor, wanted: list[Tensor]) -> Sequence[Tensor]:
    """Gradients of the tensors that the operator in op x is made of, by way of its dense form."""
    if not wanted:
        return ()
    with torch.enable_grad():
        return _through(*op.pull_dense(grad.mT @ x), wanted)


def _through(way: Any, grad: Any, wanted: list[Tensor]) -> Sequence[Tensor]:
    """The gradients that are wanted, given a tensor (or several) on the way and its gradient."""
    if not wanted:
        return ()
    if len(wanted) == 1 and way is wanted[0] and grad.dtype == way.dtype:
        return (grad,)
    return torch.autograd.grad(way, wanted, grad)


def again(y: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor) -> Iterator[Tensor | None]:
    """Gradients that can be differentiated once more (`create_graph`), of a result of the plain formula."""
    wanted = [t is not None and need for t, need in zip(inputs, needs, strict=True)]
    sources = [t for t, want in zip(inputs, wanted, strict=True) if t is not None and want]
    return spread(torch.autograd.grad(y, sources, grad, create_graph=True), wanted)


def revived(
    op: Operator, parts: Sequence[Tensor], needs: Sequence[bool], dtype: torch.dtype
) -> tuple[Operator, list[Tensor]]:
    """The operator of a saved shell in `dtype`, on leaves of its own graph; and those of them that need gradients."""
    held = [t.detach().requires_grad_() if need else t for t, need in zip(parts, needs, strict=True)]
    with torch.enable_grad():
        acting = filled(op, iter(held)).to(dtype)
    return acting, [t for t, need in zip(held, needs, strict=True) if need]


def spread(found: Sequence[Tensor], needs: Sequence[bool]) -> Iterator[Tensor | None]:
    """Gradients at the places that need one, None at the others."""
    rest = iter(found)
    return (next(rest) if need else None for need in needs)
