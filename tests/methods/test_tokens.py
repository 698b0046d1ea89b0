"""Methods that choose how to compute by the number of tokens compute the same however many there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft.testing import Holder, close, train


def adapted(config: peft.PeftConfig, inner: int, out: int) -> peft.PeftModel:
    torch.manual_seed(0)
    config.target_modules = {"layer"}
    model = peft.get_peft_model(Holder(nn.Linear(inner, out)).double(), config)
    train(model, 0, 0.2)
    return model.train()


@pytest.mark.parametrize("sides", [(12, 8), (8, 12)])
@pytest.mark.parametrize(
    "config",
    [
        peft.DeftConfig(r=2),
        peft.DeftConfig(r=2, alpha=6, decomposition_method="qr"),
        peft.DeftConfig(r=2, para=True),
        peft.FrodConfig(sparse_rate=0.2),
        peft.RandLoraConfig(r=3, randlora_alpha=6),
        peft.VeraConfig(r=4),
    ],
    ids=lambda config: f"{config.peft_type.value}-{getattr(config, 'decomposition_method', '')}",
)
def test_tokens_are_alone(config, sides):
    model = adapted(config, *sides)
    x = torch.randn(2, 20, sides[0], dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    grad = torch.randn(2, 20, sides[1], dtype=torch.float64)
    together = model(x)
    apart = torch.stack([model(token) for token in x.flatten(0, 1)]).view_as(together)
    close(together, apart, 1e-11, "all tokens at once and one by one")
    found = (torch.autograd.grad(y, wanted, grad) for y in (together, apart))
    for several, single in zip(*found, strict=True):
        close(several, single, 1e-11, "gradients")
