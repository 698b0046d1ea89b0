"""The path of HF PEFT for helpers around other libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from peft.integrations.deepspeed import check_deepspeed_zero3_enabled as check_deepspeed_zero3_enabled
from peft.integrations.deepspeed import gather_params_ctx as gather_params_ctx


def dequantize_module_weight(module: Any) -> nn.Parameter:
    """The weight of a layer in floating point. Layers that are not quantised give their own."""
    inner: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return inner.weight


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
