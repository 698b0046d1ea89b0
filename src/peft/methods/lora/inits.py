"""Initial values of A and B."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peft.errors import TargetError, UnsupportedError
from peft.hosts import Host
from peft.parts import Parts

CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that move part of the base weight into the adapter."""


def fill(p: Parts, host: Host, init: bool | str) -> None:
    """Fill `lora_A` and `lora_B` in place.

    True: A uniform in ±1/sqrt(in), B zero (embeddings: A zero, B normal), so the update starts at zero. False: both
    random. `gaussian`: A normal with deviation 1/r. `orthogonal`: A and B from the halves of one orthogonal matrix.
    """
    down, up = p.lora_A, p.lora_B
    if p.lora_bias:
        bias = p.leaf("lora_B").bias
        nn.init.zeros_(bias) if init else nn.init.uniform_(
            bias, -1 / math.sqrt(up.shape[1]), 1 / math.sqrt(up.shape[1])
        )
    if host.one_hot:
        nn.init.normal_(down) if init is False else nn.init.zeros_(down)
        nn.init.normal_(up)
    elif init == "orthogonal":
        _orthogonal(down, up, p.r, host)
    elif init == "gaussian":
        nn.init.normal_(down, std=1 / p.r)
        nn.init.zeros_(up)
    elif isinstance(init, bool):
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up) if init else nn.init.kaiming_uniform_(up, a=math.sqrt(5))
    else:
        raise UnsupportedError(
            f"init_lora_weights={init!r} starts from data and is not available in this version. Choose True, "
            "'gaussian' or 'orthogonal'; adapters that were trained with it load."
        )


def _orthogonal(down: Tensor, up: Tensor, r: int, host: Host) -> None:
    if r % 2 or up.shape[1] != r or down.shape[0] != r or host.layout:
        raise TargetError(
            f"init_lora_weights='orthogonal' needs an even rank and a linear layer, not r={r} on a {host.name}."
        )
    basis = torch.linalg.qr(torch.randn(r, r, device=down.device))[0]
    even, odd = basis[0::2], basis[1::2]
    down.copy_((torch.randn(down.shape[1], r // 2, device=down.device) @ odd).mT / 10)
    up.copy_((torch.randn(r // 2, up.shape[0], device=down.device).mT @ even) / 10)
