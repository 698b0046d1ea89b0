"""The path of HF PEFT for what it knows of quantised layers. Here a layer's host knows it (`peft.hosts`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.hosts import Host as QuantizationBackend
from peft.hosts import host_class
from peft.hosts.bitsandbytes import Linear4bitHost as Bnb4bitBackend
from peft.hosts.bitsandbytes import Linear8bitHost as Bnb8bitBackend
from peft.hosts.hqq import HqqHost as HqqBackend
from peft.hosts.opaque import OpaqueLinearHost as ForwardOnlyQuantizationBackend
from peft.hosts.tensors import PackedLinearHost as TorchaoBackend

__all__ = [
    "Bnb4bitBackend",
    "Bnb8bitBackend",
    "ForwardOnlyQuantizationBackend",
    "HqqBackend",
    "QuantizationBackend",
    "TorchaoBackend",
    "get_quantization_kwargs",
    "quantization_extra_repr",
    "resolve_quantization_backend",
]


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The host of a quantised layer; None for other layers."""
    found = host_class(base_layer)
    host = found(base_layer) if found is not None and found.opaque else None
    return host if host is not None and host.backend else None


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Nothing: a host reads all it needs off the layer."""
    return {}


def quantization_extra_repr(module: Any) -> str:
    """What quantised an adapted layer's base layer, for its `repr`; empty if nothing did."""
    host = resolve_quantization_backend(module.get_base_layer())
    return "" if host is None else f"quantization_backend={host.backend!r}"
