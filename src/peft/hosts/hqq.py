"""HQQ's linear layer (mobiusml.github.io/hqq_blog): scales and zeros per group, found by half-quadratic steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft.hosts.opaque import OpaqueLinearHost
from peft.hosts.parameter import lend


class HqqHost(OpaqueLinearHost):
    """`hqq.core.quantize.HQQLinear`."""

    name = "HqqLoraLinear"
    types = ("hqq.core.quantize.HQQLinear",)
    parameter = "W_q"  # type: ignore[assignment]
    fresh = True

    @property
    def writable(self) -> bool:
        return True

    def packed(self, weight: Tensor) -> Tensor:
        twin: Any = lend(self.module)
        del twin._parameters["W_q"]  # theirs assigns a plain tensor on the way
        twin.quantize(weight.to(self.dtype), **self.module.quant_config)
        self._meta = twin.meta
        return twin.W_q

    def adjust(self, weight: Tensor, stored: Tensor) -> dict[str, Any]:
        return {"meta": self._meta}
