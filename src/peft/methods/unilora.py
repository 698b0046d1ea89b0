"""Uni-LoRA: all factors of all layers drawn from one vector (arXiv 2506.00799)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import UnsupportedError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class UniLoraConfig(TargetedConfig):
    """Uni-LoRA (arXiv 2506.00799): W + B A, where every entry of A (r, in) and B (out, r) is one of few numbers.

    θ has `theta_d_length` numbers. Which entry is which of them is drawn from `proj_seed`, evenly over the whole model;
    it is θ[i] / sqrt(how often i is used), so the map from θ to all entries is an isometry. The file holds θ alone.

    Example:
        >>> from peft import UniLoraConfig
        >>> UniLoraConfig(theta_d_length=1024, target_modules=["q_proj", "v_proj"]).proj_seed
        42
    """

    r: int = field(default=4, metadata={"help": "Rank."})
    proj_seed: int = field(default=42, metadata={"help": "Seed of the choice of entries."})
    theta_d_length: int = field(default=256, metadata={"help": "Trained numbers in all."})
    unilora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'unilora_only'."})
    init_theta_d_bound: float = field(default=0.02, metadata={"help": "θ starts uniform in ± this."})
    init_weights: bool = field(default=True, metadata={"help": "False: θ starts normal."})
    save_indices: bool = field(default=False, metadata={"help": "Save which entry is which number; else drawn again."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "theta_d_length")
        choice(self, "bias", ("none", "all", "unilora_only"))


class UniLora(WeightMethod, peft_type="UNILORA", config=UniLoraConfig):
    slots = (
        Slot("unilora_indices_A", "r in", kind="buffer", saved="save_indices", dtype=torch.long),
        Slot("unilora_indices_B", "out r", kind="buffer", saved="save_indices", dtype=torch.long),
        Slot("unilora_scales_A", "r in", kind="buffer", saved="save_indices"),
        Slot("unilora_scales_B", "out r", kind="buffer", saved="save_indices"),
    )
    settings = ("r",)
    dropout = "unilora_dropout"
    samples = ({"theta_d_length": 16}, {"theta_d_length": 16, "save_indices": True, "init_weights": False})

    def shared(self, config: UniLoraConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Any]:
        theta = torch.empty(config.theta_d_length, device=device, dtype=dtype)
        bound = config.init_theta_d_bound
        nn.init.uniform_(theta, -bound, bound) if config.init_weights else nn.init.normal_(theta)
        return {"unilora_theta_d": nn.Parameter(theta), "draw": draw(config, targets)}

    def saved_banks(self, config: UniLoraConfig) -> tuple[str, ...]:
        return ("unilora_theta_d",)

    def identity_at_start(self, config: UniLoraConfig) -> bool:
        return False

    def resolve(self, config: UniLoraConfig, host: Host, site: Site) -> dict[str, Any]:
        if "draw" not in site.shared:
            raise UnsupportedError(
                "Uni-LoRA draws from one vector for the whole model, so a layer can't have it alone. "
                "Use get_peft_model or inject_adapter_in_model."
            )
        return {"r": config.r}

    def derive(self, p: Parts, host: Host) -> None:
        places, counts = p.site.shared["draw"]  # type: ignore[union-attr]
        chosen = places[p.site.key]  # type: ignore[union-attr]
        for end, index in (("A", chosen[: p.unilora_indices_A.numel()]), ("B", chosen[p.unilora_indices_A.numel() :])):
            held = getattr(p, f"unilora_indices_{end}")
            held.copy_(torch.from_numpy(index).view(held.shape))
            getattr(p, f"unilora_scales_{end}").copy_(torch.from_numpy(counts[index] ** -0.5).view(held.shape))

    def reset(self, p: Parts, host: Host) -> None:
        """Layers have nothing of their own to fill."""

    def update(self, p: Parts, host: Host) -> Update:
        theta = p.unilora_theta_d
        down = theta.take(p.unilora_indices_A) * p.unilora_scales_A
        return Add(LowRank(down, theta.take(p.unilora_indices_B) * p.unilora_scales_B), dropout=p.dropout)


def draw(config: UniLoraConfig, targets: Mapping[str, Host]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """For each target the indices of its entries, A's then B's, row by row; and how often each index is used."""
    length = config.theta_d_length
    sizes = {key: config.r * (host.in_features + host.out_features) for key, host in targets.items()}
    rng = np.random.default_rng(config.proj_seed)
    repeats, rest = divmod(sum(sizes.values()), length)
    index = np.repeat(np.arange(length), repeats)
    if rest:
        index = np.concatenate([index, rng.choice(length, rest, replace=False)])
    rng.shuffle(index)
    ends = np.cumsum(list(sizes.values()))[:-1]
    return dict(zip(sizes, np.split(index, ends), strict=True)), np.bincount(index, minlength=length)
