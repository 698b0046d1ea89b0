"""transformers' own adapter loading (`model.load_adapter`): how names in a file become names in the model.

And its conversion of checkpoints: how the weights of older releases were called, and where their rows are now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft import registry
from peft.method import WeightMethod


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Renamings for transformers' loader: the prefix goes, the adapter's name is put in.

    Args:
        weight_conversions: The base model's own renamings and conversions; they are kept.
        adapter_name: The adapter that is loaded.
        peft_config: Its config.

    Returns:
        transformers `WeightRenaming` and `WeightConverter` objects.
    """
    from transformers.core_model_loading import WeightRenaming

    renamings: list[Any] = [WeightRenaming(r"^base_model\.model\.", "")]
    renamings += [c for c in weight_conversions or () if type(c).__name__ == "WeightRenaming"]
    kind = getattr(getattr(peft_config, "peft_type", None), "value", "LORA")
    method = registry.method(kind)
    if not isinstance(method, WeightMethod):
        return renamings
    for slot in method.slots:
        head, _, tail = slot.name.rpartition("_")
        plain = re.escape(slot.name)
        if slot.kind in ("down", "up"):
            renamings.append(WeightRenaming(rf"\.{plain}\.(weight|bias)$", rf".{slot.name}.{adapter_name}.\1"))
            name = f"{head}_embedding_{tail}"
            renamings.append(WeightRenaming(rf"\.{re.escape(name)}$", f".{name}.{adapter_name}"))
        elif slot.kind == "vector":
            renamings.append(WeightRenaming(rf"\.{plain}$", f".{slot.name}.{adapter_name}.weight"))
        else:
            renamings.append(WeightRenaming(rf"\.{plain}$", f".{slot.name}.{adapter_name}"))
    return renamings


def original_format(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as they would be, and would be called, in its original checkpoints.

    Args:
        model: The bare model.
        tensors: By the names of all its parameters.

    Returns:
        Empty if transformers, this release of it, or this model knows no other format.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return {}
    try:
        return loading.revert_weight_conversion(model, dict(tensors))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return {}  # some of its weights are converted in ways that look at more than the rows
