"""What the methods share that multiply W by a rotation of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from peft.hosts import Host
from peft.operators import Operator
from peft.updates import After, Before, Update


def width(host: Host) -> int:
    """The length of the vectors that are turned: inputs; where those are indices, the vectors they stand for."""
    return host.out_features if host.one_hot else host.in_features


def turn(op: Operator, host: Host) -> Update:
    """W op; of an embedding, whose inputs can't be turned, op W."""
    return After(op) if host.one_hot else Before(op)


def drop_blocks(blocks: Tensor, rate: float) -> Tensor:
    """Blocks (..., b, b), each replaced by the identity with probability `rate`: the dropout of products."""
    drop = torch.rand(blocks.shape[:-2], device=blocks.device) < rate
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(drop[..., None, None], eye, blocks)
