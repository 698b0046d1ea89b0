"""FSDP: which modules to wrap, so that frozen and trained parameters don't share a flat one."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from torch import nn


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy that wraps transformer layers, prompt encoders, and every leaf that holds trained weights.

    The layer classes come from `FSDP_TRANSFORMER_CLS_TO_WRAP`, or from the model's `_no_split_modules`.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    from peft.prompts import BasePromptEncoder

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(getattr(model, "_no_split_modules", None) or ()))
    wanted = {name.strip() for name in named.split(",") if name.strip()}
    classes = {type(module) for module in model.modules() if type(module).__name__ in wanted}
    missing = wanted - {cls.__name__ for cls in classes}
    if missing:
        raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP: the model has no module of class {sorted(missing)}.")
    leaf = partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    layers = partial(transformer_auto_wrap_policy, transformer_layer_cls={*classes, BasePromptEncoder})
    return partial(_or_policy, policies=[leaf, layers])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad
