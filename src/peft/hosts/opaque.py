"""Layers that run themselves: quantised ones, whose kernels read weights packed in a way of their own.

The layer's own forward gives W x + b, and its own backward the gradient of x. W is only made, densely and for the
moment, for what can't do without: norms of rows, initialisations from W, merging.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.errors import TargetError
from peft.hosts.base import Host
from peft.hosts.conv import Conv1dHost, Conv2dHost, Conv3dHost
from peft.hosts.embedding import EmbeddingHost
from peft.hosts.linear import Conv1DHost, LinearHost
from peft.hosts.parameter import lend

_PACKERS = ("torchao.", "optimum.quanto.", "bitsandbytes.")
_BACKENDS = {
    "gptqmodel": "gptq",
    "auto_gptq": "gptq",
    "auto_round": "auto-round",
    "neural_compressor": "inc",
    "transformer_engine": "te",
    "optimum": "quanto",
}
_ROWS = 1024
"""Rows of the identity that a layer is run on at a time to find its weight."""


def is_packed(tensor: Tensor) -> bool:
    """Whether a stored tensor is no plain matrix of numbers: integers, 8-bit floats, a quantiser's tensor subclass."""
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        return True
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        return False
    return kind.dequantize is not Tensor.dequantize or any(c.__module__.startswith(_PACKERS) for c in kind.__mro__)


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer by the attributes that quantisers give it; None where it has none."""
    for out, inner in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        found = getattr(module, out, None), getattr(module, inner, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found  # type: ignore[return-value]
    return None


def stored(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    return {n: t for held in (module._parameters, module._buffers) for n, t in held.items() if t is not None}


class SelfRun(Host):
    """A layer with a plain weight whose forward is not that of torch's class, so that only the layer can run it."""

    opaque = True
    fuses = False


class SelfRunConv1dHost(SelfRun, Conv1dHost):
    """A subclass of `nn.Conv1d`."""


class SelfRunConv2dHost(SelfRun, Conv2dHost):
    """A subclass of `nn.Conv2d`."""


class SelfRunConv3dHost(SelfRun, Conv3dHost):
    """A subclass of `nn.Conv3d`."""


class SelfRunLinearHost(SelfRun, LinearHost):
    """A subclass of `nn.Linear`."""

    def run(self, layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = layer(x, *args, **kwargs)
        lost = x.requires_grad and torch.is_grad_enabled() and isinstance(y, Tensor) and not y.requires_grad
        return self.straight_through(y, x) if lost else y

    def straight_through(self, y: Tensor, x: Tensor) -> Tensor:
        """y, with the gradient that W x + b has for x."""
        if not torch.compiler.is_compiling():
            return StraightThrough.apply(y, x, self)
        linear = F.linear(x, self.weight().to(x.dtype))
        return y + (linear - linear.detach())


class SelfRunConv1DHost(SelfRunLinearHost, Conv1DHost):
    """A subclass of transformers' `Conv1D`."""


SELF_RUN: dict[type[Host], type[Host]] = {
    LinearHost: SelfRunLinearHost,
    Conv1DHost: SelfRunConv1DHost,
    Conv1dHost: SelfRunConv1dHost,
    Conv2dHost: SelfRunConv2dHost,
    Conv3dHost: SelfRunConv3dHost,
}
"""The host of a layer that runs itself, by that of the plain layer: of all that are computed past otherwise."""


class OpaqueLinearHost(SelfRunLinearHost):
    """Any quantised linear layer: GPTQ, AWQ, AQLM, EETQ, 8-bit floats, …

    W is what the layer's `dequantize()` says; where it has none, what the layer makes of the rows of the identity,
    which is exact for quantisers of weights. Nothing can be merged, since how the weight is packed is unknown.
    """

    types = ("transformer_engine.pytorch.module.linear.Linear",)

    @property
    def writable(self) -> bool:
        return False

    @cached_property
    def parameter(self) -> str:  # type: ignore[override]
        """Where most of the weight is stored."""
        held = stored(self.module)
        return "weight" if "weight" in held or not held else max(held, key=lambda name: held[name].numel())

    @property
    def raw(self) -> Tensor:
        return stored(self.module)[self.parameter]

    @property
    def backend(self) -> str | None:
        root = type(self.module).__module__.partition(".")[0]
        return _BACKENDS.get(root, root)

    @property
    def out_features(self) -> int:
        return self._sizes[0]

    @property
    def in_features(self) -> int:
        return self._sizes[1]

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def _sizes(self) -> tuple[int, int]:
        found = sizes(self.module)
        if found is None:
            raise TargetError(
                f"{type(self.module).__name__} does not tell its sizes: it has neither in_features and out_features "
                "nor infeatures and outfeatures. Set them on the layer."
            )
        return found

    @property
    def dtype(self) -> torch.dtype:
        given = getattr(self.module, "compute_dtype", None)
        if isinstance(given, torch.dtype):
            return given
        held = [t.dtype for t in stored(self.module).values() if t.dtype.is_floating_point and t.element_size() > 1]
        return held[-1] if held else torch.get_default_dtype()  # after the weight come scales and the bias

    @torch.no_grad()
    def weight(self) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.dense()

    def dense(self) -> Tensor:
        """W (out, in), dequantised; a new tensor."""
        own = getattr(self.module, "dequantize", None)
        if callable(own):
            found = own()
            if isinstance(found, Tensor) and found.shape == self._sizes:
                return found.detach()
        return self.probed()

    def probed(self) -> Tensor:
        """W by running the layer, without its bias, on the rows of the identity."""
        (out, inner), dtype, device = self._sizes, self.dtype, self.device
        layer = self._without_bias()
        left = layer(torch.zeros(1, inner, dtype=dtype, device=device))
        found = torch.empty(out, inner, dtype=dtype, device=device)
        for start in range(0, inner, _ROWS):
            stop = min(start + _ROWS, inner)
            rows = torch.zeros(stop - start, inner, dtype=dtype, device=device)
            rows.diagonal(start).fill_(1)
            found[:, start:stop] = (layer(rows) - left).mT
        return found

    def _without_bias(self) -> nn.Module:
        module = self.module
        if self.bias_parameter in module._parameters:
            return lend(module, **{self.bias_parameter: None})
        twin = lend(module)
        if self.bias_parameter in module._buffers:
            twin.__dict__["_buffers"] = {**module._buffers, self.bias_parameter: None}
        elif self.bias_parameter in module.__dict__:
            twin.__dict__[self.bias_parameter] = None
        return twin


class EetqHost(OpaqueLinearHost):
    """EETQ's layers, which tell their sizes by the shape of the weight, (in, out), alone."""

    types = ("transformers.integrations.eetq.EetqLinear", "eetq.modules.qlinear.W8A16Linear")

    @property
    def backend(self) -> str | None:
        return "eetq"

    @property
    def _sizes(self) -> tuple[int, int]:
        inner, out = self.module.weight.shape
        return out, inner


class OpaqueEmbeddingHost(EmbeddingHost):
    """An embedding with packed rows: W is what it says of every index."""

    opaque = True

    @property
    def writable(self) -> bool:
        return False

    @property
    def backend(self) -> str | None:
        root = type(self.raw).__module__.partition(".")[0]
        return _BACKENDS.get(root, root)

    @property
    def dtype(self) -> torch.dtype:
        found = self.raw.dtype
        return found if found.is_floating_point and found.itemsize > 1 else torch.get_default_dtype()

    @property
    def out_features(self) -> int:
        return self.module.embedding_dim

    @property
    def in_features(self) -> int:
        return self.module.num_embeddings

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    @torch.no_grad()
    def weight(self) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.module(torch.arange(self.in_features, device=self.device)).mT


class StraightThrough(torch.autograd.Function):
    """y as it is, with the gradient that W x + b has for x, for kernels that have no backward (activations rounded to
    integers; weights repacked for inference). Shapes: y (…, out), x (…, in)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, host: Host) -> Tensor:
        ctx.host, ctx.dtype = host, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, (grads[0].to(ctx.dtype) @ ctx.host.weight().to(ctx.dtype)), None
