"""The path of HF PEFT for helpers around other libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft.hosts import host_class
from peft.hosts.bitsandbytes import from_4bit, from_8bit
from peft.integrations.deepspeed import check_deepspeed_zero3_enabled as check_deepspeed_zero3_enabled
from peft.integrations.deepspeed import gather_params_ctx as gather_params_ctx


def dequantize_module_weight(module: Any) -> Any:
    """The weight of a layer in floating point. Layers that are not quantised give their own."""
    inner: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    host = host_class(inner)
    return inner.weight if host is None or not host.opaque else host(inner).native(host(inner).weight())


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> Tensor:
    """The floats of one of bitsandbytes' weights; others are returned as they are.

    Args:
        weight: Of a layer.
        state: What it needs to be read, if it does not carry it: a `QuantState` (4 bits), or the layer's `state` (8
            bits).

    Raises:
        ValueError: `weight` is in 4 bits, packed for the CPU's kernel. Only the layer can read it:
            `dequantize_module_weight`.
    """
    kind: Any = get_bnb_param_type(weight)
    carried: Any = getattr(weight, {"4bit": "quant_state", "8bit": "SCB"}.get(kind, ""), None)
    if kind == "4bit":
        found = state if carried is None else carried
        if getattr(found, "packing_format_for_cpu", False):
            raise ValueError("This weight is packed for the CPU's kernel; use dequantize_module_weight(layer).")
        return from_4bit(weight, found)
    if kind == "8bit" and weight.dtype == torch.int8:
        return from_8bit(weight, state.SCB if carried is None else carried)
    return weight


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Which of bitsandbytes' parameters this is, if any."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)  # type: ignore[return-value]


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Create modules in the body on the meta device."""
    with torch.device("meta"):
        yield


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """Devices of a dispatched model's layers by index, or None."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or set(device_map) == {""}:
        return None
    found = {}
    for name, device in device_map.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if index is not None:
            found[index] = device
    return found
