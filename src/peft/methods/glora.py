"""GLoRA: weight and bias scaled, shifted, and mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Modulated
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class GloraConfig(TargetedConfig):
    """GLoRA (arXiv 2306.07967): W + W ⊙ A + B and b + b ⊙ D + E + W C. Layers without a bias train A and B alone.

    Example:
        >>> from peft import GloraConfig
        >>> GloraConfig(r=4, config_C="none").config_A_B
        'lora'
    """

    r: int = field(default=8, metadata={"help": "Rank of supports of the form 'lora'."})
    config_A_B: Literal["lora", "vector", "constant", "none"] = field(
        default="lora",
        metadata={"help": "Form of A and B: thin factors, one value per output, one for all, or no such term."},
    )
    config_C: Literal["lora", "vector", "none"] = field(default="lora", metadata={"help": "Form of C."})
    config_D_E: Literal["vector", "constant", "none"] = field(default="constant", metadata={"help": "Form of D and E."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base layer; False: from random values."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        choice(self, "config_A_B", ("lora", "vector", "constant", "none"))
        choice(self, "config_C", ("lora", "vector", "none"))
        choice(self, "config_D_E", ("vector", "constant", "none"))


def _shapes(field: str, rows: str, columns: int | str, whole: bool) -> Any:
    """Shapes of one support, as a function of the sizes: thin factors, a vector (a column if `whole`), or a number."""

    def shapes(sizes: Any) -> dict[str, tuple[int, ...]]:
        form, height = sizes[field], sizes[rows]
        width = columns if isinstance(columns, int) else sizes[columns]
        if form == "lora":
            return {"Xd": (height, sizes.r), "Xu": (sizes.r, width)}
        if form == "vector":
            return {"X": (height, 1) if whole else (height,)}
        return {"X": (1,)} if form == "constant" else {}

    return shapes


class Glora(WeightMethod, peft_type="GLORA", config=GloraConfig):
    slots = (
        Slot("glora_A", _shapes("A_B", "out", "in", True), kind="group"),
        Slot("glora_B", _shapes("A_B", "out", "in", True), kind="group"),
        Slot("glora_C", _shapes("C", "in", 1, True), kind="group"),
        Slot("glora_D", _shapes("D_E", "out", 1, False), kind="group"),
        Slot("glora_E", _shapes("D_E", "out", 1, False), kind="group"),
    )
    settings = ("r",)
    samples = (
        {"r": 2},
        {"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        {"config_A_B": "constant", "config_C": "none", "init_weights": False},
    )

    def resolve(self, config: GloraConfig, host: Host, site: Site) -> dict[str, Any]:
        biased = host.bias() is not None
        if config.config_A_B == "none" and not (biased and {config.config_C, config.config_D_E} != {"none"}):
            raise TargetError(
                f"GLORA: nothing would train on {site.key!r}: config_A_B is 'none', and "
                f"{'so are config_C and config_D_E' if biased else 'the layer has no bias for C, D and E'}. Set "
                "config_A_B, or leave the layer out of the targets."
            )
        return {
            "r": config.r,
            "A_B": config.config_A_B,
            "C": config.config_C if biased else "none",
            "D_E": config.config_D_E if biased else "none",
        }

    def reset(self, p: Parts, host: Host) -> None:
        for slot in self.slots:
            for name, tensor in getattr(p, slot.name).items():
                if name == "Xu" or (name == "Xd" and not p.config.init_weights):
                    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
                else:
                    nn.init.zeros_(tensor) if p.config.init_weights else nn.init.normal_(tensor, std=0.02)

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: GloraConfig) -> dict[str, Tensor]:
        """HF PEFT writes zeros for supports that are not there."""
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(".zeros")}

    def update(self, p: Parts, host: Host) -> Update:
        frozen = p.call(host)
        weight, bias = frozen.weight, frozen.bias
        a, b = (_factors(getattr(p, name), weight) for name in ("glora_A", "glora_B"))
        op = Modulated(*a, weight, *b)
        return Add(op) if bias is None else Add(op, _shift(weight, bias, p.glora_C, p.glora_D, p.glora_E))


def _factors(held: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Thin factors (out, r) and (r, in) of the support that parameters mean; of rank 0 if there are none."""
    if "Xd" in held:
        return held["Xd"], held["Xu"]
    out, inner = weight.shape
    if "X" not in held:
        return weight.new_empty(out, 0), weight.new_empty(0, inner)
    return held["X"].expand(out, 1) if held["X"].dim() == 1 else held["X"], held["X"].new_ones(1, inner)


def _shift(weight: Tensor, bias: Tensor, c: Any, d: Any, e: Any) -> Tensor:
    """b ⊙ D + E + W C (out,)."""
    shift = bias * d["X"] + e["X"] if len(d) else torch.zeros_like(bias)
    if not len(c):
        return shift
    support = c["X"] if "X" in c else c["Xd"] @ c["Xu"]
    return shift + (weight @ support.to(weight.dtype)).flatten()
