"""`nn.MultiheadAttention`: W is the packed input projection (3·d, d), read inside a functional, so it is lent."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft.errors import TargetError
from peft.hosts.base import Host
from peft.hosts.parameter import lend


class MultiheadAttentionHost(Host):
    """The input projection. The output projection is an `nn.Linear` of its own, adapted as such beside it."""

    name = "MultiheadAttention"
    types = ("torch.nn.modules.activation.MultiheadAttention",)
    beside = "out_proj"
    parameter = "in_proj_weight"
    bias_parameter = "in_proj_bias"

    @property
    def raw(self) -> Tensor:
        packed = self.module.in_proj_weight
        if packed is None:
            raise TargetError(
                "This MultiheadAttention keeps its input projections apart, since kdim or vdim is not embed_dim. Name "
                "them in target_parameters: q_proj_weight, k_proj_weight, v_proj_weight."
            )
        return packed

    @property
    def factored(self) -> bool:
        return False

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        changed: dict[str, Tensor | None] = {"in_proj_weight": weight.to(self.dtype)}
        if bias is not None:
            changed["in_proj_bias"] = bias.to(self.dtype)
        twin = lend(self.module, **changed)
        twin.__dict__["_modules"] = {**self.module._modules, "out_proj": self.output()}
        return twin(x, *args, **kwargs)

    def output(self) -> nn.Module:
        """The output projection as the functional reads it: a plain layer with the weight that its adapters mean."""
        projection = self.module.out_proj
        if not hasattr(projection, "effective"):
            return projection
        weight, bias = projection.effective()
        bias = None if bias is None else bias.to(self.dtype)
        return lend(projection.base_layer, weight=weight.to(self.dtype), bias=bias)

    def rows(self, x: Tensor, kwargs: dict[str, Any]) -> int:
        return 0 if self.module.batch_first else 1
