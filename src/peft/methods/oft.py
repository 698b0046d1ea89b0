"""OFT: block-diagonal rotations of the input (arXiv 2306.07280, OFTv2 arXiv 2506.19847)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft.config import TargetedConfig, choice
from peft.errors import ConfigError, PeftWarning
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._sizes import divisors, nearest_divisor
from peft.methods._turning import drop_blocks, turn, width
from peft.operators import BlockDiagonal, Cayley, Neumann
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Update


@dataclass
class OFTConfig(TargetedConfig):
    """OFT (arXiv 2306.07280): W Rᵀ, R block-diagonal, each block the Cayley transform of a trained skew matrix Q.

    R is the Neumann series of (I + Q) (I - Q)⁻¹ (OFTv2, arXiv 2506.19847), or exactly (I - Q) (I + Q)⁻¹: the signs of Q
    differ, so an adapter trained in one way is another matrix in the other. Sizes that don't divide the input are
    replaced by the nearest that does, with a warning. On embeddings R turns the vectors.

    Example:
        >>> from peft import OFTConfig
        >>> OFTConfig(oft_block_size=64, target_modules=["q_proj", "v_proj"]).oft_block_size
        64
    """

    r: int = field(default=0, metadata={"help": "Number of blocks; 0 if oft_block_size is given."})
    oft_block_size: int = field(default=32, metadata={"help": "Size of a block; 0 if r is given."})
    module_dropout: float = field(default=0.0, metadata={"help": "Rate at which blocks become the identity, training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'oft_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Q zero, so training starts at the base model."})
    coft: bool = field(default=False, metadata={"help": "Keep Q small: |Q| at most eps / sqrt(blocks) (constrained)."})
    eps: float = field(default=6e-5, metadata={"help": "The bound of coft."})
    block_share: bool = field(default=False, metadata={"help": "One block for all positions."})
    use_cayley_neumann: bool = field(default=True, metadata={"help": "The series; False: a linear solve, exact."})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "Terms of the series."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "bias", ("none", "all", "oft_only"))
        if (self.r > 0) == (self.oft_block_size > 0):
            raise ConfigError(
                f"r = {self.r} and oft_block_size = {self.oft_block_size}: give one of them and set the other to 0, "
                "since r · oft_block_size is the layer's input."
            )
        if not 0 <= self.module_dropout <= 1:
            raise ConfigError(f"module_dropout is {self.module_dropout!r}; it is a probability, from 0 to 1.")
        if self.num_cayley_neumann_terms < 2:
            raise ConfigError(f"num_cayley_neumann_terms is {self.num_cayley_neumann_terms}; it takes 2 or more.")


class OFT(WeightMethod, peft_type="OFT", config=OFTConfig):
    slots = (Slot("oft_R", "rows packed", kind="leaf", factor=True),)
    settings = ("r", "oft_block_size")
    samples = (
        {"r": 0, "oft_block_size": 4},
        {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False},
        {"r": 0, "oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.1, "init_weights": False},
    )

    def resolve(self, config: OFTConfig, host: Host, site: Site) -> dict[str, Any]:
        inner = width(host)
        name, wanted = ("r", config.r) if config.r else ("oft_block_size", config.oft_block_size)
        found = nearest_divisor(inner, wanted)
        size = inner // found if config.r else found
        if size == 1 or found != wanted:
            message = f"{name} = {wanted} does not divide the {inner} features of {site.key!r}; {found} is used there."
            if size == 1:
                message = (
                    f"{name} = {wanted} means blocks of size 1 on {site.key!r}, so nothing is trained there. "
                    f"Block sizes that divide its {inner} features: {divisors(inner)[1:]}."
                )
            warnings.warn(message, PeftWarning, stacklevel=2)
        count = inner // size
        rows = 1 if config.block_share else count
        return {"r": count, "oft_block_size": size, "rows": rows, "packed": size * (size - 1) // 2}

    def reset(self, p: Parts, host: Host) -> None:
        p.oft_R.zero_() if p.config.init_weights else p.oft_R.normal_(std=0.1)

    def update(self, p: Parts, host: Host) -> Update:
        config, packed = p.config, self.constrained(p) if p.config.coft else p.oft_R
        sizes = p.oft_block_size, p.r
        terms = config.num_cayley_neumann_terms
        rotation = Neumann(packed, *sizes, terms) if config.use_cayley_neumann else Cayley(packed, *sizes)
        if p.training and config.module_dropout:
            blocks = rotation.rotations().expand(p.r, -1, -1)
            return turn(BlockDiagonal(drop_blocks(blocks, config.module_dropout)).T, host)
        return turn(rotation.T, host)

    def constrained(self, p: Parts) -> Tensor:
        """Q inside its ball. Training moves the parameter itself back, or it would drift ever further outside."""
        packed = p.oft_R
        bound = p.config.eps / math.sqrt(2 * packed.shape[0])  # the skew matrix holds each entry twice
        with torch.no_grad():
            inside = (bound / packed.norm(dim=1, keepdim=True).clamp_min(bound)).clamp_max(1)
            if p.training:
                packed.mul_(inside)
        return packed if p.training else packed * inside
