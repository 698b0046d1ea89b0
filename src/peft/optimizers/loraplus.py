"""LoRA+ (arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft.errors import ConfigError
from peft.optimizers.pairs import pairs


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with the learning rates of LoRA+: `lr` for A, and `loraplus_lr_ratio` times that for B.

    Args:
        model: A model with an active LoRA adapter.
        optimizer_cls: Any optimizer, such as `torch.optim.AdamW`.
        lr: The learning rate of A, and of all else that trains except vectors.
        loraplus_lr_ratio: How many times faster B (and vectors, such as biases) learn. The paper advises 16 or so, with
            a smaller `lr` than for LoRA.
        **kwargs: `loraplus_weight_decay` (default 0) for all but vectors, `loraplus_lr_embedding` (default 1e-6) for
            adapters of embeddings; the rest goes to `optimizer_cls`.

    Raises:
        ConfigError: the ratio is not positive, or no LoRA adapter is active.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_loraplus_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    decay, slow = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio must be positive, not {loraplus_lr_ratio}.")
    fast = {id(pair.up) for pair in pairs(model)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_embedding_" in f".{name}":
            rate, weight_decay = slow, decay
        elif id(parameter) in fast:
            rate, weight_decay = lr * loraplus_lr_ratio, decay
        elif parameter.dim() == 1:
            rate, weight_decay = lr * loraplus_lr_ratio, 0.0
        else:
            rate, weight_decay = lr, decay
        groups.setdefault((rate, weight_decay), []).append(parameter)
    listed = [{"params": ps, "lr": rate, "weight_decay": wd} for (rate, wd), ps in groups.items()]
    optimizer = optimizer_cls(listed, **{"lr": lr, **kwargs})
    if hasattr(optimizer, "optim_bits"):
        _wide_embeddings(model)
    return optimizer


def _wide_embeddings(model: nn.Module) -> None:
    """Keep the states of embeddings in 32 bits: in 8 they are unstable (bitsandbytes)."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[import-not-found]

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
