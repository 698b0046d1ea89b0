"""BEFT: only the biases of projections learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from peft.config import TargetedConfig
from peft.errors import TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Shift, Update


@dataclass
class BeftConfig(TargetedConfig):
    """BEFT (arXiv 2509.15974): b + β with β (out,) trained. Layers without a bias get one when it is merged.

    Example:
        >>> from peft import BeftConfig
        >>> BeftConfig(target_modules=["v_proj"]).init_weights
        True
    """

    init_weights: bool = field(default=True, metadata={"help": "Start at zero; False: from a normal distribution."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }


class Beft(WeightMethod, peft_type="BEFT", config=BeftConfig):
    slots = (Slot("beft_bias", "1 out"),)
    linear = True
    samples = ({}, {"init_weights": False})

    def resolve(self, config: BeftConfig, host: Host, site: Site) -> dict[str, Any]:
        if not host.takes_bias:
            raise TargetError(f"{site.key!r} ({host.name}) has no place for a bias. Leave it out of the targets.")
        return {}

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.zeros_(p.beft_bias) if p.config.init_weights else nn.init.normal_(p.beft_bias)

    def update(self, p: Parts, host: Host) -> Update:
        return Shift(p.beft_bias)
