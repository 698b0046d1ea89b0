"""LoRA: Low-Rank Adaptation (arXiv 2106.09685), with rsLoRA (2312.03732) and DoRA (2402.09353)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft import patterns
from peft.errors import TargetError, UnsupportedError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods.lora.config import LoraConfig, variants
from peft.methods.lora.inits import CHANGES_BASE, fill
from peft.methods.lora.ranks import resized
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Magnitude, Update, row_norms


def _magnitude_shape(sizes: Any) -> tuple[int, ...]:
    ones = (1,) * sizes.get("spatial", 0)
    return (1, sizes["out"], *ones) if ones else (sizes["out"],)


class Lora(WeightMethod, peft_type="LORA", config=LoraConfig):
    """W + s B A. On a stack of experts, A holds their r rows one expert after another, and B their r columns
    interleaved."""

    slots = (
        Slot("lora_A", "r*experts wide", kind="down"),
        Slot("lora_B", "out/experts r*experts/groups", kind="up", bias="lora_bias"),
        Slot("lora_magnitude_vector", _magnitude_shape, kind="vector", when="use_dora"),
    )
    settings = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")
    dropout = "lora_dropout"
    samples = (
        {"r": 2},
        {"r": 2, "use_rslora": True, "lora_alpha": 3},
        {"r": 2, "use_dora": True},
        {"r": 2, "lora_bias": True},
        {"r": 2, "init_lora_weights": False},
        {"r": 2, "init_lora_weights": "gaussian"},
    )

    def resolve(self, config: LoraConfig, host: Host, site: Site) -> dict[str, Any]:
        _refuse(config)
        if config.lora_bias and not host.takes_bias:
            raise TargetError(
                f"lora_bias: {site.key!r} ({host.name}) has no place for a bias. Leave it out of the targets."
            )
        if config.lora_dropout and "experts" in host.layout:
            raise TargetError(
                f"lora_dropout acts on the input of a layer, but {site.key!r} is a parameter that its module reads by "
                "itself. Set lora_dropout=0 for target_parameters."
            )
        r = patterns.lookup(config.rank_pattern, site.key, config.r)
        alpha = patterns.lookup(config.alpha_pattern, site.key, config.lora_alpha)
        return {
            "r": r,
            "lora_alpha": alpha,
            "scaling": scaling(r, alpha, config.use_rslora),
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "wide": host.layout.get("channels", 0) * host.layout.get("taps", 0) or host.in_features,
            "experts": host.layout.get("experts", 1),
        }

    def reset(self, p: Parts, host: Host) -> None:
        fill(p, host, p.config.init_lora_weights)
        if p.use_dora:
            p.lora_magnitude_vector.copy_(
                row_norms(self.operator(p, host), p.call(host)).view_as(p.lora_magnitude_vector)
            )

    def operator(self, p: Parts, host: Host) -> LowRank:
        """s B A (out, in)."""
        experts, up = host.layout.get("experts", 1), p.lora_B
        if experts > 1:
            up = up.unflatten(1, (-1, experts)).permute(2, 0, 1).flatten(0, 1)
        return LowRank(p.lora_A, up, p.scaling, max(experts, host.groups))

    def update(self, p: Parts, host: Host) -> Update:
        shift: Tensor | None = p.leaf("lora_B").bias * p.scaling if p.lora_bias else None
        add = Add(self.operator(p, host), shift, p.dropout)
        return Magnitude(add, p.lora_magnitude_vector.flatten()) if p.use_dora else add

    def mirrored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding, linear = ("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight")
        for ours, theirs in ((embedding, linear), (linear, embedding)):
            if set(tensors) == set(ours):
                return {theirs[0]: tensors[ours[1]].mT, theirs[1]: tensors[ours[0]].mT}
        return {}

    def identity_at_start(self, config: LoraConfig) -> bool:
        return config.init_lora_weights is not False

    def initial_scaling(self, p: Parts) -> float:
        return scaling(p.r, p.lora_alpha, p.use_rslora)

    def to_file(self, p: Parts, name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
        """Factors that were padded for hot-swapping are saved with the ranks they have."""
        if not isinstance(p.scaling, Tensor):
            return {name: tensor}
        up = name in ("lora_B.weight", "lora_embedding_B")
        factor = up or name in ("lora_A.weight", "lora_embedding_A")
        return {name: resized(tensor, up, p.r, p.layer.host) if factor else tensor}


def scaling(r: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / (r**0.5 if rslora else r)


def _refuse(config: LoraConfig) -> None:
    """Raise for what the config can say and this version can't do."""
    init = str(config.init_lora_weights)
    asked = [name for name in variants(config) if name != "use_dora"]
    asked += [f"init_lora_weights={init!r}"] if init.partition("_niter_")[0] in CHANGES_BASE else []
    asked += [name for name in ("layer_replication", "megatron_config") if getattr(config, name)]
    if asked:
        raise UnsupportedError(
            f"LoRA's {asked[0]} is read and written in configs, but not available in this version of the library. "
            "Remove it from the config to use plain LoRA."
        )


__all__ = ["Lora", "LoraConfig", "scaling", "torch"]
