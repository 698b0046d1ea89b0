"""LoRA-FA (arXiv 2308.03303): A stays frozen, and B moves as the gradient of the whole update asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft.errors import ConfigError
from peft.optimizers.pairs import pairs

_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradient of each B (out, r) is replaced by grad (A Aᵀ)⁻¹ / s².

    That is the step of B whose effect on the weight, s B A, is closest to the gradient of the weight. Since A does not
    train, the input of A need not be kept for backward.

    Args:
        params: Parameter groups; beside `params` each has their `names`, by which B finds its A in the same group
            (`lora_B` and `lora_A`), and `scaling_factor`, s. `create_lorafa_optimizer` makes them.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the latter.
        weight_decay: Decoupled weight decay.
        correct_bias: Correct the means for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr {lr} and eps {eps} can't be negative, and betas {betas} are in [0, 1).")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("names") or [""] * len(group["params"])
            named = dict(zip(names, group["params"], strict=True))
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is None:
                    continue
                down = named.get(name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A"))
                grad = parameter.grad
                if down is not None and down is not parameter:
                    grad = _through(down, grad, group["scaling_factor"])
                self._adamw(group, parameter, grad)
        return loss

    def _adamw(self, group: dict[str, Any], parameter: Tensor, grad: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"], state["exp_avg"] = 0, torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = group["lr"]
        if group["correct_bias"]:
            step *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-step)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _through(down: Tensor, grad: Tensor, scaling: float) -> Tensor:
    """grad (A Aᵀ)⁻¹ / s², in float32 at least."""
    wide = torch.promote_types(down.dtype, torch.float32)
    a = down.flatten(1).to(wide)
    gram = a @ a.mT + _DAMPING * torch.eye(a.shape[0], dtype=wide, device=a.device)
    solved = torch.linalg.solve(gram, grad.flatten(1).to(wide).mT).mT
    return (solved / scaling**2).reshape(grad.shape).to(grad.dtype)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze the A of all active LoRA adapters, and optimise the rest with `LoraFAOptimizer`.

    Args:
        model: A model with an active LoRA adapter.
        r: The rank in the adapters' configs. Layers with others (`rank_pattern`) are treated as they are.
        lora_alpha: The alpha in the configs.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        use_rslora: What the configs say; None: whatever that is.

    Raises:
        ConfigError: what is given differs from the adapters' configs, or no LoRA adapter is active.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_lorafa_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3)
        >>> model.base_model.model[0].lora_A.default.weight.requires_grad
        False
    """
    found = list(pairs(model))
    for name in model.active_adapters:  # type: ignore[union-attr]
        config = model.peft_config[name]  # type: ignore[index]
        given = {"r": r, "lora_alpha": lora_alpha, **({} if use_rslora is None else {"use_rslora": use_rslora})}
        wrong = {k: getattr(config, k) for k, v in given.items() if getattr(config, k, v) != v}
        if wrong:
            raise ConfigError(f"create_lorafa_optimizer got {given}, but the config of adapter {name!r} says {wrong}.")
    scaling = {}
    for pair in found:
        pair.down.requires_grad_(False)
        scaling |= {id(pair.down): pair.scaling, id(pair.up): pair.scaling}
    groups: dict[float, tuple[list[Tensor], list[str]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in scaling:
            parameters, names = groups.setdefault(scaling.get(id(parameter), 1.0), ([], []))
            parameters.append(parameter)
            names.append(name)
    listed = [{"params": ps, "names": names, "scaling_factor": s} for s, (ps, names) in groups.items()]
    return LoraFAOptimizer(listed, lr=lr, weight_decay=weight_decay)
