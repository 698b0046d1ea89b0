"""Combining adapter files, without a base model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from peft import patterns
from peft.checkpoint import files, tensors
from peft.checkpoint.header import read as read_header
from peft.checkpoint.keys import BASE_PREFIX
from peft.combine import linear, lora
from peft.combine.layouts import Layout
from peft.combine.terms import CombinationType, CombinedLayer, CombineReport, Term, check_weights
from peft.combine.weighted import combine
from peft.config import PeftConfig
from peft.errors import ConfigError, PeftWarning, UnsupportedError
from peft.methods.lora.config import LoraConfig

_SLOTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B")
_LAYER = Mapping[str, Tensor]


def combine_files(
    paths: Sequence[str | os.PathLike],
    weights: Sequence[float],
    out_dir: str | os.PathLike,
    combination_type: CombinationType = "svd",
    **options: Any,
) -> CombineReport:
    """Combine saved adapters into a new one, reading and writing files only.

    Args:
        paths: Folders of adapters (or repositories on the hub), for one base model.
        weights: One per adapter, of any sign.
        out_dir: Where the new adapter goes; it is replaced whole or not at all, and may be one of `paths`.
        combination_type: See `peft.combine.weighted`. Methods other than LoRA have only 'svd' and 'linear':
            both add the adapters' tensors, where the method is linear in them.
        **options: Keywords of `peft.combine.weighted.combine`: `svd_rank`, `density`, `reference`, `generator`, ….

    Returns:
        The error per layer.

    Raises:
        ConfigError, UnsupportedError: The adapters have no such combination; nothing was written.

    Example:
        >>> import torch
        >>> from peft.checkpoint import files, tensors
        >>> state = {"base_model.model.fc.lora_A.weight": torch.randn(2, 6)}
        >>> state["base_model.model.fc.lora_B.weight"] = torch.randn(5, 2)
        >>> config = LoraConfig(r=2, target_modules=["fc"]).to_json_string()
        >>> contents = {files.CONFIG_NAME: config, files.SAFETENSORS_NAME: tensors.encode(state)}
        >>> _ = files.save("/tmp/peft-doc-one", contents)
        >>> combine_files(["/tmp/peft-doc-one"] * 2, [0.75, -0.5], "/tmp/peft-doc-two").ranks
        {'fc': 2}
    """
    names = [os.fspath(path) for path in paths]
    if len(names) != len(weights):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: one weight per adapter is needed.")
    check_weights(weights)
    configs = [PeftConfig.from_pretrained(name) for name in names]
    _warn_of_other_bases(names, configs)
    places = [files.locate(name) for name in names]
    states = [tensors.read(place) for place in places]
    if all(isinstance(config, LoraConfig) for config in configs):
        config, state, report = _combine_lora(names, configs, states, weights, combination_type, options)  # type: ignore[arg-type]
    else:
        config, state, report = _combine_linear(names, configs, states, weights, combination_type, options)
    metadata = _common_metadata(places)
    files.save(
        out_dir,
        {
            files.CONFIG_NAME: config.to_json_string(),
            files.SAFETENSORS_NAME: tensors.encode(state, metadata, checksum=True),
        },
    )
    return report


def _combine_lora(
    names: list[str],
    configs: list[LoraConfig],
    states: list[dict[str, Tensor]],
    weights: Sequence[float],
    combination_type: CombinationType,
    options: dict[str, Any],
) -> tuple[LoraConfig, dict[str, Tensor], CombineReport]:
    named = {f"{name} (adapter {i})": config for i, (name, config) in enumerate(zip(names, configs, strict=True))}
    lora.check(named)
    lora.check_base_unchanged(named)
    adapters = [_layers(name, state, config) for name, state, config in zip(named, states, configs, strict=True)]
    modules = sorted({module for layers in adapters for module in layers})
    layouts: dict[str, Layout] = {}

    def terms() -> Iterator[tuple[str, list[Term | None]]]:
        for module in modules:
            row = [
                _term(module, layers[module], config, layouts) if module in layers else None
                for layers, config in zip(adapters, configs, strict=True)
            ]
            yield module, row

    combined, report = combine(terms(), weights, combination_type, **options)
    state: dict[str, Tensor] = {}
    for module, layer in combined.items():
        embedding = any("lora_embedding_A" in layers.get(module, ()) for layers in adapters)
        state |= {f"{BASE_PREFIX}{module}.{slot}": t for slot, t in _unpack(layer, layouts[module], embedding).items()}
    keys = {module: _key(module, configs) for module in modules}
    ranks = {keys[module]: layouts[module].rank_of(layer.factors) for module, layer in combined.items()}
    targets = [k for m, k in keys.items() if not layouts[m].experts and k.rpartition(".")[0] not in keys.values()]
    lora_bias = any(layer.bias is not None for layer in combined.values())
    if lora_bias:
        lora.check_bias(m for m in modules if f"{BASE_PREFIX}{m}.lora_embedding_A" in state or layouts[m].experts)
        for module, layer in combined.items():
            if layer.bias is None:
                state[f"{BASE_PREFIX}{module}.lora_B.bias"] = layer.factors.B.new_zeros(layer.factors.shape[1])
    return lora.result_config(configs, ranks, lora_bias, targets), state, report


def _layers(name: str, state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA file by module and slot."""
    if config.use_dora:
        raise UnsupportedError(
            f"{name} is a DoRA adapter, whose change depends on the base weight. Load it into its model and call "
            "`model.add_weighted_adapter`, which adds the change that merging would make."
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        slot = next((s for s in _SLOTS if key.endswith("." + s)), None)
        if slot is None or not key.startswith(BASE_PREFIX):
            raise UnsupportedError(f"{name} holds {key!r}, which is not a factor of LoRA and has no weighted sum here.")
        layers.setdefault(key[len(BASE_PREFIX) : -len(slot) - 1], {})[slot] = tensor
    return layers


def _key(module: str, configs: Sequence[LoraConfig]) -> str:
    """The name by which patterns know a module of a file: without wrappers, with the parameter if one is adapted."""
    key = ".".join(part for part in module.split(".") if part != "base_layer")
    parameters = {p for config in configs for p in config.target_parameters or ()}
    mine = {p.rpartition(".")[2] for p in parameters if f".{key}".endswith("." + p.rpartition(".")[0])}
    return f"{key}.{mine.pop()}" if len(mine) == 1 else key


def _term(module: str, layer: _LAYER, config: LoraConfig, layouts: dict[str, Layout]) -> Term:
    kind = "lora_embedding_{}" if "lora_embedding_A" in layer else "lora_{}.weight"
    missing = [slot for slot in (kind.format("A"), kind.format("B")) if slot not in layer]
    if missing:
        raise ConfigError(f"The file has {module}.{', '.join(layer)} but no {missing[0]}; it is not whole.")
    A, B = layer[kind.format("A")], layer[kind.format("B")]
    key = _key(module, [config])
    # only a stack of experts has more rows in A than its rank; the config has to say the rank for it to be seen
    rank = patterns.lookup(config.rank_pattern, key, config.r) if config.target_parameters else None
    layout = Layout.of(A, B, rank)
    known = layouts.setdefault(module, layout)
    if known != layout:
        raise ConfigError(f"{module!r} is laid out in different ways, as {known} and as {layout}; the bases differ.")
    factors = layout.pack(A, B)
    return Term(factors, lora.scaling(config, key, layout.rank_of(factors)), layer.get("lora_B.bias"))


def _unpack(layer: CombinedLayer, layout: Layout, embedding: bool) -> dict[str, Tensor]:
    A, B = layout.unpack(layer.factors)
    if embedding:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    bias = {} if layer.bias is None else {"lora_B.bias": layer.bias}
    return {"lora_A.weight": A, "lora_B.weight": B, **bias}


def _combine_linear(
    names: list[str],
    configs: list[PeftConfig],
    states: list[dict[str, Tensor]],
    weights: Sequence[float],
    combination_type: str,
    options: dict[str, Any],
) -> tuple[PeftConfig, dict[str, Tensor], CombineReport]:
    if combination_type not in ("svd", "linear") or any(v for k, v in options.items() if k != "reference"):
        raise UnsupportedError(
            f"combination_type={combination_type!r} with {sorted(options)} is for LoRA; other methods only add. "
            "Leave the options away, or convert the adapters to LoRA first."
        )
    linear.check(dict(zip(names, configs, strict=True)))
    state = linear.add(states, weights)
    return configs[0], state, CombineReport(combination_type, {}, {}, {})


def _warn_of_other_bases(names: list[str], configs: list[PeftConfig]) -> None:
    bases = {config.base_model_name_or_path for config in configs if config.base_model_name_or_path}
    if len(bases) > 1:
        warnings.warn(
            f"The adapters name different base models, {sorted(bases)}. Unless these are the same weights under two "
            "names, the combination means nothing.",
            PeftWarning,
            stacklevel=3,
        )


def _common_metadata(places: Sequence[os.PathLike]) -> dict[str, str]:
    """Header entries that all files share: what they say about the base stays true of the sum."""
    if any(not str(place).endswith(".safetensors") for place in places):
        return {}
    first, *others = (read_header(place).metadata for place in places)
    return {k: v for k, v in first.items() if k != "format" and all(other.get(k) == v for other in others)}
