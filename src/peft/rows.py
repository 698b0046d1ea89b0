"""Batches in which each sample has its own adapter: low-rank updates in two products, others in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft import autograd, routing
from peft.errors import StateError, UnsupportedError
from peft.holder import AdapterHolder
from peft.hosts import Host
from peft.parts import Call

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
    if not args and not kwargs and len(set(rows)) > 1 and not isinstance(layer._modules["base_layer"], AdapterHolder):
        _check_shared_out(rows, x.shape[dim])
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
    _check_shared_out(rows, size)
    return [name for name in rows for _ in range(size // len(rows))]


def _check_shared_out(rows: Sequence[str], size: int) -> None:
    if size % len(rows):
        raise StateError(
            f"adapter_names has {len(rows)} entries, but the batch that reaches this layer has {size} rows. "
            "Give one name per sample."
        )


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
    host = layer.host
    if not host.on_input or x.dim() < 2 or not autograd.can_fuse(host.module):
        return None
    dtype = _dtype(layer, host, x)
    names = tuple(n if n in layer._adapters else None for n in dict.fromkeys(rows))
    key = (names, x.dtype, dtype, x.device, torch.is_autocast_enabled(x.device.type), layer.training)
    keep = not torch.is_grad_enabled() and not layer._banks and not layer._leaders
    kept: Kept | None = layer._caches.get("rows") if keep else None
    parts = _parts(layer, names)
    if kept is not None and kept.key == key and kept.stands(parts):
        if any(kept.hooks):
            return None
        stacked = kept.stack
    else:
        modules = [part for part in parts if isinstance(part, nn.Module)]
        hooks = [hooks for module in modules for hooks in _hooks(module)]
        if any(hooks):
            return None
        updates = [None if name is None else layer.updates((name,), running=True)[0] for name in names]
        stacked = autograd.stack(updates, x, (host.out_features, host.in_features), dtype)
        if stacked is None:
            return None
        if keep:
            layer._caches["rows"] = Kept.of(key, parts, modules, hooks, stacked)
    route = routing.current()
    route = route if route is not None and route.rows == rows else routing.Route(rows=rows)
    if not host.opaque:
        weight, bias = layer._frozen(host)
        return autograd.mixed(stacked, route, x, partial(autograd.linear, weight=weight, bias=bias))
    y = Call(layer, host, (), {}).run(x)
    return autograd.mixed(stacked, route, x, lambda flat: y.view(*flat.shape[:-1], -1).to(flat.dtype), False).to(
        y.dtype
    )


def _dtype(layer: AdaptedLayer, host: Host, x: Tensor) -> torch.dtype | None:
    """The dtype that the adapters of a linear layer compute in; None where its weight is not a plain tensor."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if host.opaque:
        return torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
    weight = layer._frozen(host)[0]
    return autograd.computes_in(x, weight, autocast) if autograd.plain(weight) else None


@dataclass(frozen=True)
class Kept:
    """Stacked factors, with all that they were made of: they stand as long as none of it changes.

    Things are compared by identity, and held so that no other one gets theirs; this runs in each call of each layer,
    so the loops are those of the interpreter.
    """

    key: tuple[Any, ...]
    parts: list[Any]
    hooks: list[dict[int, Any]]
    """Those of the modules among `parts`, whether there are any or not."""
    homes: list[dict[str, Any]]
    """Where these modules have their parameters."""
    own: list[Any]
    """The parameters there."""
    tensors: list[Tensor]
    changes: tuple[list[int], list[int]]
    stack: autograd.Stack

    @classmethod
    def of(
        cls, key: tuple[Any, ...], parts: list[Any], modules: list[nn.Module], hooks: list[Any], stack: autograd.Stack
    ) -> Kept | None:
        """None if changes of these parts would go unseen: inference tensors don't count theirs."""
        homes: list[dict[str, Any]] = [module._parameters for module in modules]
        own = list(chain.from_iterable(map(dict.values, homes)))
        tensors = [t for t in (*parts, *own) if isinstance(t, Tensor)]
        if any(module._modules or module._buffers for module in modules) or any(t.is_inference() for t in tensors):
            return None
        return cls(key, parts, hooks, homes, own, tensors, _changes(tensors), stack)

    def stands(self, parts: list[Any]) -> bool:
        """Whether nothing has changed, given the parts of now."""
        return (
            len(parts) == len(self.parts)
            and all(map(is_, parts, self.parts))
            and all(map(is_, chain.from_iterable(map(dict.values, self.homes)), self.own))
            and sum(map(len, self.homes)) == len(self.own)
            and _changes(self.tensors) == self.changes
        )


_version = attrgetter("_version")
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _changes(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """What differs once a tensor was written to, or was given other memory."""
    return list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))


def _parts(layer: AdaptedLayer, names: tuple[str | None, ...]) -> list[Any]:
    """The modules, tensors and settings that adapters on a layer consist of; None where there is none."""
    found: list[Any] = []
    for name, held in layer._modules.items():
        if held is not None and name != "base_layer":
            homes: Any = held._modules, held._parameters, held._buffers
            for home in homes:
                if home:
                    found += map(home.get, names)
    for setting in layer.other_param_names:
        values: Any = layer.__dict__.get(setting)
        if values.__class__ is dict:
            found += map(values.get, names)
    return found
