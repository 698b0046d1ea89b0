"""What `AdaLoraModel` does beyond other tuners: the orthogonality loss, and pruning when it is told of a step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft.errors import PeftWarning
from peft.layer import AdaptedLayer
from peft.methods.adalora.allocator import RankAllocator, cut


def _layers(tuner: Any, adapter: str) -> dict[str, AdaptedLayer]:
    named = tuner.model.named_modules()
    return {k: m for k, m in named if isinstance(m, AdaptedLayer) and adapter in getattr(m, "lora_E", ())}


def allocator(tuner: Any, adapter: str | None = None) -> RankAllocator:
    """The allocator of an adapter (by default the active one), made when it is first asked for."""
    name: str = adapter or tuner.active_adapters[0]
    kept = tuner.__dict__.setdefault("_allocators", {})
    if name not in kept or kept[name].peft_config is not tuner.peft_config[name]:
        kept[name] = RankAllocator(tuner.model, tuner.peft_config[name], name)
    return kept[name]


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Prune the active adapters. Call after each optimizer step, before gradients are zeroed.

    When the schedule is over, the ranks that are left are written to `rank_pattern` in the config, and files hold
    those alone. An adapter that is saved before is saved whole.

    Args:
        global_step: How many optimizer steps were made.
    """
    for adapter in tuner.active_adapters:
        config = tuner.peft_config[adapter]
        if not _layers(tuner, adapter):
            continue
        ranks, end = allocator(tuner, adapter), config.total_step - config.tfinal  # type: ignore[operator]
        if global_step > end and config.rank_pattern is not None:
            ranks.mask_using_rank_pattern(tuner.model, config.rank_pattern)
            continue
        _, pattern = ranks.update_and_allocate(tuner.model, global_step, force_mask=global_step == end)
        if global_step >= end and pattern is not None:
            config.rank_pattern = pattern
            for key, layer in _layers(tuner, adapter).items():
                layer.kept[adapter] = pattern[f"{key}.lora_E"]


def run_state(tuner: Any, adapter: str) -> dict[str, Any]:
    """The importances so far, and the ranks if they are settled."""
    ranks = allocator(tuner, adapter)
    config = tuner.peft_config[adapter]
    return {"ipt": ranks.exp_avg_ipt, "unc": ranks.exp_avg_unc, "rank_pattern": config.rank_pattern}


def load_run_state(tuner: Any, adapter: str, state: dict[str, Any]) -> None:
    """The inverse of `run_state`."""
    ranks = allocator(tuner, adapter)
    for held, saved in ((ranks.exp_avg_ipt, state["ipt"]), (ranks.exp_avg_unc, state["unc"])):
        held.clear()
        held.update(saved)
    tuner.peft_config[adapter].rank_pattern = state["rank_pattern"]
    for key, layer in _layers(tuner, adapter).items() if state["rank_pattern"] else ():
        layer.kept[adapter] = state["rank_pattern"][f"{key}.lora_E"]


def forward(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model; in training, a loss in its output gets the orthogonality term."""
    output = tuner.model(*args, **kwargs)
    loss = getattr(output, "loss", None)
    if tuner.training and torch.is_grad_enabled():
        _remind(tuner)
        if isinstance(loss, Tensor):
            output.loss = loss + orthogonality(tuner)
    return output


def orthogonality(tuner: Any) -> Tensor | float:
    """`orth_reg_weight` times the mean of |P Pᵀ - I| over the factors A and Bᵀ of the active adapters."""
    total: Tensor | float = 0.0
    for adapter in tuner.active_adapters:
        layers = [layer for layer in _layers(tuner, adapter).values() if not layer.disable_adapters]
        terms = []
        for layer in layers:
            p = layer.parts(adapter)
            for factor in (p.lora_A, p.lora_B.mT):
                gram = factor @ factor.mT
                terms.append(
                    torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
                )
        if terms:
            total = total + tuner.peft_config[adapter].orth_reg_weight * torch.stack(terms).mean()
    return total


def _remind(tuner: Any) -> None:
    """Warn, once, when an optimizer trains and nobody allocates: AdaLoRA without it is LoRA with a larger rank.

    The singular values are looked at after 4, 8, 16, ... passes, since looking waits for the device.
    """
    state = tuner.__dict__
    if "_allocators" in state or torch.compiler.is_compiling():
        return
    values = [m.lora_E[a].detach() for a in tuner.active_adapters for m in list(_layers(tuner, a).values())[:1]]
    passes = state["_passes"] = state.get("_passes", 0) + 1
    if passes == 1:
        state["_first_values"] = [v.clone() for v in values]
    first = state["_first_values"]
    if passes < 4 or passes & (passes - 1) or all(map(torch.equal, first, values)):
        return
    allocator(tuner)
    warnings.warn(
        "AdaLoRA prunes no ranks: optimizer steps are made, but update_and_allocate is not called. Call "
        "model.base_model.update_and_allocate(step) after each optimizer step and before gradients are zeroed, or "
        "give transformers' Trainer callbacks=[peft.integrations.callbacks.AllocationCallback()].",
        PeftWarning,
        stacklevel=4,
    )


def resize_modules(tuner: Any, rank_pattern: Mapping[str, list[bool]], adapter_name: str) -> None:
    """Cut the factors of an adapter to the ranks that are left."""
    for key, layer in _layers(tuner, adapter_name).items():
        kept = rank_pattern.get(f"{key}.lora_E")
        if kept is None or len(kept) != len(layer.lora_E[adapter_name]):
            continue
        for name in ("lora_A", "lora_B", "lora_E"):
            held: Any = layer._modules[layer._stored[name]]
            old = held[adapter_name]
            held[adapter_name] = nn.Parameter(cut(name, old.detach(), kept), requires_grad=old.requires_grad)
        layer.r[adapter_name], layer.kept[adapter_name] = sum(kept), None


def resize_state_dict(
    tuner: Any, rank_pattern: Mapping[str, list[bool]], state_dict: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """A state dict with the factors of an adapter cut to the ranks that are left."""
    result = dict(state_dict)
    for entry, kept in rank_pattern.items():
        path = entry.rpartition(".lora_E")[0]
        for name, tensor in state_dict.items():
            if f"{path}.lora_" in name and len(kept) in tensor.shape:
                result[name] = cut(name, tensor, kept)
    return result
