"""Quantisers by name, each as a way to make its linear layer of a plain one. Those of other packages need them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INNER, OUT = 64, 96


class Int8Linear(nn.Module):
    """A quantised layer of nobody's: int8 codes with a scale per row, packed the other way round, no attribute called
    `weight`."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = plain.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8).mT.contiguous())
        self.register_buffer("scales", scale)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qweight.mT.to(x.dtype) * self.scales.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def _bnb4(plain: nn.Linear, **options: Any) -> nn.Module:
    import bitsandbytes as bnb

    bias = plain.bias is not None
    layer = bnb.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4", **options
    )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _bnb8(plain: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    bias = plain.bias is not None
    layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _torchao(plain: nn.Linear, config: str, **options: Any) -> nn.Module:
    import torchao.quantization

    holder = nn.Sequential(plain)
    torchao.quantization.quantize_(holder, getattr(torchao.quantization, config)(**options))
    return holder[0]


def _hqq(plain: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")


def _quanto(plain: nn.Linear, qtype: str) -> nn.Module:
    from optimum import quanto

    layer = quanto.QLinear.from_module(plain, weights=getattr(quanto, qtype))
    layer.freeze()
    return layer


@dataclass(frozen=True)
class Quantiser:
    """How to make a quantised layer of a plain one, and what to expect of it."""

    make: Callable[[nn.Linear], nn.Module]
    needs: str = "torch"
    backend: str | None = None
    writable: bool = True
    noise: float = 1e-5
    """How far its kernel is from its weight, relatively: it may round activations."""
    copies: bool = True
    """Whether its layers can be copied at all."""


QUANTISERS = {
    "of nobody's": Quantiser(Int8Linear, backend="tests", writable=False),
    "bitsandbytes NF4": Quantiser(_bnb4, "bitsandbytes", "bnb 4bit"),
    "bitsandbytes NF4, scales in 32 bits": Quantiser(
        partial(_bnb4, compress_statistics=False), "bitsandbytes", "bnb 4bit"
    ),
    "bitsandbytes int8": Quantiser(_bnb8, "bitsandbytes", "bnb 8bit", noise=1e-2),
    "torchao int8": Quantiser(partial(_torchao, config="Int8WeightOnlyConfig"), "torchao", "torchao"),
    "torchao int8, activations too": Quantiser(
        partial(_torchao, config="Int8DynamicActivationInt8WeightConfig"), "torchao", "torchao", noise=3e-2
    ),
    "torchao int4 in int8": Quantiser(
        partial(_torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4), "torchao", "torchao"
    ),
    "HQQ": Quantiser(_hqq, "hqq", "hqq", copies=False),
    "quanto int8": Quantiser(partial(_quanto, qtype="qint8"), "optimum.quanto", "quanto", copies=False),
    "quanto int4": Quantiser(partial(_quanto, qtype="qint4"), "optimum.quanto", "quanto", copies=False),
}


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


PARAMS = [
    pytest.param(q, id=name, marks=[] if _there(q.needs) else [pytest.mark.skip(f"{q.needs} is not installed")])
    for name, q in QUANTISERS.items()
]
WRITABLE = [param for param in PARAMS if param.values[0].writable]  # type: ignore[attr-defined]


def plain(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(INNER, OUT, bias=bias).requires_grad_(False)


def quantised(
    q: Quantiser, bias: bool = True, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A layer of the quantiser's, of `plain(bias)` or of another weight."""
    layer = plain(bias).to(dtype)
    if weight is not None:
        layer.weight.copy_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return q.make(layer).requires_grad_(False)


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, INNER, generator=torch.Generator().manual_seed(seed)).to(dtype)
