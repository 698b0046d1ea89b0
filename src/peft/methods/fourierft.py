"""FourierFT: few coefficients of the update's Fourier transform (arXiv 2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft import patterns
from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods._places import draw, must_fit
from peft.operators import Fourier
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class FourierFTConfig(TargetedConfig):
    """FourierFT (arXiv 2405.03003): W + scaling · Re(ifft2(S)), S zero but for `n_frequency` trained coefficients.

    The frequencies are drawn by `random_loc_seed`; files hold the coefficients alone.

    Example:
        >>> from peft import FourierFTConfig
        >>> FourierFTConfig(n_frequency=500, target_modules=["query", "value"]).n_frequency
        500
    """

    n_frequency: int = field(default=1000, metadata={"help": "Trained coefficients per layer."})
    scaling: float = field(default=150.0, metadata={"help": "Factor of the update."})
    random_loc_seed: int | None = field(default=777, metadata={"help": "Seed of the frequencies."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'fourier_only'."})
    n_frequency_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: n_frequency}; first match wins."}
    )
    init_weights: bool = field(
        default=False, metadata={"help": "True: coefficients zero, so training starts at the base model."}
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        super().__post_init__()
        positive(self, "n_frequency")
        choice(self, "bias", ("none", "all", "fourier_only", "fourierft_only"))
        if self.random_loc_seed is None:
            raise ConfigError("random_loc_seed is None, but files don't hold the frequencies: give a number.")
        for key in self.n_frequency_pattern:
            patterns.check(key, where="FourierFTConfig.n_frequency_pattern")


class FourierFT(WeightMethod, peft_type="FOURIERFT", config=FourierFTConfig):
    slots = (
        Slot("fourierft_spectrum", "fourierft_n_frequency"),
        Slot("fourierft_indices", "2 fourierft_n_frequency", kind="buffer", saved=False, dtype=torch.long),
    )
    linear = True
    settings = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed")
    samples = ({"n_frequency": 7}, {"n_frequency": 5, "init_weights": True, "scaling": 3.0})

    def resolve(self, config: FourierFTConfig, host: Host, site: Site) -> dict[str, Any]:
        count = patterns.lookup(config.n_frequency_pattern, site.key, config.n_frequency)
        must_fit("n_frequency", count, site.key, host.out_features, host.in_features)
        return {
            "fourierft_n_frequency": count,
            "fourierft_scaling": config.scaling,
            "fourierft_random_loc_seed": config.random_loc_seed,
        }

    def derive(self, p: Parts, host: Host) -> None:
        places = draw(host.out_features, host.in_features, p.fourierft_n_frequency, p.fourierft_random_loc_seed)
        p.fourierft_indices.copy_(places)

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.zeros_(p.fourierft_spectrum) if p.config.init_weights else nn.init.normal_(p.fourierft_spectrum)

    def update(self, p: Parts, host: Host) -> Update:
        sizes = host.out_features, host.in_features
        return Add(Fourier(p.fourierft_indices, p.fourierft_spectrum, *sizes, p.fourierft_scaling))
