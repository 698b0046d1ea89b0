"""Batches in which each sample has its own adapter: low-rank updates in two products, others in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft import autograd, routing
from peft.errors import StateError, UnsupportedError
from peft.holder import AdapterHolder

if TYPE_CHECKING:
    from peft.layer import AdaptedLayer


def each_row(layer: AdaptedLayer, rows: tuple[str, ...], x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The layer's output where each sample has its own adapter.

    Raises:
        UnsupportedError: this layer can't know whose samples it sees.
        StateError: the batch is not made of as many rows for each name.
    """
    if layer._dispatched and len(set(rows)) > 1:
        raise UnsupportedError(
            f"adapter_names mixes {sorted(set(rows))}, but this layer is one expert of many: it sees the tokens "
            "that were sent to it and can't know whose samples they are. Run one adapter at a time "
            "(model.use(name)), or leave the experts out of target_modules."
        )
    dim = layer.host.rows(x, kwargs)
    if len(set(rows)) > 1 and not args and not kwargs and not isinstance(layer.base_layer, AdapterHolder):
        _spread(rows, x.shape[dim])
        y = batched(layer, rows, x)
        if y is not None:
            return y

    def run(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer._forward(layer._stack(routing.current()), x, args, kwargs)

    return in_turns(run, rows, dim, x.shape[dim], (x, *args), kwargs)


def in_turns(
    run: Callable[..., Any],
    rows: Sequence[str],
    dim: int,
    size: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run the samples of each name together, on its route, and put the outputs back into the order of the batch.

    Args:
        run: Called with a name, and what of args and kwargs belongs to its samples.
        rows: A name per sample; each stands for as many neighbouring rows as the batch has per name.
        dim: The dimension in which tensors have their rows.
        size: Rows of the batch; tensors with another size are for all samples.
        args: For `run`.
        kwargs: For `run`.

    Raises:
        StateError: the rows can't be shared out evenly.
    """
    names = list(dict.fromkeys(rows))
    each = _spread(rows, size) if len(names) > 1 else []
    device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    parts: list[tuple[Tensor, Any]] = []
    for name in names:
        with routing.route(routing.use(None if name == routing.BASE else name)):
            if len(names) == 1:
                return run(name, *args, **kwargs)
            index = torch.tensor([i for i, n in enumerate(each) if n == name], device=device)
            pick = partial(_pick, index=index, dim=dim, size=size)
            picked = {key: pick(value) for key, value in kwargs.items()}
            parts.append((index, run(name, *map(pick, args), **picked)))
    return _join(parts, dim, size)


def _spread(rows: Sequence[str], size: int) -> list[str]:
    """The name of each row of a batch, given a name per sample."""
    if size % len(rows):
        raise StateError(
            f"adapter_names has {len(rows)} entries, but the batch that reaches this layer has {size} rows. "
            "Give one name per sample."
        )
    return [name for name in rows for _ in range(size // len(rows))]


def _pick(value: Any, index: Tensor, dim: int, size: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == size:
        return value.index_select(dim, index)
    return value


def _join(parts: list[tuple[Tensor, Any]], dim: int, size: int) -> Any:
    """Put outputs of some rows each back into the order of the batch; tuples (attention) element by element."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_join([(i, y[k]) for i, y in parts], 0 if k else dim, size) for k in range(len(first)))
    if first is None:
        return None
    order = torch.cat([index for index, _ in parts]).argsort()
    return torch.cat([y for _, y in parts], dim).index_select(dim, order)


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
    return autograd.mixed(kept[2], route, x, weight, bias)


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
