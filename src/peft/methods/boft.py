"""BOFT: rotations made of butterfly factors (arXiv 2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._sizes import must_divide
from peft.methods._turning import drop_blocks, turn, width
from peft.operators import BlockDiagonal, Butterfly, Diagonal, Operator, cayley
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import After, Chain, Update


@dataclass
class BOFTConfig(TargetedConfig):
    """BOFT (arXiv 2311.06243): diag(s) W Mᵀ, where M is a product of `boft_n_butterfly_factor` butterfly factors.

    Each factor is block-diagonal, rotations (b, b) along the diagonal, between permutations that mix ever more distant
    inputs; with one factor it is OFT. On embeddings M turns the vectors.

    Example:
        >>> from peft import BOFTConfig
        >>> BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["query"]).boft_block_size
        8
    """

    boft_block_size: int = field(default=4, metadata={"help": "Size of a block; 0 if boft_block_num is given."})
    boft_block_num: int = field(default=0, metadata={"help": "Number of blocks; 0 if boft_block_size is given."})
    boft_n_butterfly_factor: int = field(
        default=1, metadata={"help": "Factors; 2 to the power of one less must divide the number of blocks."}
    )
    boft_dropout: float = field(default=0.0, metadata={"help": "Rate at which blocks become the identity, training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'boft_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "bias", ("none", "all", "boft_only"))
        positive(self, "boft_n_butterfly_factor")
        if (self.boft_block_size > 0) == (self.boft_block_num > 0):
            raise ConfigError(
                f"boft_block_size = {self.boft_block_size} and boft_block_num = {self.boft_block_num}: give one of "
                "them and set the other to 0, since their product is the layer's input."
            )
        if not 0 <= self.boft_dropout <= 1:
            raise ConfigError(f"boft_dropout is {self.boft_dropout!r}; it is a probability, from 0 to 1.")


def _scale(sizes: Sizes) -> tuple[int, ...]:
    return (1, sizes.out) if sizes.spatial else (sizes.out, 1)


class BOFT(WeightMethod, peft_type="BOFT", config=BOFTConfig):
    slots = (
        Slot("boft_R", "factors boft_block_num boft_block_size boft_block_size"),
        Slot("boft_s", _scale),
        Slot("boft_order", "factors width", kind="buffer", saved=False, dtype=torch.long),
    )
    settings = ("boft_block_size", "boft_block_num")
    samples = (
        {"boft_block_size": 4},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "init_weights": False},
        {"boft_block_size": 0, "boft_block_num": 2},
    )

    def resolve(self, config: BOFTConfig, host: Host, site: Site) -> dict[str, Any]:
        inner, factors = width(host), config.boft_n_butterfly_factor
        if config.boft_block_size:
            must_divide("boft_block_size", config.boft_block_size, site.key, inner)
        else:
            must_divide("boft_block_num", config.boft_block_num, site.key, inner)
        count = config.boft_block_num or inner // config.boft_block_size
        size = inner // count
        most = (count & -count).bit_length() if size % 2 == 0 else 1
        if factors > most:
            raise TargetError(
                f"boft_n_butterfly_factor = {factors} on {site.key!r}: {count} blocks of size {size} allow {most} at "
                "most: they pair halves of blocks, so the size must be even, and each halves the number of blocks."
            )
        sizes = {"boft_block_size": size, "boft_block_num": count, "factors": factors, "width": inner}
        return {**sizes, "spatial": len(host.kernel)}

    def derive(self, p: Parts, host: Host) -> None:
        size, count = p.boft_block_size, p.boft_block_num
        for factor, order in enumerate(p.boft_order):
            order.copy_(butterfly_order(order.shape[0], count >> factor, size // 2 if factor else size))

    def reset(self, p: Parts, host: Host) -> None:
        if p.config.init_weights:
            nn.init.zeros_(p.boft_R)
            nn.init.ones_(p.boft_s)
        else:
            nn.init.normal_(p.boft_R, std=0.1)
            nn.init.normal_(p.boft_s, mean=1.0, std=0.1)

    def update(self, p: Parts, host: Host) -> Update:
        blocks = cayley((p.boft_R - p.boft_R.mT) / 2)
        if p.training and p.config.boft_dropout:
            blocks = drop_blocks(blocks, p.config.boft_dropout)
        single = blocks.shape[0] == 1
        rotation: Operator = BlockDiagonal(blocks[0]) if single else Butterfly(blocks, p.boft_order)
        return Chain((turn(rotation.T, host), After(Diagonal(p.boft_s.flatten()), keep_bias=True)))

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: BOFTConfig) -> dict[str, Tensor]:
        blocks = tensors.get("boft_R")
        missing = 0 if blocks is None else p.boft_R.shape[0] - blocks.shape[0]
        if blocks is None or missing <= 0:
            return tensors
        # Without its CUDA extension HF PEFT trains one factor, whatever the config says: zeros are identities.
        return {**tensors, "boft_R": torch.cat([blocks, blocks.new_zeros(missing, *blocks.shape[1:])])}


def butterfly_order(size: int, parts: int, chunk: int) -> Tensor:
    """The order (size,) in which each of `parts` equal parts has its even chunks first, and then its odd ones.

    >>> butterfly_order(8, 1, 2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    chunks = torch.arange(size).view(parts, -1, chunk)
    return torch.cat((chunks[:, 0::2], chunks[:, 1::2]), dim=1).flatten()
