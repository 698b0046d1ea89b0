"""Reports: which adapters are where, active, merged, trainable, and how many parameters that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peft import whole
from peft.auxiliary import AuxiliaryTrainingWrapper
from peft.errors import StateError
from peft.layer import AdaptedLayer

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; `"irregular"` where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters of a model."""
    trained = total = 0
    for parameter in model.parameters():
        size = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * getattr(getattr(parameter, "quant_storage", None), "itemsize", 1)
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """A report of each adapted layer and of each module trained whole.

    Args:
        model: A `PeftModel`, or a model with injected adapters.

    Raises:
        ValueError: nothing in the model is adapted.
    """
    base: Any = model.base_model if hasattr(model, "get_base_model") else model
    found = [
        _layer(name, m) for name, m in base.named_modules() if isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper))
    ]
    if not found:
        raise StateError("No adapter layers were found in the model, so there is no status to report.")
    return found


def _layer(name: str, module: Any) -> TunerLayerStatus:
    names = module.available_adapters if isinstance(module, AdaptedLayer) else module.names()
    grads: dict[str, bool | Irregular] = {}
    devices: dict[str, list[str]] = {}
    for adapter in names:
        tensors = _tensors(getattr(module, "_leaders", {}).get(adapter, module), adapter)
        flags = {t.requires_grad for t in tensors if t.is_floating_point()}
        grads[adapter] = flags.pop() if len(flags) == 1 else ("irregular" if flags else False)
        devices[adapter] = sorted({t.device.type for t in tensors})
    kind = type(module)
    prefix = module.methods[0].lower() + "." if isinstance(module, AdaptedLayer) else ""
    return TunerLayerStatus(
        name=name,
        module_type=f"{prefix}{kind.__name__}" if isinstance(module, AdaptedLayer) else kind.__name__,
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=list(module.merged_adapters),
        requires_grad=grads,
        available_adapters=sorted(names),
        devices=devices,
        quantization_backend=module.host.backend if isinstance(module, AdaptedLayer) else None,
    )


def _tensors(module: Any, adapter: str) -> list[Any]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return list(module.trained(adapter))
    found = []
    for slot, value in module.slots(adapter):
        if slot.trains:
            found += list(value.parameters()) if isinstance(value, nn.Module) else [value]
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """A summary of the model's adapters.

    Args:
        model: A `PeftModel`, or a model with injected adapters.

    Raises:
        ValueError: nothing in the model is adapted.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_model_status, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> get_model_status(model).trainable_params
        14
    """
    layers = get_layer_status(model)
    base = whole.base_of(model)
    configs = getattr(model, "peft_config", None) or {}
    trained, total = count_parameters(model)
    adapters = sorted({a for layer in layers for a in layer.available_adapters})
    wrapped = hasattr(model, "get_base_model") and hasattr(model, "base_model")
    # Wrappers (a head trained whole) hold one adapter at a time, and are merged by no one: layers speak for the model.
    speaking = [s for s in layers if "Wrapper" not in s.module_type] or layers
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model.base_model).__name__ if wrapped else "None",
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same([s.enabled for s in layers]),
        active_adapters=_same([s.active_adapters for s in speaking]),
        merged_adapters=_same([s.merged_adapters for s in speaking]),
        requires_grad={a: _same([s.requires_grad[a] for s in layers if a in s.requires_grad]) for a in adapters},
        available_adapters=adapters,
        devices={a: sorted({d for s in layers for d in s.devices.get(a, [])}) for a in adapters},
        quantization_backend=_same([s.quantization_backend for s in speaking]),
    )


def _same(values: list[Any]) -> Any:
    return values[0] if all(v == values[0] for v in values) else "irregular"
