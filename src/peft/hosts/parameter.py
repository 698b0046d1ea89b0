"""A bare `nn.Parameter` of a module: 2-D, or a 3-D stack of expert matrices.

The module reads its parameter wherever it likes, so it is lent the updated one for the call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft.hosts.base import Host


def lend(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A module that shares everything with `module` but the given parameters.

    It is a new object, so the original is never changed and other threads may use it meanwhile. If `module` wraps the
    one that holds the parameters (several of one module are adapted), so does its twin.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    wrapped = module._modules.get("base_layer")
    if wrapped is None:
        twin.__dict__["_parameters"] = {**module._parameters, **tensors}
    else:
        twin.__dict__["_modules"] = {**module._modules, "base_layer": lend(wrapped, **tensors)}
    return twin


class ParameterHost(Host):
    """The host of `target_parameters`: `parameter_name` says which one. 3-D stacks are block rows: W is (E·out, in)."""

    name = "ParamWrapper"
    takes_bias = False

    def __init__(self, module: nn.Module, parameter_name: str) -> None:
        self._outermost = module
        while (wrapped := module._modules.get("base_layer")) is not None:
            module = wrapped
        super().__init__(module)
        self.parameter = parameter_name  # type: ignore[misc]

    @property
    def factored(self) -> bool:
        return False

    @property
    def experts(self) -> int:
        """Number of stacked matrices."""
        return self.raw.shape[0] if self.raw.dim() == 3 else 1

    @property
    def transposed(self) -> bool:
        """Whether each matrix is stored (in, out); modules of transformers say so in `is_transposed`."""
        return self.raw.dim() == 3 and bool(getattr(self.module, "is_transposed", False))

    @property
    def layout(self) -> dict[str, int]:
        return {"experts": self.experts}

    def bias(self) -> None:
        return None

    def weight(self) -> Tensor:
        stack = self.raw.mT if self.transposed else self.raw
        return stack.reshape(-1, stack.shape[-1])

    def native(self, weight: Tensor) -> Tensor:
        if self.raw.dim() == 2:
            return weight
        stack = weight.unflatten(0, (self.experts, -1))
        return stack.mT if self.transposed else stack

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return lend(self._outermost, **{self.parameter: self.native(weight).to(self.dtype)})(x, *args, **kwargs)
