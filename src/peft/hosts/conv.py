"""`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: a linear map of patches. W is (out channels, in channels per group ·
kernel)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.autograd import Form, LowRankOnto, low_rank_onto, no_autocast
from peft.hosts.base import Host, bare
from peft.operators import LowRank, Operator
from peft.operators.base import SMALL
from peft.updates import Add, Base


class ConvHost(Host):
    """What convolutions of one, two and three dimensions share.

    With `groups` > 1 the weight is narrow: each output sees its own group's channels. A wide weight, over all input
    channels, is one of an ungrouped convolution; `plus` widens where a narrow and a wide one meet (LoRA's factors are
    wide), and writing a wide weight makes the layer ungrouped.
    """

    fuses = True
    dimensions: ClassVar[int]
    cls: ClassVar[type[nn.Module]]

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.raw.shape[2:])

    @property
    def layout(self) -> dict[str, int]:
        return {"channels": self.module.in_channels, "taps": math.prod(self.kernel), "spatial": self.dimensions}

    @property
    def _function(self) -> Any:
        return (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]

    def weight(self) -> Tensor:
        return self.raw.flatten(1)

    def native(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1, *self.raw.shape[2:])

    def adjust(self, weight: Tensor, stored: Tensor) -> dict[str, Any]:
        return {"groups": self._groups(weight)}

    def _groups(self, weight: Tensor) -> int:
        """The groups with which a weight (…, in) is applied: those of the layer, or 1 if it spans all channels."""
        raw = self.raw
        if self.module.groups == 1 and weight.shape[1] * raw.shape[0] == raw.numel():
            return 1
        return self.module.in_channels // (weight.shape[1] // math.prod(raw.shape[2:]))

    def _wide(self, weight: Tensor) -> Tensor:
        groups = self._groups(weight)
        return weight if groups == 1 else torch.block_diag(*weight.chunk(groups))

    def plus(self, weight: Tensor, delta: Tensor) -> Tensor:
        if weight.shape != delta.shape:
            weight, delta = self._wide(weight), self._wide(delta)
        return weight + delta

    def mixable(self, weight: Tensor, block: int) -> Tensor:
        return self._wide(weight) if self.raw.shape[0] // self._groups(weight) % block else weight

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv, groups, dtype = self.module, self._groups(weight), x.dtype
        kernel = self.native(weight)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        if kernel.dtype != dtype:
            kernel = kernel.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return self._function(x, kernel, bias, conv.stride, padding, conv.dilation, groups)

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        if not isinstance(op, LowRank) or self._groups(op.down) > 1:
            return super().lift(op, x)
        return self._raised(op, self.act(op.down, None, x)) * op.scale

    def fused(self, form: Form, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        op: Any = form.op
        if type(form.add) is not Add or x.dim() != self.dimensions + 2:
            return None
        dtype = form.dtype(base, x, weight, bias)
        if dtype is None:
            return None
        with no_autocast(x):
            x, bias = x if x.dtype == dtype else x.to(dtype), form.moved(bias, dtype)
            if isinstance(op, LowRank) and self._groups(op.down) == 1 and not isinstance(op.scale, Tensor):
                return self._low_rank(form, base, x, weight, bias)
            if form.dropout is None and op.shape == weight.shape and (op.rounds or x.element_size() >= 4):
                return self.act(op.to(dtype).onto(weight.to(dtype)), bias, x)
        return None

    def _low_rank(self, form: Form, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Low-rank updates: the rest of the network sees none of their thin products."""
        gain = None if form.update is form.add else form.update.gain(base)
        if gain is not None and form.dropout is not None:
            return None
        y = self.act(weight, bias if gain is None else None, x)
        op, seen = form.op, x if form.dropout is None else form.dropout(x)
        small = x.numel() + y.numel() <= SMALL
        hidden = self.act(op.down, None, seen.to(op.down.dtype) if small and seen.dtype != op.down.dtype else seen)
        if not y.is_contiguous() or hidden.dtype != y.dtype or (small and torch.is_grad_enabled()):
            y = y.add_(self._raised(op, hidden), alpha=op.scale)
        elif torch.is_grad_enabled():
            y = LowRankOnto.apply(y, hidden, op.up, op.scale, op.groups)
        else:
            y = low_rank_onto(y, hidden, op.up, op.scale, op.groups)
        return y if gain is None else self.shift(y * gain.to(y.dtype)[(...,) + (None,) * self.dimensions], bias)

    def _raised(self, op: LowRank, hidden: Tensor) -> Tensor:
        """The second product of a low-rank update, of channels, without its scale."""
        up = op.up.to(hidden.dtype)
        return self._function(hidden, up.reshape(*up.shape, *(1,) * self.dimensions), groups=op.groups)

    def out(self, op: Operator, y: Tensor) -> Tensor:
        channel = y.dim() - self.dimensions - 1
        return op.on(y.movedim(channel, -1)).movedim(-1, channel)

    def shift(self, y: Tensor, bias: Tensor | None, sign: int = 1) -> Tensor:
        return y if bias is None else super().shift(y, bias[(...,) + (None,) * self.dimensions], sign)

    def leaf(self, kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        conv, one = self.module, (1,) * self.dimensions
        down = kind == "down"
        kernel = conv.kernel_size if down else one
        groups = 1 if down else self.groups
        inner = shape[1] // math.prod(kernel)
        module = bare(
            self.cls,
            in_channels=inner * groups,
            out_channels=shape[0],
            kernel_size=kernel,
            stride=conv.stride if down else one,
            padding=conv.padding if down else (0,) * self.dimensions,
            dilation=conv.dilation if down else one,
            groups=groups,
            padding_mode=conv.padding_mode if down else "zeros",
            transposed=False,
            output_padding=(0,) * self.dimensions,
            _reversed_padding_repeated_twice=conv._reversed_padding_repeated_twice
            if down
            else [0, 0] * self.dimensions,
        )
        module.weight = nn.Parameter(torch.empty(shape[0], inner, *kernel, device=device, dtype=dtype))
        module.register_parameter("bias", None)
        return module


class Conv1dHost(ConvHost):
    name, dimensions, cls = "Conv1d", 1, nn.Conv1d
    types = ("torch.nn.modules.conv.Conv1d",)


class Conv2dHost(ConvHost):
    name, dimensions, cls = "Conv2d", 2, nn.Conv2d
    types = ("torch.nn.modules.conv.Conv2d",)


class Conv3dHost(ConvHost):
    name, dimensions, cls = "Conv3d", 3, nn.Conv3d
    types = ("torch.nn.modules.conv.Conv3d",)
