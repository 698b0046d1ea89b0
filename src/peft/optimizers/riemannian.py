"""Riemannian preconditioning of LoRA (arXiv 2402.02347): each factor's step is measured in the metric of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft.errors import ConfigError
from peft.optimizers.pairs import Pair, pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer whose gradients of A and B are preconditioned by (BᵀB + reg I)⁻¹ and (A Aᵀ + reg I)⁻¹.

    Args:
        model: A model with an active LoRA adapter.
        optimizer_cls: Any optimizer, such as `torch.optim.AdamW`.
        lr: The learning rate.
        reg: Keeps the small matrices invertible (B starts at zero).
        **kwargs: For `optimizer_cls`.

    Raises:
        ConfigError: `reg` is not positive, or no LoRA adapter is active.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_riemannian_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4)
        >>> type(optimizer).__name__
        'AdamW'
    """
    if reg <= 0:
        raise ConfigError(f"reg must be positive, not {reg}.")
    found = list(pairs(model))
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{"lr": lr, **kwargs})
    optimizer.register_step_pre_hook(lambda *_: precondition(found, reg))
    return optimizer


@torch.no_grad()
def precondition(found: list[Pair], reg: float) -> None:
    """Replace the gradients of pairs by their preconditioned ones, in place."""
    for pair in found:
        down, up = pair.matrices()
        if pair.down.grad is not None:
            grad = pair.down.grad.flatten(1)
            pair.down.grad.copy_(_solve(up.mT @ up, grad, reg).view_as(pair.down.grad))
        if pair.up.grad is not None:
            grad = pair.up.grad.flatten(1)
            pair.up.grad.copy_(_solve(down @ down.mT, grad.mT, reg).mT.reshape(pair.up.grad.shape))


def _solve(gram: Tensor, grad: Tensor, reg: float) -> Tensor:
    """(gram + reg I)⁻¹ grad, in float32 at least."""
    wide = torch.promote_types(gram.dtype, torch.float32)
    damped = gram.to(wide) + reg * torch.eye(gram.shape[0], dtype=wide, device=gram.device)
    return torch.cholesky_solve(grad.to(wide), torch.linalg.cholesky(damped)).to(grad.dtype)
