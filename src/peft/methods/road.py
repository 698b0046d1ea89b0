"""RoAd: two-dimensional rotations of the output (arXiv 2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from peft.config import TargetedConfig
from peft.errors import ConfigError, nearest
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._sizes import must_divide
from peft.operators import Givens
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import After, Update


class RoadVariant(str, Enum):
    """How many parameters a layer with m outputs has: m, 2 m or 4 m."""

    ROAD_1 = "road_1"
    ROAD_2 = "road_2"
    ROAD_4 = "road_4"


@dataclass
class RoadConfig(TargetedConfig):
    """RoAd (arXiv 2409.00119): pairs of outputs are rotated by trained angles θ and stretched by trained lengths α.

    A pair (y₁, y₂) becomes (α₁ cos θ₁ y₁ - α₁ sin θ₁ y₂, α₂ sin θ₂ y₁ + α₂ cos θ₂ y₂); inside each group of
    `group_size` outputs, i is paired with i + group_size / 2. `road_1` has one angle and one length per pair, `road_2`
    one per output, `road_4` separate ones for cosine and sine.

    Example:
        >>> from peft import RoadConfig
        >>> RoadConfig(variant="road_2", target_modules=["q_proj"]).variant
        'road_2'
    """

    variant: str | RoadVariant = field(default="road_1", metadata={"help": "'road_1', 'road_2' or 'road_4'."})
    group_size: int = field(default=64, metadata={"help": "Even; divides the outputs of every target."})
    init_weights: bool = field(default=True, metadata={"help": "Angles 0, lengths 1: starts at the base model."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [variant.value for variant in RoadVariant]
        if self.variant not in names:
            hint = nearest(str(self.variant), names)
            raise ConfigError(f"RoadConfig.variant is {self.variant!r}; it must be one of {names}.{hint}")
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"RoadConfig.group_size is {self.group_size}; groups of pairs are even and above 0.")


_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


class Road(WeightMethod, peft_type="ROAD", config=RoadConfig):
    slots = (Slot("road_theta", "angles"), Slot("road_alpha", "angles"))
    settings = ("variant", "group_size")
    samples = ({"group_size": 4}, {"group_size": 2, "variant": "road_2"}, {"group_size": 4, "variant": "road_4"})

    def resolve(self, config: RoadConfig, host: Host, site: Site) -> dict[str, Any]:
        must_divide("group_size", config.group_size, site.key, host.out_features)
        variant = RoadVariant(config.variant).value
        angles = host.out_features // 2 * _PER_PAIR[variant]
        return {"variant": variant, "group_size": config.group_size, "angles": angles}

    def reset(self, p: Parts, host: Host) -> None:
        if p.config.init_weights:
            nn.init.zeros_(p.road_theta)
            nn.init.ones_(p.road_alpha)
        else:
            nn.init.normal_(p.road_theta, std=0.5)
            nn.init.normal_(p.road_alpha, mean=1.0, std=0.5)

    def update(self, p: Parts, host: Host) -> Update:
        theta, alpha, half = p.road_theta, p.road_alpha, p.group_size // 2
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
        if p.variant == "road_1":
            cos, sin = _both_halves(cos, half), _both_halves(sin, half)
        elif p.variant == "road_4":
            cos, sin = cos.view(-1, 2, p.group_size)[:, 0].flatten(), sin.view(-1, 2, p.group_size)[:, 1].flatten()
        return After(Givens(cos, sin, p.group_size))


def _both_halves(values: Tensor, half: int) -> Tensor:
    """One value per pair -> one per output: both halves of each group get the same."""
    return values.view(-1, 1, half).expand(-1, 2, -1).flatten()
