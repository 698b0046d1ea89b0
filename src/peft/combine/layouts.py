"""LoRA's tensors as factors, and back.

| layer | lora_A | lora_B | blocks |
|---|---|---|---|
| linear, and `lora_embedding_*` | (r, in) | (out, r) | 1 |
| convolution | (r, in, *kernel) | (out, r / groups, 1, …) | groups |
| stack of E experts | (E · r, in), expert outermost | (out, r · E), expert innermost | E |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft.combine.factored import Factors
from peft.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How the tensors of one layer are laid out. `tail` is (in, *kernel) of a convolution's A, empty elsewhere."""

    tail: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0

    @staticmethod
    def of(A: Tensor, B: Tensor, rank: int | None = None) -> Layout:
        """The layout that the shapes of A and B say; `rank` is that of one expert, needed to see a stack of them."""
        if A.dim() > 2:
            if A.shape[0] % B.shape[1]:
                raise ConfigError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are of no one convolution.")
            return Layout(tuple(A.shape[1:]), A.shape[0] // B.shape[1])
        if rank is not None and A.shape[0] != rank:
            if A.shape[0] % rank:
                raise ConfigError(f"lora_A {tuple(A.shape)} has rows for no whole number of experts of rank {rank}.")
            return Layout(experts=A.shape[0] // rank)
        return Layout()

    @property
    def blocks(self) -> int:
        return self.experts or self.groups

    def pack(self, A: Tensor, B: Tensor) -> Factors:
        """lora_A, lora_B -> factors (blocks, r, in), (blocks, out, r)."""
        if self.blocks == 1 and A.dim() == 2 and not self.experts:
            return Factors(A, B)
        if self.experts:
            return Factors(A.unflatten(0, (self.experts, -1)), B.unflatten(1, (-1, self.experts)).permute(2, 0, 1))
        return Factors(A.flatten(1).unflatten(0, (self.groups, -1)), B.flatten(1).unflatten(0, (self.groups, -1)))

    def unpack(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Factors -> contiguous lora_A, lora_B."""
        A = factors.A.flatten(0, 1)
        if self.experts:
            return A.contiguous(), factors.B.permute(1, 2, 0).flatten(1).contiguous()
        B = factors.B.flatten(0, 1)
        if self.tail:
            A, B = A.unflatten(1, self.tail), B[(...,) + (None,) * (len(self.tail) - 1)]
        return A.contiguous(), B.contiguous()

    def rank_of(self, factors: Factors) -> int:
        """What a config calls `r` for these factors: per expert, but over all groups of a convolution."""
        return factors.rank * self.groups
