"""Factors of another rank: padded with zeros, which change nothing, or cut."""

from __future__ import annotations

from torch import Tensor

from peft.hosts import Host


def resized(factor: Tensor, up: bool, rank: int, host: Host) -> Tensor:
    """A factor as stored, with `rank` rows (A) or columns (B) per block; itself if that is what it has.

    Args:
        factor: A (r, …) or B (out, r, …).
        up: Whether it is B.
        rank: The rank wanted; zeros are added, or the last ones cut off.
        host: The layer. Grouped convolutions and expert stacks have one block of ranks per group or expert.
    """
    experts = host.layout.get("experts", 1)
    blocks, dim = experts if up else max(experts, host.groups), 1 if up else 0
    # B of an expert stack holds its ranks one after another, the experts within; all else the other way round.
    shape = (-1, blocks) if up and experts > 1 else (blocks, -1)
    blocked = factor.unflatten(dim, shape)
    dim += 0 if up and experts > 1 else 1
    have = blocked.shape[dim]
    if have == rank:
        return factor
    if have > rank:
        blocked = blocked.narrow(dim, 0, rank)
    else:
        sizes = list(blocked.shape)
        sizes[dim] = rank
        made = blocked.new_zeros(sizes)
        made.narrow(dim, 0, have).copy_(blocked)
        blocked = made
    return blocked.flatten(*((1, 2) if up else (0, 1)))


def rank_of(factor: Tensor, up: bool, host: Host) -> int:
    """The rank of a factor as stored, per block."""
    experts = host.layout.get("experts", 1)
    return factor.shape[1] // experts if up else factor.shape[0] // max(experts, host.groups)
