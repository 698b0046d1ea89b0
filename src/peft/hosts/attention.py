"""`nn.MultiheadAttention`: W is the packed input projection (3·d, d), read inside a functional, so it is lent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft.hosts.base import Host
from peft.hosts.parameter import lend


class MultiheadAttentionHost(Host):
    """The input projection. The output projection is an `nn.Linear` of its own, adapted as such beside it."""

    name = "MultiheadAttention"
    types = ("torch.nn.modules.activation.MultiheadAttention",)
    factored = False
    parameter = "in_proj_weight"
    bias_parameter = "in_proj_bias"

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        changed: dict[str, Tensor | None] = {"in_proj_weight": weight.to(self.dtype)}
        if bias is not None:
            changed["in_proj_bias"] = bias.to(self.dtype)
        return lend(self.module, **changed)(x, *args, **kwargs)

    def rows(self, x: Tensor, kwargs: dict[str, Any]) -> int:
        return 0 if self.module.batch_first else 1
