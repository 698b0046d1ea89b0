"""A small thing to learn: which of eight repeating patterns a sequence follows, from its first tokens."""

from __future__ import annotations

import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from tests import models

STEPS = 12
RATE = 1e-2


def rows(count: int = 8, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """`count` sequences that repeat two tokens each, with themselves as labels."""
    pairs = torch.arange(3, 3 + 2 * count).view(count, 2)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in pairs.repeat(1, length // 2)]


def batches(steps: int = STEPS, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """The first `steps` batches of the task, cycling through its rows."""
    data = rows()
    picks = [[data[(step * size + i) % len(data)] for i in range(size)] for step in range(steps)]
    return [{key: torch.stack([row[key] for row in pick]) for key in ("input_ids", "labels")} for pick in picks]


def base_model(name: str = "llama") -> nn.Module:
    """A tiny language model with a head as decided as a trained one's, so that what is before it can lower the loss."""
    model = models.build(name)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def adapted(base: nn.Module | None = None, **options) -> PeftModel:
    """`base` with LoRA on every linear layer, in training mode, always with the same weights."""
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **options}
    return get_peft_model(base or base_model(), LoraConfig(task_type="CAUSAL_LM", **options)).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(model: nn.Module, data: list[dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> list[float]:
    """One optimizer step per batch; the loss of each."""
    losses = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what does not."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_learned(losses: list[float]) -> None:
    assert losses[-1] < 0.7 * losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
