"""transformers' own adapter loading (`model.load_adapter`): how names in a file become names in the model.

And its conversion of checkpoints: how the weights of older releases were called, and where their rows are now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft import patterns, registry
from peft.errors import LoadError
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
    if getattr(peft_config, "init_lora_weights", True) is False:
        peft_config.init_lora_weights = True  # what the file lacks shall not be random
    method = registry.method("LORA" if peft_config is None else registry_name(peft_config))
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
    return renamings + _expert_conversions(weight_conversions or (), adapter_name, peft_config)


def _expert_conversions(conversions: Iterable[Any], adapter: str, config: Any) -> list[Any]:
    """LoRA on each expert's own layers, for experts that are stacks now: conversions of A and B, and of the config.

    The config's lists are changed in place, as transformers expects; its layers of the same names keep their entries.
    """
    if registry_name(config) != "LORA" or isinstance(config.target_modules, (str, type(None))) or config.use_dora:
        return []
    named = {entry.rpartition(".")[2] for entry in config.target_modules}
    stacks: dict[str, tuple[Any, list[str]]] = {}
    for conversion in conversions:
        steps = [type(step).__name__ for step in getattr(conversion, "operations", ())]
        if steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            parts = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
            if named & {part.rpartition(".")[2] for part in parts}:
                stacks[conversion.target_patterns[0]] = (conversion, parts)
    if not stacks:
        return []
    for target, (_, parts) in stacks.items():
        _name_stack(config, target.rpartition(".")[2], [part.rpartition(".")[2] for part in parts], named)
    config._in_stacks = named & {part.rpartition(".")[2] for _, parts in stacks.values() for part in parts}
    return [
        found
        for depth, (conversion, parts) in enumerate(reversed(stacks.values()))
        for found in _factor_conversions(conversion, parts, adapter, depth)
    ]


def registry_name(config: Any) -> str:
    """The method of a config, as a string."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _name_stack(config: Any, stack: str, parts: list[str], named: set[str]) -> None:
    ranks = {patterns.lookup(config.rank_pattern, part, config.r) for part in parts}
    alphas = {patterns.lookup(config.alpha_pattern, part, config.lora_alpha) for part in parts}
    if not set(parts) <= named or len(ranks) != 1 or len(alphas) != 1:
        raise LoadError(
            f"The adapter changes {sorted(named & set(parts))} of each expert, which are in {stack!r} here together "
            f"with {sorted(set(parts) - named) or 'parts of other rank or alpha'}. Load it with "
            "peft.PeftModel.from_pretrained, which can carry it over."
        )
    times = len(parts) ** 0.5 if config.use_rslora else len(parts)
    config.target_parameters = [*(config.target_parameters or []), f"experts.{stack}"]
    config.rank_pattern = {**config.rank_pattern, f"experts.{stack}": ranks.pop() * len(parts)}
    config.alpha_pattern = {**config.alpha_pattern, f"experts.{stack}": alphas.pop() * times}


def _factor_conversions(conversion: Any, parts: list[str], adapter: str, depth: int) -> list[Any]:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Stack(ConversionOps):
        """Factors of all experts as one: A over A, B block by block."""

        def __init__(self, factor: str) -> None:
            self.factor = factor

        def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
            experts = list(zip(*input_dict.values(), strict=True))
            if self.factor == "A":
                joined = torch.cat([torch.cat([_only(t) for t in factors]) for factors in experts])
            else:
                blocks = [torch.block_diag(*(_only(t) for t in factors)) for factors in experts]
                joined = torch.stack(blocks, dim=-1).flatten(1)
            return {kwargs["target_patterns"][0]: joined}

    place = f"{conversion.target_patterns[0].rpartition('.')[0]}.{'base_layer.' * depth}"
    found = []
    for factor in "AB":
        end = f"lora_{factor}.{adapter}.weight"
        made = WeightConverter([f"{part}.{end}" for part in parts], [place + end], [Stack(factor)])
        made.scope_prefix, made.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        found.append(made)
    return found


def _only(tensor: Any) -> Tensor:
    return tensor[0] if isinstance(tensor, list) else tensor


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
