"""`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: a linear map of patches. W is (out channels, in channels per group ·
kernel)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.hosts.base import Host, bare
from peft.operators import LowRank, Operator


class ConvHost(Host):
    """What convolutions of one, two and three dimensions share.

    With `groups` > 1 the weight is narrow: each output sees its own group's channels. A wide weight, over all input
    channels, is one of an ungrouped convolution; `plus` widens where a narrow and a wide one meet (LoRA's factors are
    wide), and writing a wide weight makes the layer ungrouped.
    """

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

    def weight(self) -> Tensor:
        return self.raw.flatten(1)

    def native(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, *self.raw.shape[2:]))

    def adjust(self, weight: Tensor, stored: Tensor) -> dict[str, Any]:
        return {"groups": self._groups(weight)}

    def _groups(self, weight: Tensor) -> int:
        """The groups with which a weight (…, in) is applied: those of the layer, or 1 if it spans all channels."""
        channels = weight.shape[1] // math.prod(self.raw.shape[2:])
        return self.module.in_channels // channels

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
        conv, groups = self.module, self._groups(weight)
        kernel = self.native(weight).to(x.dtype)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        function = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        return function(
            x, kernel, None if bias is None else bias.to(x.dtype), conv.stride, padding, conv.dilation, groups
        )

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        if not isinstance(op, LowRank) or self._groups(op.down) > 1:
            return super().lift(op, x)
        op = op.to(x.dtype)
        hidden = self.act(op.down, None, x)
        up = op.up[(...,) + (None,) * self.dimensions]
        return (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1](hidden, up, groups=op.groups) * op.scale

    def out(self, op: Operator, y: Tensor) -> Tensor:
        channel = y.dim() - self.dimensions - 1
        return op.to(y.dtype).apply(y.movedim(channel, -1)).movedim(-1, channel)

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
