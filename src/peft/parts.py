"""What methods and updates see of a layer: one adapter's parts by attribute, and the frozen layer during a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.errors import nearest
from peft.hosts import Host
from peft.hosts.base import fetched
from peft.method import Site, WeightMethod, method_of
from peft.operators import Operator
from peft.slots import tensor_of

if TYPE_CHECKING:
    from peft.layer import AdaptedLayer


_NOTHING: Any = object()
_TENSORS = (Tensor, nn.Parameter)

Read = tuple[Any, Any, Any]
"""A dict, a key and the value that was read there. None for the layer's own dict, which would hold itself."""
UNSEEN: Read = ({}, "", _NOTHING)
"""A read that can't be looked at again."""


class Parts:
    """One adapter on one layer, as its method sees it: slots as tensors, settings, banks, by attribute."""

    def __init__(
        self,
        layer: Any,
        adapter: str,
        site: Site | None = None,
        running: bool = False,
        reads: list[Read] | None = None,
    ) -> None:
        self.layer: AdaptedLayer = layer
        self.adapter = adapter
        self.site = site
        """Where the adapter is being put; only while it is (`derive` and `reset`)."""
        self.running = running
        """Whether the update is for a forward pass. Merging and conversion know no dropout and no noise."""
        self._reads = reads
        """Where to note what is read; None: nowhere."""

    def __getattr__(self, name: str) -> Any:
        value = self._find(name)
        if value is _NOTHING:
            raise AttributeError(self._unknown(name))
        return value

    def _find(self, name: str) -> Any:
        layer, adapter, reads = self.layer, self.adapter, self._reads
        values: Any = layer.__dict__.get(name)
        if values.__class__ is dict and adapter in values:
            value = values[adapter]
            if reads is not None:
                reads += (None, name, values), (values, adapter, value)
            return value
        held: Any = layer._modules.get(layer._stored.get(name, name))
        if held is not None:
            # Where dicts of modules, of parameters and of buffers keep their values: this runs in each call.
            home = held._modules
            value = home.get(adapter)
            if value is None:
                home = held._parameters
                value = home.get(adapter)
            if value is None:
                home = held._buffers
                value = home.get(adapter)
            if value is not None:
                tensor = tensor_of(value)
                if tensor.__class__ in _TENSORS and tensor.is_meta:
                    tensor = _brought(held, adapter, value, tensor)
                if reads is not None:
                    reads += _read(home, adapter, value, tensor)
                return tensor
            if adapter in held:
                if reads is not None:
                    reads.append(UNSEEN)
                return tensor_of(held[adapter])
        bank: Any = layer._banks.get(name)
        if bank is not None and adapter in bank:
            value = bank[adapter]
            if reads is not None:
                home = bank._parameters if adapter in bank._parameters else bank._buffers
                reads.append((home, adapter, value) if isinstance(value, Tensor) else UNSEEN)
            return value
        return _NOTHING

    def _unknown(self, name: str) -> str:
        method = self.method
        known = [*(slot.name for slot, _ in self.layer.slots(self.adapter)), *method.settings]
        known += [bank for bank, held in self.layer._banks.items() if self.adapter in held]  # type: ignore[operator]
        return (
            f"adapter {self.adapter!r} of {method.peft_type} has no slot, setting or bank {name!r} here."
            f"{nearest(name, known)} It has: {', '.join(known)}."
        )

    def has(self, name: str) -> bool:
        """Whether the adapter has this slot, setting or bank."""
        return self._find(name) is not _NOTHING

    @property
    def config(self) -> Any:
        """The config of the adapter."""
        if self._reads is not None:
            self._reads.append(UNSEEN)  # its fields can be set at any time
        return self.layer._adapters[self.adapter]

    @property
    def method(self) -> WeightMethod:
        """The method of the adapter."""
        return method_of(self.layer._adapters[self.adapter])

    @property
    def training(self) -> bool:
        """Whether this is a forward pass in training mode."""
        layer = self.layer
        if self._reads is not None:
            self._reads.append((None, "training", layer.training))
        return self.running and layer.training

    @property
    def dropout(self) -> nn.Module | None:
        """The dropout to apply now: None in evaluation, when its rate is zero, and where inputs are indices."""
        layer = self.layer
        name = self.method.dropout if self.running and not layer.host_cls.one_hot else None
        home: Any = layer._modules[name]._modules if name else {}  # type: ignore[union-attr]
        module = home.get(self.adapter)
        if self._reads is not None and module is not None:
            self._reads += (home, self.adapter, module), (module.__dict__, "training", module.training)
        return module if module is not None and module.training and not isinstance(module, nn.Identity) else None

    def call(self, host: Host) -> Call:
        """The frozen layer, as updates see it."""
        return Call(self.layer, host, (), {})

    def leaf(self, name: str) -> Any:
        """The module (or parameter) that holds a slot."""
        if self._reads is not None:
            self._reads.append(UNSEEN)
        return self.layer._modules[self.layer._stored.get(name, name)][self.adapter]  # type: ignore[index]


def _brought(held: nn.Module, adapter: str, value: Any, tensor: Tensor) -> Tensor:
    """The values of a slot's tensor on the meta device, if accelerate keeps them elsewhere; else the tensor."""
    if isinstance(value, Tensor):
        return fetched(held, adapter, value)
    weight: Any = value._parameters.get("weight")
    found = tensor if weight is None else fetched(value, "weight", weight)
    return tensor if found is weight else found.view(tensor.shape)


def _read(home: Any, adapter: str, value: Any, tensor: Any) -> tuple[Read, ...]:
    """What was read for the tensor of a slot: the tensor itself, or the `weight` of a module, or that as a matrix."""
    if isinstance(value, nn.ParameterDict):
        return (home, adapter, value), *((value._parameters, key, held) for key, held in value._parameters.items())
    if value is tensor or isinstance(value, Tensor):
        return ((home, adapter, value),) if value is tensor and isinstance(value, Tensor) else (UNSEEN,)
    weight = value._parameters.get("weight")
    if weight is not tensor and (weight is None or getattr(tensor, "_base", None) is not weight):
        return (UNSEEN,)
    return (home, adapter, value), (value._parameters, "weight", weight)


class Call:
    """The frozen layer during one call, as updates see it (`updates.Base`)."""

    _dense: Tensor | None = None

    def __init__(self, layer: AdaptedLayer, host: Host, args: tuple, kwargs: dict[str, Any]) -> None:
        self.layer, self.host, self.args, self.kwargs = layer, host, args, kwargs
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def _frozen(self) -> Host:
        return self.layer.frozen if self.layer.merged_adapters else self.host

    @property
    def weight(self) -> Tensor:
        if not self.host.opaque:
            return self._frozen.weight()
        if self._dense is None:  # kept as long as the call lasts: to dequantise costs as much as to run the layer
            self._dense = self._frozen.weight()
        return self._dense

    @property
    def bias(self) -> Tensor | None:
        return self._frozen.bias()

    def run(self, x: Tensor) -> Tensor:
        if self._seen is not None and self._seen[0] is x:
            return self._seen[1]
        layer = self.layer
        if layer.merged_adapters and not self.host.opaque and layer._inside is None:
            y = self.host.act(self.weight, self.bias, x, *self.args, **self.kwargs)
        else:
            frozen = self._frozen
            module = frozen.module if layer.merged_adapters else layer.base_layer
            y = frozen.run(module, x, *self.args, **self.kwargs)
        self._seen = (x, y)
        return y

    def remember(self, tensors: tuple[Tensor, ...], scale: Any, make: Callable[[], Tensor]) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or tensors[0].device.type == "meta":
            return make()
        now = [(t._version, t.data_ptr()) for t in tensors]
        tensors = (*tensors, self.host.raw)
        if not self.host.opaque:  # packed tensors have no address, or no memory of their own
            now.append((tensors[-1]._version, tensors[-1].data_ptr()))
        norms: dict[int, Any] = self.layer._caches.setdefault("norms", {})
        kept = norms.get(id(tensors[0]))
        if kept is None or kept[1:3] != (now, scale) or any(a is not b for a, b in zip(kept[0], tensors, strict=True)):
            kept = norms[id(tensors[0])] = (tensors, now, scale, make())
        return kept[3]

    def run_merged(self, x: Tensor) -> Tensor:
        """The base layer as it stands, merged adapters included."""
        return self.host.run(self.layer.base_layer, x, *self.args, **self.kwargs)

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        return self.host.lift(op, x)

    def act(self, weight: Tensor, x: Tensor) -> Tensor:
        return self.host.act(weight, None, x)

    def out(self, op: Operator, y: Tensor) -> Tensor:
        return self.host.out(op, y)

    def shift(self, y: Tensor, bias: Tensor | None, sign: int = 1) -> Tensor:
        return self.host.shift(y, bias, sign)

    def plus(self, weight: Tensor, delta: Tensor) -> Tensor:
        return self.host.plus(weight, delta)

    def mixable(self, weight: Tensor, block: int) -> Tensor:
        return self.host.mixable(weight, block)
