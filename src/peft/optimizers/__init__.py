"""Optimizers that know the two factors of LoRA: LoRA+, LoRA-FA and Riemannian preconditioning."""

from peft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from peft.optimizers.loraplus import create_loraplus_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
