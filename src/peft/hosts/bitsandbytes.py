"""bitsandbytes' linear layers in 4 and 8 bits: QLoRA (arXiv 2305.14314), LLM.int8() (arXiv 2208.07339)."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft.hosts.opaque import OpaqueLinearHost


def from_4bit(weight: Tensor, state: Any) -> Tensor:
    """W (out, in) of a packed 4-bit weight with its `QuantState`."""
    return importlib.import_module("bitsandbytes.functional").dequantize_4bit(weight.data, state)


def from_8bit(weight: Tensor, scales: Tensor) -> Tensor:
    """W (out, in), float32, of an int8 weight with the largest magnitude of each row (out,)."""
    return weight.data.float() * (scales[:, None] / 127)


class _Host(OpaqueLinearHost):
    fresh = True
    parameter = "weight"  # type: ignore[assignment]

    @property
    def writable(self) -> bool:
        return True

    @property
    def raw(self) -> Tensor:
        return self.module._parameters["weight"]


class Linear4bitHost(_Host):
    """`bnb.nn.Linear4bit`: NF4 or FP4 with a scale per block, the scales quantised themselves if the layer says so."""

    name = "Linear4bit"
    types = ("bitsandbytes.nn.modules.Linear4bit",)

    @property
    def backend(self) -> str:
        return "bnb 4bit"

    @property
    def _state(self) -> Any:
        """How the weight is packed; None before the layer was moved to its device, which is when it is quantised."""
        state = getattr(self.raw, "quant_state", None)
        return getattr(self.module, "quant_state", None) if state is None else state

    @property
    def _repacked(self) -> bool:
        """Whether the weight lies as the CPU's kernel wants it, since the layer has run in evaluation mode there."""
        return bool(getattr(self._state, "packing_format_for_cpu", False))

    @property
    def dtype(self) -> torch.dtype:
        state = self._state
        if state is None:
            return self.raw.dtype
        return state.original_dtype if self._repacked else state.dtype

    def dense(self) -> Tensor:
        if self._state is None:
            return self.raw.detach().as_subclass(Tensor)
        # No function of theirs reads the CPU's order without changing the state of the layer. The layer itself does.
        return self.probed() if self._repacked else from_4bit(self.raw, self._state)

    def run(self, layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self._repacked and x.requires_grad and torch.is_grad_enabled()):
            return super().run(layer, x, *args, **kwargs)
        with torch.no_grad():  # their CPU kernel has no backward, and adds the bias in place of what autograd watches
            y = layer(x, *args, **kwargs)
        return self.straight_through(y, x)

    def packed(self, weight: Tensor) -> Tensor:
        old: Any = self.raw
        state = self._state
        new = type(old)(
            weight.to(self.dtype).contiguous(),
            requires_grad=False,
            blocksize=state.blocksize if state else old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=state.quant_type if state else old.quant_type,
            quant_storage=old.quant_storage,
        )
        return new.to(weight.device) if state else new

    def adjust(self, weight: Tensor, stored: Any) -> dict[str, Any]:
        return {"quant_state": stored.quant_state}


class Linear8bitHost(_Host):
    """`bnb.nn.Linear8bitLt`: int8 with a scale per row. Inputs are rounded to int8 as well."""

    name = "Linear8bitLt"
    types = ("bitsandbytes.nn.modules.Linear8bitLt",)

    @property
    def backend(self) -> str:
        return "bnb 8bit"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.raw.dtype == torch.int8 else self.raw.dtype

    def dense(self) -> Tensor:
        raw = self.raw
        if raw.dtype != torch.int8:  # not quantised yet, or at each call
            return raw.detach().as_subclass(Tensor)
        scales = getattr(raw, "SCB", None)  # there before the first call, in the layer's state after it
        scales = self.module.state.SCB if scales is None else scales
        return from_8bit(raw, scales)

    def packed(self, weight: Tensor) -> Tensor:
        old: Any = self.raw
        if old.dtype != torch.int8:
            weight = weight.to(old.dtype).contiguous()
            return type(old)(weight, requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        # Their parameter quantises itself when it is moved from the CPU.
        return type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)

    def adjust(self, weight: Tensor, stored: Any) -> dict[str, Any]:
        state = copy.copy(self.module.state)
        state.reset_grads()
        return {"state": state}
