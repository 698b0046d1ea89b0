"""Functions on models with injected adapters, wrapped or not."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft import whole
from peft.checkpoint.state import get_peft_model_state_dict as get_peft_model_state_dict
from peft.checkpoint.state import set_peft_model_state_dict as set_peft_model_state_dict
from peft.mapping_func import inject_adapter_in_model as inject_adapter_in_model
from peft.tuner import cast_adapter_dtype as cast_adapter_dtype
from peft.whole import set_requires_grad as set_requires_grad


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters active in a model's layers, and trainable unless `inference_mode`.

    Args:
        model: A model with adapters.
        adapter_name: One name, or several in their order.
        inference_mode: Leave them frozen.
        layer_cls: Not needed; there for callers that give it.
    """
    whole.set_adapter(model, adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Remove an adapter from a model's layers; the model's `peft_config` is the caller's business.

    Args:
        model: A model with adapters.
        adapter_name: Which one goes.
        prefix: Not needed; there for callers that give it.
        layer_cls: Not needed either.

    Returns:
        Names of the adapters that are active afterwards.
    """
    return whole.delete_adapter(model, adapter_name) or None
