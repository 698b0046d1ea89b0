"""Batches in which each sample has its own adapter: all low-rank updates of a layer in two products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft import autograd, routing

if TYPE_CHECKING:
    from peft.layer import AdaptedLayer


def batched(layer: AdaptedLayer, rows: tuple[str, ...], x: Tensor) -> Tensor | None:
    """The layer's output for x, each sample with the adapter that `rows` names; None if the updates are not low-rank.

    In inference the stacked factors are kept until an adapter changes, or other adapters are asked for.
    """
    if not layer.host.on_input or x.dim() < 2:
        return None
    distinct = dict.fromkeys(rows)
    stacks = [layer._stack(routing.use(None if n == routing.BASE else n)) for n in distinct]
    if any(len(stack) > 1 for stack in stacks) or not autograd.can_fuse(layer.host.module):
        return None
    names = tuple(stack[0] if stack else None for stack in stacks)
    state = _state(layer, names)
    if state is None:
        return None
    weight, bias = layer._frozen(layer.host)
    keep = not torch.is_grad_enabled() and not layer._banks and not layer._leaders
    key = (names, x.dtype, x.device, torch.is_autocast_enabled(x.device.type), layer.training, tuple(state[1]))
    kept = layer._caches.get("rows") if keep else None
    if kept is None or kept[0] != key:
        updates = [None if name is None else layer.updates((name,), running=True)[0] for name in names]
        stacked = autograd.stack(updates, x, weight)
        if stacked is None:
            return None
        kept = (key, state[0], stacked)  # the tensors are held, so that no other one gets their identity
        if keep:
            layer._caches["rows"] = kept
    route = routing.current()
    route = route if route is not None and route.rows == rows else routing.Route(rows=rows)
    return autograd.mixed(kept[2], route.index(x.shape[0], x.device), x, weight, bias)


def _state(layer: AdaptedLayer, names: tuple[str | None, ...]) -> tuple[list[Tensor], list[Any]] | None:
    """All that adapters on a layer consist of: tensors, and values that change when anything does; None under hooks."""
    tensors: list[Tensor] = []
    values: list[Any] = []
    holders = [held for name, held in layer._modules.items() if held is not None and name != "base_layer"]
    settings = [held for s in layer.other_param_names if isinstance(held := layer.__dict__.get(s), dict)]
    for name in names:
        if name is None:
            continue
        for held in holders:
            leaf: nn.Module | None = held._modules.get(name)
            if leaf is not None:
                if leaf._forward_hooks or leaf._forward_pre_hooks or leaf._backward_hooks or leaf._backward_pre_hooks:
                    return None
                tensors += [p for p in leaf._parameters.values() if p is not None]
            elif (own := held._parameters.get(name)) is not None:
                tensors.append(own)
        for held in settings:
            value = held.get(name)
            if isinstance(value, Tensor):
                tensors.append(value)
            else:
                values.append(value)
    for tensor in tensors:
        values += (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tensors, values
