"""What LoRA configs say about a combination: which adapters can be added, at what scale, and the config of the sum."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import patterns
from peft.errors import ConfigError, UnsupportedError
from peft.methods import lora as method
from peft.methods.lora.config import LoraConfig
from peft.methods.lora.inits import CHANGES_BASE

_REFUSED = {
    "arrow_config": "an Arrow adapter routes among others by the token, so it is no one change of the weight",
    "use_bdlora": "it stores its factors by blocks; turn it into plain LoRA first (convert_to_lora)",
    "kasa_config": "KaSA also truncates the base weight, which no sum of adapters undoes",
    "use_qalora": "QA-LoRA pools its input, so its factors are not those of the weight",
    "modules_to_save": "whole copies of modules are not changes that could be added; combine those by hand",
    "trainable_token_indices": "trained rows replace rows of the embedding and have no weighted sum",
}
_VARIANTS: dict[str, Any] = {
    "use_dora": False,
    "velora_config": None,
    "monteclora_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def check(configs: Mapping[str, LoraConfig]) -> None:
    """Refuse adapters whose change is not a function of their factors alone, and sets that have no common meaning."""
    for name, config in configs.items():
        for option, reason in _REFUSED.items():
            if getattr(config, option, None):
                raise ConfigError(f"{name!r} can't be combined: it sets {option}, and {reason}.")
    for option in ("alora_invocation_tokens", "layer_replication", "fan_in_fan_out"):
        values = {name: getattr(config, option) for name, config in configs.items()}
        first = next(iter(values.values()))
        if any(value != first for value in values.values()):
            raise ConfigError(f"Adapters can only be added if they agree in {option}, got {values}.")


def check_bias(homeless: Iterable[str]) -> None:
    """Refuse biases where a layer has no place for one: `lora_bias` is a setting of the whole adapter."""
    for key in homeless:
        raise UnsupportedError(
            f"One of the adapters has biases (lora_bias) and {key!r} is a layer that can't have one, so no LoRA config "
            "describes their combination. Combine them without that layer."
        )


def check_base_unchanged(configs: Mapping[str, LoraConfig]) -> None:
    """Refuse files whose tensors are relative to a base weight that their initialisation has changed."""
    for name, config in configs.items():
        start = config.init_lora_weights
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise UnsupportedError(
                f"{name!r} was initialised with {start!r}, which moves a part of the base weight into the adapter, so "
                "its file is no change of the original base. Save it with `path_initial_model_for_weight_conversion`."
            )


def scaling(config: LoraConfig, key: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank (rsLoRA), with the alpha that the config gives the module."""
    return method.scaling(rank, patterns.lookup(config.alpha_pattern, key, config.lora_alpha), config.use_rslora)


def result_config(
    configs: Sequence[LoraConfig], ranks: Mapping[str, int], lora_bias: bool, modules: Iterable[str] | None = None
) -> LoraConfig:
    """The config of the combination: scaling 1 everywhere, the given rank per module, all else from the first.

    `modules` are those to target by name where the targets of the configs have no union (default: those of `ranks`).

    >>> one = LoraConfig(r=4, target_modules=["q"])
    >>> config = result_config([one, one], {"a.q": 8, "b.q": 8, "c.q": 6}, False)
    >>> config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern
    (8, 8, {'c.q': 6}, {'c.q': 6})
    """
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    pattern = {_only(key, ranks): r for key, r in ranks.items() if r != rank}
    return dataclasses.replace(
        copy.deepcopy(configs[0]),
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        lora_bias=lora_bias,
        bias="none",
        init_lora_weights=True,
        **_VARIANTS,
        **_targets(configs, ranks if modules is None else modules),
    )


def _only(key: str, names: Iterable[str]) -> str:
    """A pattern that matches `key` and no other of the names."""
    return "^" + key if any(name != key and name.endswith("." + key) for name in names) else key


def _targets(configs: Sequence[LoraConfig], names: Iterable[str]) -> dict[str, Any]:
    """Targets that match exactly the adapted modules: the union of lists, or the modules by their full names."""
    parameters = sorted({p for c in configs for p in c.target_parameters or ()}) or None
    specs = [c.target_modules for c in configs]
    narrowed = [(c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs]
    if all(n == narrowed[0] for n in narrowed):
        if all(s == specs[0] for s in specs):
            return {"target_parameters": parameters}
        if not any(isinstance(s, str) or s is None for s in specs):
            return {"target_modules": set().union(*specs), "target_parameters": parameters}  # type: ignore[arg-type]
    return {
        "target_modules": set(names),
        "target_parameters": parameters,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
