"""The budget of AdaLoRA: how many ranks the model may keep at each step, and which ones are worth most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft.layer import AdaptedLayer

_FACTORS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """Prunes the singular values of AdaLoRA adapters along a cubic schedule (section 3.3 of arXiv 2303.10512).

    The importance of a number p is Ī Ū: the moving average of |p · gradient|, times that of its deviations from its
    average. A triplet counts as its singular value plus the means of its row of A and column of B.

    Args:
        model: The adapted model, to count its layers.
        peft_config: An `AdaLoraConfig`.
        adapter_name: The adapter to prune.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        self.peft_config = peft_config
        self.adapter_name = adapter_name
        sizes = [e.shape[0] for _, _, e in self._layers(model)]
        self.init_bgt = sum(sizes)
        self.target_bgt = min(peft_config.target_r * len(sizes), self.init_bgt)
        self.reset_ipt()

    def reset_ipt(self) -> None:
        """Forget all importances."""
        self.exp_avg_ipt: dict[str, Tensor] = {}
        self.exp_avg_unc: dict[str, Tensor] = {}

    def set_total_step(self, total_step: int) -> None:
        """Change the length of training that the schedule counts on."""
        self.peft_config.total_step = total_step

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """Singular values that may be left at this step, and whether this is a step at which they are pruned."""
        config = self.peft_config
        end = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.init_bgt, False
        if step > end:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (end - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Take the gradients of this step into the importances."""
        config = self.peft_config
        for key, layer, _ in self._layers(model):
            for factor in _FACTORS:
                p = getattr(layer.parts(self.adapter_name), factor)
                if p.grad is None:
                    continue
                name, now = f"{key}.{factor}", (p * p.grad).abs()
                mean = self.exp_avg_ipt.setdefault(name, torch.zeros_like(p))
                mean.mul_(config.beta1).add_(now, alpha=1 - config.beta1)
                spread = self.exp_avg_unc.setdefault(name, torch.zeros_like(p))
                spread.mul_(config.beta2).add_((now - mean).abs(), alpha=1 - config.beta2)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Zero the least important singular values so that `budget` of them are left.

        Returns:
            For each layer (`<path>.lora_E`) which of its ranks are left.
        """
        scores = {f"{key}.lora_E": self._scores(key, e) for key, _, e in self._layers(model)}
        if not scores:
            return {}
        everything = torch.cat([s.cpu() for s in scores.values()])
        drop = max(len(everything) - budget, 0)
        threshold = everything.kthvalue(drop).values.item() if drop else -torch.inf
        pattern = {name: (score > threshold).tolist() for name, score in scores.items()}
        self.mask_using_rank_pattern(model, pattern)
        return pattern

    def _scores(self, key: str, e: Tensor) -> Tensor:
        """The importance of each triplet of a layer (r,)."""
        if f"{key}.lora_E" not in self.exp_avg_ipt:
            return torch.zeros(e.shape[0])
        a, b, value = (self.exp_avg_ipt[f"{key}.{f}"] * self.exp_avg_unc[f"{key}.{f}"] for f in _FACTORS)
        return value.flatten() + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, list[bool]]) -> None:
        """Zero the singular values that a pattern leaves out. Layers that were cut to their pattern already stay."""
        for key, _, e in self._layers(model):
            kept = rank_pattern.get(f"{key}.lora_E")
            if kept is not None and len(kept) == e.shape[0]:
                e.masked_fill_(~torch.tensor(kept, device=e.device)[:, None], 0.0)

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Update the importances and prune if it is time.

        Returns:
            The budget at this step, and what was left if anything was pruned.
        """
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if due or force_mask else None

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, AdaptedLayer, Tensor]]:
        for key, layer in model.named_modules():
            if isinstance(layer, AdaptedLayer) and self.adapter_name in getattr(layer, "lora_E", ()):
                yield key, layer, layer.lora_E[self.adapter_name]


def cut(name: str, tensor: Tensor, kept: list[bool]) -> Tensor:
    """The ranks of a factor that are left: columns of B, rows of A and E."""
    index = torch.tensor(kept, device=tensor.device)
    columns = "lora_B" in name or "lora_embedding_B" in name
    return (tensor[:, index] if columns else tensor[index]).contiguous()
