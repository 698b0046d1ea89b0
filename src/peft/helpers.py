"""Small helpers around models with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from peft import whole
from peft.checkpoint import files
from peft.errors import AdapterNotFoundError, ConfigError
from peft.model import PeftModel


def update_forward_signature(model: PeftModel) -> None:
    """Give `model.forward` the base model's signature, where the class has a bare `(*args, **kwargs)`."""
    _take_signature(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Give `model.generate` the base model's signature."""
    _take_signature(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Give `forward`, `generate` or both (`"all"`) the base model's signatures."""
    if method not in ("all", "forward", "generate"):
        raise ConfigError(f"method is {method!r}; it must be 'all', 'forward' or 'generate'.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _take_signature(model, name)


def _take_signature(model: PeftModel, name: str) -> None:
    current = inspect.signature(getattr(model, name))
    bare = {p.kind for p in current.parameters.values()} <= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    if not bare:
        return
    base = getattr(type(model.get_base_model()), name)
    unwrapped = getattr(type(model), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return unwrapped(self, *args, **kwargs)

    update_wrapper(method, base, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, MethodType(method, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or repository holds an adapter."""
    try:
        files.locate(model_name_or_path, files.CONFIG_NAME)
    except AdapterNotFoundError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Run the body with the scaling of the active adapters multiplied; it is restored whatever happens.

    Raises:
        TypeError: `multiplier` is not a number.
        ValueError: no layer of the model has a scaling.
    """
    if not isinstance(multiplier, (int, float)) or isinstance(multiplier, bool):
        raise TypeError(f"Argument multiplier should be a number, got {type(multiplier).__name__}")
    layers = [layer for layer in whole.layers(model) if layer.__dict__.get("scaling")]
    if not layers:
        raise ValueError("scaling is only supported for models with adapters that have one, such as LoRA.")
    before = [deepcopy(layer.__dict__["scaling"]) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(multiplier)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.__dict__["scaling"].update(scaling)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Run the body without casting inputs to the dtype of adapters. Here inputs are never cast: adapters are."""
    yield


class DoraCaching:
    """Turns the cache of DoRA's weight norms on or off; here frozen norms are always kept, so it changes nothing.

    Example:
        >>> with DoraCaching():
        ...     pass
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> DoraCaching:
        self.enabled = enabled
        return self

    def __enter__(self) -> DoraCaching:
        return self

    def __exit__(self, *error: Any) -> None:
        return None
