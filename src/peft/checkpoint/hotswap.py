"""Another LoRA adapter in the place of one that is loaded: into the same memory, so compiled code need not change.

    prepare_model_for_compiled_hotswap(model, target_rank=64)   # room for every adapter that is to come
    model = torch.compile(model)
    ...
    hotswap_adapter(model, "path/to/other", adapter_name="default")

Factors of smaller rank are padded with zeros, and the scaling is a tensor: nothing that the compiler looked at changes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft import patterns, whole
from peft.checkpoint import keys, state
from peft.config import PeftConfig
from peft.errors import ConfigError, LoadError, PeftWarning, StateError, nearest
from peft.layer import AdaptedLayer
from peft.method import Site, method_of
from peft.methods.lora.ranks import rank_of, resized

_FACTORS = {"lora_A": False, "lora_B": True}
_SAME = ("use_rslora", "lora_dropout", "use_dora", "lora_bias")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise unless an adapter of the second config can take the place of one of the first.

    Ranks, alphas and targets may differ; what is computed with them may not.

    Raises:
        ConfigError: with what differs.
    """
    for config in (config0, config1):
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ConfigError(
                f"Incompatible PEFT types found: {_type(config0)} and {_type(config1)}. Only LoRA can be hot-swapped."
            )
    for name in _SAME:
        mine, other = getattr(config0, name, None), getattr(config1, name, None)
        if mine != other:
            raise ConfigError(f"Configs are incompatible: for {name}, {mine} != {other}")


def _type(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Load an adapter from files into the place of one that the model has.

    Args:
        model: A model with a LoRA adapter of that name, compiled or not.
        model_name_or_path: A folder, or a repository on the hub.
        adapter_name: The adapter whose place it takes; the name stays.
        torch_device: Where to read the files to (default: the CPU).
        **kwargs: `subfolder`, `revision`, `token`, …

    Raises:
        ConfigError: what the adapters compute differs (`check_hotswap_configs_compatible`).
        LoadError: the files hold tensors for which there is no place.
        StateError: the model is compiled, and a rank is larger than the memory prepared for it.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    tensors = state.load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    check_hotswap_configs_compatible(state.config_of(_inner(model), adapter_name), config)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """`hotswap_adapter`, from tensors in memory.

    Layers that the new adapter leaves alone get zeros. Nothing is written unless all of it fits.

    Args:
        model: A model with a LoRA adapter of that name.
        state_dict: Tensors by their names in files, or by those in the model's state dict.
        adapter_name: The adapter whose place they take.
        config: The new adapter's config; its ranks, alphas and patterns give each layer's scaling.
        parameter_prefix: What names of the method's tensors begin with.

    Raises:
        LoadError, StateError: as `hotswap_adapter`.
    """
    compiled, model = _is_compiled(model), _inner(model)
    found = [e for e in keys.entries(model, adapter_name) if f".{parameter_prefix}" in f".{e.disk}"]
    given = _by_entry(state_dict, found)
    todo = []
    for entry in found:
        tensor = given.get(entry.memory)
        assert entry.layer is not None
        slot, owner, key = _owner(entry.layer, entry.memory, adapter_name)
        old = owner._parameters[key]
        assert old is not None
        todo.append((slot, owner, key, _fitting(entry, slot, old, tensor, compiled)))
    with torch.no_grad():
        for slot, owner, key, value in todo:
            old = owner._parameters[key]
            assert old is not None
            if value is None:
                old.zero_() if slot in _FACTORS else None
            elif value.shape == old.shape:
                old.copy_(value)
            else:
                _replace(owner, key, value.to(old), slot)
    for key, layer in _named_layers(model, adapter_name):
        settings = method_of(config).resolve(config, layer.host, Site(key))
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = settings["r"], settings["lora_alpha"]  # type: ignore[index]
        _set_scaling(layer, adapter_name, settings["scaling"])
        layer._adapters[adapter_name] = config
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and adapter_name in configs:
        configs[adapter_name] = config


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters that `hotswap_adapter` is to load, before the model is compiled.

    Args:
        model: A model with its first LoRA adapter.
        target_rank: Pad all factors to this rank: the largest that is to come.
        config: The configs of adapters to come (one, or a dict of them): each layer gets the largest rank that they,
            with their `rank_pattern`, give it. Without either, only scalings become tensors.
        check_compiled: What to do if the model is compiled already: `"error"`, `"warn"` or `"ignore"`.

    Raises:
        StateError: the model is compiled already, or has no adapters.
        ConfigError: a rank is smaller than that of an adapter that is there.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled is 'error', 'warn' or 'ignore', not {check_compiled!r}.")
    if _is_compiled(model) and check_compiled != "ignore":
        text = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise HotswapStateError(text)
        warnings.warn(text, PeftWarning, stacklevel=2)
    model = _inner(model)
    configs = list(config.values()) if isinstance(config, Mapping) else [] if config is None else [config]
    places = list(_lora_layers(model))
    if not places:
        raise HotswapStateError(
            "No adapter layers found on the model: call prepare_model_for_compiled_hotswap after the first adapter was "
            "loaded, and before the second is."
        )
    wanted = [
        target_rank or max((patterns.lookup(c.rank_pattern, key, c.r) for c in configs), default=0)
        for key, _, _ in places
    ]
    for rank, (key, layer, name) in zip(wanted, places, strict=True):
        have = rank_of(layer.parts(name).lora_A, False, layer.host)
        if rank and rank < have:
            raise ConfigError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({have}, "
                f"adapter {name!r} on {key!r}). Give the largest rank of all adapters."
            )
    for rank, (_, layer, name) in zip(wanted, places, strict=True):
        for slot, value in layer.slots(name) if rank else ():
            if slot.name in _FACTORS:
                owner, key = (value, "weight") if isinstance(value, nn.Module) else _held(layer, slot.name, name)
                old = owner._parameters[key]
                assert old is not None
                _replace(owner, key, resized(old.detach(), _FACTORS[slot.name], rank, layer.host), slot.name)
        _set_scaling(layer, name, torch.tensor(float(layer.scaling[name]), device=layer.host.device))  # type: ignore[index]


class HotswapStateError(StateError, ValueError):
    """The model is not in the state in which it can be prepared for hot-swapping."""


def _by_entry(state_dict: Mapping[str, Tensor], found: list[keys.Entry]) -> dict[str, Tensor]:
    """Tensors by names in memory, whichever way the state dict names them."""
    names = {}
    for entry in found:
        for name in (entry.disk, entry.memory):
            names[name] = names[name.removeprefix(keys.BASE_PREFIX)] = entry.memory
    given, unexpected = {}, []
    for name, tensor in state_dict.items():
        memory = names.get(keys.strip(name)) or names.get(keys.strip(name).removeprefix(keys.BASE_PREFIX))
        if memory is None:
            unexpected.append(name)
        else:
            given[memory] = tensor
    if unexpected:
        raise LoadError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(sorted(unexpected))}."
            f"{nearest(unexpected[0], names)} The adapter that is loaded first must have all the targets of those that "
            "take its place. Nothing was changed."
        )
    return given


def _fitting(entry: keys.Entry, slot: str, old: Tensor, tensor: Tensor | None, compiled: bool) -> Tensor | None:
    """A new tensor in the shape of the old one, or, where that may change, in its own."""
    layer = entry.layer
    assert layer is not None
    if tensor is None or tensor.shape == old.shape:
        return tensor
    if slot in _FACTORS and tensor.dim() == old.dim():
        host, up = layer.host, _FACTORS[slot]
        have, rank = rank_of(old, up, host), rank_of(tensor, up, host)
        if resized(tensor, up, have, host).shape == old.shape:
            if rank <= have:
                return resized(tensor, up, have, host)
            if not compiled:
                return tensor
            raise StateError(
                f"{entry.disk!r} has rank {rank}, but the compiled model has room for {have}. Call "
                f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) before compiling. Nothing was changed."
            )
    raise LoadError(
        f"{entry.disk!r} has shape {tuple(tensor.shape)}, the model {tuple(old.shape)}: the adapter belongs to another "
        "model. Nothing was changed."
    )


def _owner(layer: AdaptedLayer, memory: str, adapter: str) -> tuple[str, nn.Module, str]:
    """The slot of a tensor, and the module and name that hold it."""
    for slot, value in layer.slots(adapter):
        stored = layer._stored.get(slot.name, slot.name)
        if isinstance(value, nn.Module):
            for key in value._parameters:
                if memory.endswith(f"{stored}.{adapter}.{key}"):
                    return (slot.name if key == "weight" else f"{slot.name}.{key}"), value, key
        elif memory.endswith(f"{stored}.{adapter}"):
            return slot.name, *_held(layer, slot.name, adapter)
    raise AssertionError(memory)


def _held(layer: AdaptedLayer, slot: str, adapter: str) -> tuple[nn.Module, str]:
    held = layer._modules[layer._stored.get(slot, slot)]
    assert held is not None
    return held, adapter


def _replace(owner: nn.Module, key: str, value: Tensor, slot: str) -> None:
    """Put a parameter of another shape into a leaf, and let the leaf say its new size."""
    old = owner._parameters[key]
    assert old is not None
    owner._parameters[key] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    up = _FACTORS.get(slot, False)
    for name in ("in_features", "in_channels") if up else ("out_features", "out_channels"):
        if name in owner.__dict__:
            owner.__dict__[name] = value.shape[1 if up else 0]


def _set_scaling(layer: AdaptedLayer, adapter: str, value: Any) -> None:
    scaling: dict[str, Any] = layer.scaling  # type: ignore[assignment]
    if isinstance(scaling[adapter], Tensor) and not isinstance(value, Tensor):
        scaling[adapter].fill_(value)
    else:
        scaling[adapter] = value


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer, str]]:
    for path, layer in whole.walk(model):
        if isinstance(layer, AdaptedLayer):
            for name, config in layer._adapters.items():
                if _type(config) == "LORA":
                    yield keys.strip(path).removeprefix(keys.BASE_PREFIX), layer, name


def _named_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, AdaptedLayer]]:
    return ((key, layer) for key, layer, name in _lora_layers(model) if name == adapter)


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()
    )
