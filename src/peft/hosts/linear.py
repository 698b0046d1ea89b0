"""`nn.Linear`, and transformers' `Conv1D`, which is the same layer with its weight transposed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft.autograd import Form
from peft.hosts.base import Host
from peft.operators import Operator, act
from peft.updates import Base


class LinearHost(Host):
    """y = x Wᵀ + b."""

    name = "Linear"
    types = ("torch.nn.modules.linear.Linear",)
    on_input = True
    fuses = True

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        return act(op.to(x.dtype), x)

    def fused(self, form: Form, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return form.run(base, x, weight, bias)


class Conv1DHost(LinearHost):
    """transformers' Conv1D: weight (in, out)."""

    types = ("transformers.pytorch_utils.Conv1D",)
    fan_in_fan_out = True

    def weight(self) -> Tensor:
        return self.raw.mT

    def native(self, weight: Tensor) -> Tensor:
        return weight.mT
