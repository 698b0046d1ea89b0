"""Layers of torch whose weight is a tensor of a quantiser's own type: torchao's, optimum-quanto's."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peft.errors import UnsupportedError
from peft.hosts.base import Host
from peft.hosts.conv import Conv1dHost, Conv2dHost, Conv3dHost
from peft.hosts.embedding import EmbeddingHost
from peft.hosts.linear import LinearHost
from peft.hosts.opaque import OpaqueEmbeddingHost, OpaqueLinearHost
from peft.hosts.parameter import lend


class PackedTensor(Host):
    """What such layers share, whatever they do with the weight."""

    opaque = True
    fuses = False

    @property
    def backend(self) -> str:
        return _origin(self.raw)

    @property
    def dtype(self) -> torch.dtype:
        return self.raw.dtype

    @property
    def writable(self) -> bool:
        return _origin(self.raw) == "quanto" or hasattr(self.raw, "from_hp")

    def values(self) -> Tensor:
        """The weight in the shape in which torch stores it, dequantised."""
        raw: Any = self.raw
        with torch.no_grad():
            return raw.dequantize().detach()

    def packed(self, weight: Tensor) -> Tensor:
        shaped = self.native(weight).to(self.dtype).contiguous()
        if _origin(self.raw) == "quanto":
            return lend(self.module, weight=nn.Parameter(shaped, requires_grad=False)).qweight  # type: ignore[return-value]
        return torchao_like(self.raw, shaped)


class PackedLinearHost(PackedTensor, OpaqueLinearHost):
    """`nn.Linear`. Its kernel runs it even where nothing dequantises its weight."""

    parameter = "weight"  # type: ignore[assignment]
    fresh = True

    def dense(self) -> Tensor:
        return self.values() if type(self.raw).dequantize is not Tensor.dequantize else self.probed()


class PackedEmbeddingHost(PackedTensor, OpaqueEmbeddingHost):
    """`nn.Embedding`."""


class _PackedConv(PackedTensor):
    def weight(self) -> Tensor:
        return self.values().flatten(1)


class PackedConv1dHost(_PackedConv, Conv1dHost):
    """`nn.Conv1d`."""


class PackedConv2dHost(_PackedConv, Conv2dHost):
    """`nn.Conv2d`."""


class PackedConv3dHost(_PackedConv, Conv3dHost):
    """`nn.Conv3d`."""


PACKED: dict[type[Host], type[Host]] = {
    LinearHost: PackedLinearHost,
    EmbeddingHost: PackedEmbeddingHost,
    Conv1dHost: PackedConv1dHost,
    Conv2dHost: PackedConv2dHost,
    Conv3dHost: PackedConv3dHost,
}
"""The host of a layer with such a weight, by that of the plain layer."""


def is_packed_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of a type that shows the shape and dtype of the floats that it stands for."""
    return type(tensor).dequantize is not Tensor.dequantize or _origin(tensor) == "torchao"


def _origin(tensor: Tensor) -> str:
    """Who made a type of tensor: `"torchao"`, `"quanto"`, or the package it comes from."""
    root = type(tensor).__module__
    return "quanto" if root.startswith("optimum.quanto") else root.partition(".")[0]


def torchao_like(old: Any, weight: Tensor) -> Tensor:
    """A weight packed with the settings of another: its type, block sizes, range, and what it does to activations.

    Raises:
        UnsupportedError: this version of torchao packs it in other blocks.
    """
    kind: Any = type(old)
    make = kind.from_hp
    given = {"float8_dtype": lambda: old.qdata.dtype, "granularity": lambda: _granularity(old)}
    given["mapping_type"] = lambda: _mapping(old)
    options = {}
    for name in list(inspect.signature(make).parameters)[1:]:
        if name in given:
            options[name] = given[name]()
        elif hasattr(old, name) and name not in ("scale", "zero_point"):
            options[name] = getattr(old, name)
    new = make(weight, **options)
    if list(getattr(new, "block_size", ())) != list(getattr(old, "block_size", ())):
        raise UnsupportedError(
            f"torchao packs {kind.__name__} in blocks of {new.block_size} now, not of {old.block_size}, so nothing can "
            "be merged into it. Run it unmerged, or merge into the unquantised model and quantise that."
        )
    return new


def _granularity(old: Any) -> Any:
    """torchao's word for the blocks of a weight."""
    found = importlib.import_module("torchao.quantization.granularity")
    blocks = list(old.block_size)
    if blocks == list(old.shape):
        return found.PerTensor()
    return found.PerRow() if blocks == [1, old.shape[-1]] else found.PerGroup(blocks[-1])


def _mapping(old: Any) -> Any:
    kinds = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    zero = getattr(old, "zero_point", None)
    return kinds.SYMMETRIC if zero is None or not zero.any() else kinds.ASYMMETRIC
