"""What is adapted: single layers, stacks of them, small Llamas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.cases.methods import PROJECTIONS


@contextmanager
def making(dtype: torch.dtype, device: str) -> Iterator[None]:
    """What is made within has this dtype, and is on this device from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class Single(nn.Module):
    """One frozen layer, and a name for it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer.requires_grad_(False)


def packed(layer: nn.Linear, bits: int) -> nn.Module:
    """A linear layer of bitsandbytes' with the weight of a plain one."""
    import bitsandbytes as bnb

    sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
    if bits == 8:
        made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.to(dtype).load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


class Experts(nn.Module):
    """A stack of expert matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(8, 512, 256) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.stack)


def transposed() -> nn.Module:
    """GPT-2's linear layer."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(1024, 1024)


class Block(nn.Module):
    """The seven projections of a transformer block, without the rest of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in PROJECTIONS:
            x = getattr(self, name)(x)
        return x


def stack(blocks: int, width: int, device: str = "cpu") -> nn.Sequential:
    """A model of 7 * blocks linear layers, always with the same weights."""
    torch.manual_seed(0)
    with making(torch.float32, device):
        return nn.Sequential(*(Block(width) for _ in range(blocks)))


class Size(NamedTuple):
    """A Llama, and the batch it is given."""

    layers: int
    hidden: int
    inner: int
    vocab: int
    rows: int
    tokens: int


def llama(size: Size, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> nn.Module:
    """A Llama with random weights, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        vocab_size=size.vocab,
        **{"num_attention_heads": size.hidden // 64, "num_key_value_heads": size.hidden // 64, **changes},
    )
    with making(dtype, device):
        return LlamaForCausalLM(config).requires_grad_(False)
