"""The base model's own state dict, in and out of a model with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft import whole
from peft.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.errors import LoadError
from peft.layer import AdaptedLayer


def _names(model: nn.Module) -> dict[str, str]:
    """{name in the plain base model: name in the model as it is}."""
    base = whole.base_of(model)
    found: dict[str, str] = {}

    def walk(module: Any, plain: str, here: str) -> None:
        if isinstance(module, AdaptedLayer):
            return walk(module.base_layer, plain, f"{here}base_layer.")
        if isinstance(module, ModulesToSaveWrapper):
            return walk(module.original_module, plain, f"{here}original_module.")
        if isinstance(module, AuxiliaryTrainingWrapper):
            return walk(module.token_adapter, plain, f"{here}token_adapter.")
        for name in (*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)):
            if getattr(module, name, None) is not None:
                found[plain + name] = here + name
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{plain}{name}.", f"{here}{name}.")

    walk(base, "", "")
    return found


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the base model would have without adapters.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_base_model_state_dict, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> list(get_base_model_state_dict(model))
        ['0.weight', '0.bias']
    """
    base = whole.base_of(model)
    state = base.state_dict()
    return {plain: state[here] for plain, here in _names(model).items() if here in state}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> object:
    """Load a checkpoint of the plain base model into a model with adapters, which stay as they are.

    Returns:
        Missing and unexpected keys, by names in the plain model.

    Raises:
        LoadError: `strict`, and there are any.
    """
    base = whole.base_of(model)
    names = _names(model)
    missing = [n for n in names if n not in state_dict]
    unexpected = [n for n in state_dict if n not in names]
    if strict and (missing or unexpected):
        raise LoadError(
            f"The checkpoint does not fit the base model: missing {missing[:5]}, unexpected {unexpected[:5]}."
        )
    base.load_state_dict({names[n]: t for n, t in state_dict.items() if n in names}, strict=False)
    from torch.nn.modules.module import _IncompatibleKeys

    return _IncompatibleKeys(missing, unexpected)
