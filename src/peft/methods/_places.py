"""Places of a matrix drawn by a seed: files of some methods hold values and leave their places to it."""

from __future__ import annotations

import torch
from torch import Tensor

from peft.errors import TargetError


def draw(out: int, inner: int, count: int, seed: int | None) -> Tensor:
    """Rows and columns (2, count) of `count` different places of an (out, inner) matrix, int64, on the CPU.

    The permutation comes from a generator of its own, whose default seed is fixed as well.
    """
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    flat = torch.randperm(out * inner, generator=generator)[:count]
    return torch.stack((flat // inner, flat % inner))


def must_fit(name: str, count: int, key: str, out: int, inner: int) -> None:
    """Raise TargetError unless the layer `key` has room for `count` values."""
    if count > out * inner:
        raise TargetError(
            f"{name} asks for {count} values, but {key!r} is ({out}, {inner}) and has {out * inner} places. Lower it, "
            "or leave the layer out of the targets."
        )
