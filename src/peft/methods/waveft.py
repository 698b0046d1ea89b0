"""WaveFT: few coefficients of the update's wavelet transform (arXiv 2505.12532)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft import patterns
from peft.config import TargetedConfig, choice, positive
from peft.errors import PeftWarning
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods import _wavelets
from peft.methods._places import draw, must_fit
from peft.operators import Scaled, Sparse, Wavelet
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class WaveFTConfig(TargetedConfig):
    """WaveFT (arXiv 2505.12532): W + scaling · idwt2(S), S zero but for `n_frequency` trained coefficients.

    Their places are drawn by `random_loc_seed`; files hold the coefficients alone. Wavelets are db1 … db38,
    sym2 … sym20 and coif1 … coif17.

    Example:
        >>> from peft import WaveFTConfig
        >>> WaveFTConfig(n_frequency=500, wavelet_family="db2", target_modules=["q_proj"]).wavelet_family
        'db2'
    """

    n_frequency: int = field(default=2592, metadata={"help": "Trained coefficients per layer."})
    scaling: float = field(default=25.0, metadata={"help": "Factor of the update."})
    wavelet_family: str = field(default="db1", metadata={"help": "The wavelet, e.g. 'db2'."})
    use_idwt: bool = field(default=True, metadata={"help": "False: the coefficients are entries of ΔW itself."})
    random_loc_seed: int = field(default=777, metadata={"help": "Seed of the coefficients' places."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'waveft_only'."})
    n_frequency_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: n_frequency}; first match wins."}
    )
    proportional_parameters: bool = field(
        default=False, metadata={"help": "Share n_frequency · layers out by size of the layers."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Coefficients zero, so training starts at the base model."}
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        super().__post_init__()
        positive(self, "n_frequency")
        choice(self, "bias", ("none", "all", "waveft_only"))
        choice(self, "wavelet_family", _wavelets.NAMES)
        for key in self.n_frequency_pattern:
            patterns.check(key, where="WaveFTConfig.n_frequency_pattern")
        if self.proportional_parameters and self.n_frequency_pattern:
            message = "proportional_parameters shares coefficients out by size; n_frequency_pattern has no effect."
            warnings.warn(message, PeftWarning, stacklevel=3)


class WaveFT(WeightMethod, peft_type="WAVEFT", config=WaveFTConfig):
    slots = (
        Slot("waveft_spectrum", "waveft_n_frequency"),
        Slot("waveft_indices", "2 waveft_n_frequency", kind="buffer", saved=False, dtype=torch.long),
        Slot("waveft_filters", "2 taps_of_wavelet", kind="buffer", saved=False, when="waveft_use_idwt"),
    )
    linear = True
    settings = (
        "waveft_n_frequency",
        "waveft_scaling",
        "waveft_random_loc_seed",
        "waveft_wavelet_family",
        "waveft_use_idwt",
    )
    samples = ({"n_frequency": 7}, {"n_frequency": 9, "wavelet_family": "sym3"}, {"n_frequency": 5, "use_idwt": False})

    def shared(self, config: WaveFTConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Any]:
        return {"elements": sum(host.out_features * host.in_features for host in targets.values())}

    def resolve(self, config: WaveFTConfig, host: Host, site: Site) -> dict[str, Any]:
        count = patterns.lookup(config.n_frequency_pattern, site.key, config.n_frequency)
        if config.proportional_parameters:
            mine = host.out_features * host.in_features
            share = mine * site.count / site.shared.get("elements", mine * site.count)
            count = max(1, round(config.n_frequency * share))
        must_fit("n_frequency", count, site.key, host.out_features, host.in_features)
        return {
            "waveft_n_frequency": count,
            "waveft_scaling": config.scaling,
            "waveft_random_loc_seed": config.random_loc_seed,
            "waveft_wavelet_family": config.wavelet_family,
            "waveft_use_idwt": config.use_idwt,
            "taps_of_wavelet": _wavelets.filters(config.wavelet_family).shape[1],
        }

    def derive(self, p: Parts, host: Host) -> None:
        places = draw(host.out_features, host.in_features, p.waveft_n_frequency, p.waveft_random_loc_seed)
        p.waveft_indices.copy_(places)
        if p.waveft_use_idwt:
            p.waveft_filters.copy_(_wavelets.filters(p.waveft_wavelet_family))

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.zeros_(p.waveft_spectrum) if p.config.init_weights else nn.init.normal_(p.waveft_spectrum, std=0.01)

    def update(self, p: Parts, host: Host) -> Update:
        index, values, sizes = p.waveft_indices, p.waveft_spectrum, (host.out_features, host.in_features)
        if not p.waveft_use_idwt:
            return Add(Scaled(Sparse(index, values, *sizes), p.waveft_scaling))
        return Add(Wavelet(index, values, p.waveft_filters, *sizes, p.waveft_scaling))
