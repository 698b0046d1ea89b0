"""The path of HF PEFT for what all tuners share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from peft import targets
from peft.functional import delete_adapter as delete_adapter
from peft.layer import BaseTunerLayer as BaseTunerLayer
from peft.layer import check_adapters_to_merge as check_adapters_to_merge
from peft.prompts import BasePromptEncoder as BasePromptEncoder
from peft.tuner import BaseTuner as BaseTuner
from peft.tuner import cast_adapter_dtype as cast_adapter_dtype
from peft.whole import set_adapter as set_adapter
from peft.whole import set_requires_grad as set_requires_grad


class _ExcludedModule:
    """A falsy match: the module was targeted and excluded."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: Any, key: str) -> bool | re.Match[str] | _ExcludedModule | None:
    """Whether a config targets the module of that path."""
    exclude = targets.matcher(config.exclude_modules, "exclude_modules")
    if exclude is not None and exclude.entry(key) is not None:
        return _ExcludedModule()
    wanted = targets.matcher(config.target_modules, "target_modules")
    if wanted is None or wanted.entry(key) is None:
        return False
    only = getattr(config, "layers_to_transform", None)
    if only is None:
        return True
    return targets.layer_index(config, key) in ({only} if isinstance(only, int) else set(only))


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace 'all-linear' by the names of the linear layers."""
    if peft_config.target_modules == targets.ALL_LINEAR:
        peft_config.target_modules = set(targets.linear_modules(model))
    return peft_config


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Run the body with the weights of an offloaded layer loaded (accelerate's hooks); others are there already."""
    hooks: list[tuple[nn.Module, Any]] = [(m, getattr(m, "_hf_hook", None)) for m in layer.modules()]
    hooks = [(module, hook) for module, hook in hooks if getattr(hook, "offload", False)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
