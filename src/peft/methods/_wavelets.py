"""Orthogonal wavelets by name: Daubechies (db), symlets (sym) and coiflets (coif)."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import torch
from torch import Tensor

NAMES = (
    *(f"db{n}" for n in range(1, 39)),
    *(f"sym{n}" for n in range(2, 21)),
    *(f"coif{n}" for n in range(1, 18)),
)


def filters(name: str) -> Tensor:
    """The reconstruction filters (2, L), low pass and high pass, in float64.

    The low-pass filters are those of Daubechies' tables; the high-pass one mirrors it with alternating signs.
    """
    low = torch.tensor(_tables()[name], dtype=torch.float64)
    signs = torch.ones_like(low)
    signs[1::2] = -1
    return torch.stack((low, signs * low.flip(0)))


@cache
def _tables() -> dict[str, list[float]]:
    return json.loads(resources.files("peft.methods").joinpath("wavelets.json").read_text())
