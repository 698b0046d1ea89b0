"""DEFT: what a weight writes into a learnt subspace is taken out and replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.operators.base import SMALL, scaled, widened
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Base, Run, Update


@dataclass
class DeftConfig(TargetedConfig):
    """DEFT: W - Q P̂ᵀ W + s Q R. P (out, r) and R (r, in) learn; Q = P and P̂ = relu(P), or both the Q of P = Q T.

    s = alpha / r, or 1 without `alpha`. R starts so that the layer starts as it is.

    Example:
        >>> from peft import DeftConfig
        >>> DeftConfig(r=4, decomposition_method="qr").para
        False
    """

    r: int = field(default=8, metadata={"help": "Dimension of the subspace; at most the layer's output."})
    decomposition_method: Literal["relu", "qr"] = field(default="relu", metadata={"help": "How P̂ and Q follow from P."})
    init_scale: float = field(default=1.0, metadata={"help": "Factor on R where it starts at random."})
    alpha: int | None = field(default=None, metadata={"help": "Scale R's part by alpha / r; None: by 1."})
    para: bool = field(default=False, metadata={"help": "Only take out, without R."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    deft_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the change, while training."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base layer; False: from random values."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "decomposition_method", ("relu", "qr"))
        if not 0 <= self.deft_dropout <= 1:
            raise ConfigError(f"deft_dropout is {self.deft_dropout!r}; it is a probability, from 0 to 1.")


@dataclass(frozen=True, eq=False)
class Exchange(Update):
    """W - Q P̂ᵀ W + s Q R on a linear layer: P̂ reads the layer's output, which costs few tokens less than P̂ᵀ W would.

    `learnt` is P (out, r), `puts` R (r, in), or None for zero, and `scale` s.
    """

    learnt: Tensor
    decomposition: str
    puts: Tensor | None
    scale: float
    relative = True

    def pair(self) -> tuple[Tensor, Tensor]:
        """Q and P̂, each (out, r)."""
        if self.decomposition == "relu":
            return self.learnt, self.learnt.relu()
        q = torch.linalg.qr(widened(self.learnt))[0].to(self.learnt.dtype)
        return q, q

    def added(self, weight: Tensor, dropout: nn.Module | None = None) -> Add:
        """The same as what is added to a weight W (out, in)."""
        writes, reads = self.pair()
        down = -(reads.mT @ weight.to(reads.dtype))
        return Add(LowRank(down if self.puts is None else down + self._put(), writes), None, dropout)

    def _put(self) -> Any:
        return scaled(self.puts, self.scale)  # type: ignore[arg-type]

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        y, frozen, bias = prev(x), base.run(x), base.bias
        out, inner = y.shape[-1], x.shape[-1]
        if y.numel() > out * inner:
            return self.added(base.weight).forward(x, prev, bias, base)
        writes, reads = self.pair()
        dtype = writes.dtype if x.numel() + y.numel() <= SMALL else y.dtype
        read = (frozen if bias is None else frozen - bias).reshape(-1, out).to(dtype)
        reads, writes = reads.to(dtype), writes.mT.to(dtype)
        if self.puts is None:
            hidden = -(read @ reads)
        else:
            put = F.linear(x.reshape(-1, inner).to(dtype), self._put().to(dtype))
            hidden = torch.addmm(put, read, reads, alpha=-1)
        if dtype == y.dtype:
            return torch.addmm(y.reshape(-1, out), hidden, writes).view(y.shape)
        return y + (hidden @ writes).to(y.dtype).view(y.shape)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        return self.added(base.weight).weight(weight, base)

    def transposed(self, base: Base) -> Update:
        return self.added(base.weight).transposed(base)


class Deft(WeightMethod, peft_type="DEFT", config=DeftConfig):
    slots = (Slot("deft_P", "out r"), Slot("deft_R", "r in", when="replaces"))
    settings = ("r", "deft_decomposition", "deft_scaling")
    dropout = "deft_dropout"
    samples = (
        {"r": 2},
        {"r": 3, "decomposition_method": "qr", "alpha": 6},
        {"r": 2, "para": True},
        {"r": 2, "init_weights": False},
    )

    def resolve(self, config: DeftConfig, host: Host, site: Site) -> dict[str, Any]:
        r = min(config.r, host.out_features)
        return {
            "r": r,
            "deft_decomposition": config.decomposition_method,
            "deft_scaling": 1.0 if config.alpha is None else config.alpha / r,
            "replaces": not config.para,
        }

    def identity_at_start(self, config: DeftConfig) -> bool:
        return config.init_weights and not config.para

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.normal_(p.deft_P, std=0.02)
        if p.has("deft_R"):
            if p.config.init_weights:
                reads = _exchange(p).pair()[1]
                p.deft_R.copy_(reads.mT @ host.weight().to(reads.dtype) / p.deft_scaling)
            else:
                nn.init.normal_(p.deft_R, std=0.02 * p.config.init_scale)

    def update(self, p: Parts, host: Host) -> Update:
        change, dropout = _exchange(p), p.dropout
        return change if p.running and host.on_input and dropout is None else change.added(host.weight(), dropout)


def _exchange(p: Parts) -> Exchange:
    return Exchange(p.deft_P, p.deft_decomposition, p.deft_R if p.has("deft_R") else None, p.deft_scaling)
