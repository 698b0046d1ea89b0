"""Slots: what a method keeps per adapter, declared once. This is the only code that creates adapter parameters.

From a method's slots come the per-adapter dicts on the layer, creation on any device (meta included), names in files,
counting, deletion, and the methods table of the docs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peft.errors import ConfigError, MethodError, nearest
from peft.hosts import Host
from peft.hosts.base import bare


class Leaf(nn.Module):
    """A module that only holds `weight`; some names in files expect one where a bare parameter would do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class Vector(Leaf):
    """The same, whose `weight` files call by the name of the module."""


class BufferDict(nn.Module):
    """Tensors by name that move and are saved with the module, but don't train.

    >>> BufferDict({"default": torch.zeros(2, 3)})
    BufferDict(default: float32 (2, 3))
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        for name, tensor in (tensors or {}).items():
            self[name] = tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._buffers[name] = tensor
        (self._non_persistent_buffers_set.discard if self.persistent else self._non_persistent_buffers_set.add)(name)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._buffers[name]
        assert tensor is not None
        return tensor

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def items(self):
        return self._buffers.items()

    def keys(self):
        return self._buffers.keys()

    def extra_repr(self) -> str:
        held = [(name, self[name]) for name in self]
        return "\n".join(f"{name}: {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in held)


class AnyDict(nn.ModuleDict):
    """Modules, parameters and buffers by name: where methods call different things alike, as LoRA and AdaLoRA do."""

    def _kinds(self) -> tuple[dict[str, Any], ...]:
        return self._modules, self._parameters, self._buffers

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self:
            del self[name]
        kind = 0 if isinstance(value, nn.Module) else 1 if isinstance(value, nn.Parameter) else 2
        self._kinds()[kind][name] = value

    def _kind(self, name: str) -> dict[str, Any]:
        return next((kind for kind in self._kinds() if name in kind), self._modules)

    def __getitem__(self, name: str) -> Any:
        return self._kind(name)[name]

    def __delitem__(self, name: str) -> None:
        del self._kind(name)[name]

    def __contains__(self, name: str) -> bool:
        return name in self._kind(name)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._parameters, **self._buffers})

    def __len__(self) -> int:
        return sum(map(len, self._kinds()))

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()


_LARGEST = 1 << 40
"""More elements than any adapter's tensor has: a mistake in a config."""

Shape = str | Callable[["Sizes"], Any]


@cache
def _terms(spec: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The factors and divisors of each dimension of a shape."""
    terms = [term.split("/") for term in spec.split()]
    return [(tuple(head.split("*")), tuple(divisors)) for head, *divisors in terms]


class Sizes(dict):
    """Sizes of one adapter on one layer: `in`, `out`, the layout of the host, and the method's settings."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def shape(self, spec: Shape) -> tuple[int, ...]:
        """The shape that a slot's `shape` describes: dims apart by spaces, each a product or exact quotient of names.

        >>> Sizes({"in": 6, "out": 4, "b": 2}).shape("out/b in/b b")
        (2, 3, 2)
        """
        if callable(spec):
            return tuple(spec(self))
        return tuple(self._size(*term) for term in _terms(spec))

    def _size(self, factors: tuple[str, ...], divisors: tuple[str, ...]) -> int:
        value = math.prod(self._value(factor) for factor in factors)
        for divisor in divisors:
            by = self._value(divisor)
            if value % by:
                raise ConfigError(f"{'*'.join(factors)} = {value} must be divisible by {divisor} = {by}")
            value //= by
        return value

    def _value(self, name: str) -> int:
        value = int(name) if name.isdigit() else self.get(name)
        if value is None:
            known = [size for size, number in self.items() if isinstance(number, int)]
            raise MethodError(
                f"no size {name!r}; known: {', '.join(known)};{nearest(name, known)} return it from resolve()"
            )
        return value


_KINDS = ("parameter", "down", "up", "leaf", "leaves", "vector", "group", "buffer")


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter. Raises `MethodError` for a kind or a shape that is none.

    Args:
        name: Name of the dict on the layer, and in files.
        shape: Its shape as a matrix method sees it, e.g. `"r in"`; see `Sizes.shape`. A callable gets the `Sizes`.
        kind: `"parameter"`; `"down"` or `"up"`: the first or second of two thin factors, held by a small layer of the
            host's type (`nn.Linear`, a convolution); `"leaf"`, `"vector"`: a module with a `weight`, which files call
            by its full name or by that of the module; `"leaves"`: a list of such modules, `shape` a callable that
            lists their shapes; `"group"`: parameters by name, their shapes a dict; `"buffer"`: a tensor that does not
            train.
        trains: Whether gradient descent changes it.
        saved: Whether files hold it; or the config field that says so.
        bias: For `"up"`: a bias (out,), if this setting is true.
        when: The setting that must be true for the slot to exist; None: always.
        factor: Whether it is named as a factor, although its kind is none: embeddings say `hira_embedding_A`.
        dtype: A fixed dtype (indices); None: that of adapters.
    """

    name: str
    shape: Shape
    kind: str = "parameter"
    trains: bool = True
    saved: bool | str = True
    bias: str | None = None
    when: str | None = None
    factor: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise MethodError(
                f"Slot {self.name!r}: there is no kind {self.kind!r}.{nearest(self.kind, _KINDS)} "
                f"Kinds: {', '.join(_KINDS)}."
            )
        if self.kind in ("leaves", "group") and not callable(self.shape):
            raise MethodError(f"Slot {self.name!r}: the shape of {self.kind!r} is a callable that gets the `Sizes`.")
        if not isinstance(self.shape, str) and not callable(self.shape):
            raise MethodError(
                f"Slot {self.name!r}: a shape is a string of dims ('r in') or a callable that gets the `Sizes`, not "
                f"{self.shape!r}."
            )

    @property
    def derived(self) -> bool:
        """Whether it follows from the config and the base layer (`WeightMethod.derive`), so that no file holds it."""
        return self.saved is not True and (self.kind == "buffer" or not self.trains)

    def is_saved(self, config: Any) -> bool:
        """Whether files of an adapter with this config hold it."""
        return bool(getattr(config, self.saved)) if isinstance(self.saved, str) else self.saved

    @property
    def host_names_it(self) -> bool:
        """Whether the name it is stored under depends on the layer type."""
        return self.factor or self.kind in ("down", "up")

    def exists(self, sizes: Mapping[str, Any]) -> bool:
        """Whether an adapter with these settings has it."""
        return self.when is None or bool(sizes[self.when])


def create(slot: Slot, host: Host, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module | Tensor:
    """Allocate what a slot holds, unfilled: a module, a parameter or a plain tensor (buffers)."""
    dtype = slot.dtype or dtype
    if slot.kind == "group":
        return group(slot.shape(sizes), device, dtype)  # type: ignore[operator,arg-type]
    if slot.kind == "leaves":
        return nn.ModuleList(Leaf(torch.empty(s, device=device, dtype=dtype)) for s in slot.shape(sizes))  # type: ignore[operator]
    try:
        shape = sizes.shape(slot.shape)
    except MethodError as error:
        raise MethodError(f"slot {slot.name} {slot.shape!r}: {error}") from None
    if math.prod(shape) > _LARGEST:
        raise ConfigError(f"{slot.name} would have {math.prod(shape):,} elements (shape {tuple(shape)})")
    if slot.kind in ("down", "up"):
        leaf = host.leaf(slot.kind, shape, device, dtype)
        if leaf is not None:
            if slot.bias and sizes[slot.bias]:
                leaf.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
            return leaf
    empty = torch.empty(shape, device=device, dtype=dtype)
    if slot.kind == "buffer":
        return empty
    if slot.kind in ("leaf", "vector"):
        return (Leaf if slot.kind == "leaf" else Vector)(empty)
    return nn.Parameter(empty, requires_grad=slot.trains)


def group(shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> nn.ParameterDict:
    """Parameters by name, unfilled."""
    return nn.ParameterDict({name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()})


def container(value: nn.Module | Tensor, saved: bool) -> nn.Module:
    """The per-adapter dict that holds such a value."""
    if isinstance(value, nn.Parameter):
        return nn.ParameterDict()
    return bare(nn.ModuleDict) if isinstance(value, nn.Module) else BufferDict(persistent=saved)


def room(held: nn.Module | None, value: nn.Module | Tensor, saved: bool) -> nn.Module:
    """A per-adapter dict for such a value beside those that are there: `held` itself, if it can take it."""
    fresh = container(value, saved)
    if held is None or type(held) in (type(fresh), AnyDict):
        return fresh if held is None else held
    mixed = AnyDict()
    for name, other in held.items():  # type: ignore[operator]
        mixed[name] = other
    mixed.training = held.training
    return mixed


def tensor_of(value: nn.Module | Tensor) -> Any:
    """The tensor of a slot's value as a method sees it: factors of convolutions as matrices.

    A group stays a dict; several leaves are a list.
    """
    if value.__class__ is nn.Parameter or isinstance(value, Tensor):
        return value
    if value.__class__ is nn.Linear or isinstance(value, nn.Linear):
        weight = value._parameters.get("weight")  # attributes of modules are looked up slowly
        return value.weight if weight is None else weight
    if isinstance(value, (nn.ParameterDict, BufferDict)):
        return value
    if isinstance(value, nn.ModuleList):
        return [leaf.weight for leaf in value]
    if isinstance(value, nn.Module):
        weight: Any = value.weight
        return weight.flatten(1) if weight.dim() > 2 and not isinstance(value, Vector) else weight
    return value


def adapter_dtype(base: torch.dtype, autocast: bool = True) -> torch.dtype:
    """The dtype in which an adapter trains: float32 for half precision and quantised bases, else that of the base."""
    if not base.is_floating_point or base.itemsize == 1:
        return torch.float32
    return torch.float32 if autocast and base in (torch.float16, torch.bfloat16) else base
