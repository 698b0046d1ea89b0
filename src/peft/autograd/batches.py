"""Batches whose samples have low-rank updates of their own, in two products for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.autograd.guards import no_autocast, plain
from peft.operators import LowRank
from peft.routing import Route
from peft.updates import Add, Update


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
    if not plain(x, *(factor for pair in factors for factor in pair)):
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
