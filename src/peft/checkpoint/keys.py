"""Names of tensors in memory and in files: a bijection read off the modules, never guessed from strings.

In memory a tensor is `<layer>.lora_A.<adapter>.weight`; in a file the adapter's name is gone: `<layer>.lora_A.weight`.
Since each layer says which tensors are an adapter's, adapters named like a path component ("0", "lora_A") are safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft import whole
from peft.auxiliary import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from peft.layer import AdaptedLayer
from peft.method import WeightMethod, method_of
from peft.parts import Parts
from peft.slots import Vector, container

BASE_PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass
class Entry:
    """One tensor of an adapter: its name in the model's state dict, and in files."""

    memory: str
    disk: str
    layer: AdaptedLayer | None = None


def entries(model: nn.Module, adapter: str, prefix: str = "") -> list[Entry]:
    """All tensors that a file of the adapter holds, in model order.

    Args:
        model: The model whose state dict the names are of.
        adapter: The adapter.
        prefix: Path of `model` in names.
    """
    found: list[Entry] = []
    done: set[int] = set()
    for path, module in whole.walk(model, prefix):
        dot = f"{path}." if path else ""
        if isinstance(module, AdaptedLayer) and id(module) not in done:
            found += _of_layer(module, adapter, dot)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter in module.names():
            rows = {id(p) for p in module.trained(adapter)} if isinstance(module, TrainableTokensWrapper) else set()
            for disk, memory in module.adapter_state_dict_load_map(adapter).items():
                if not rows & done:  # a tied output layer trains the same rows
                    found.append(Entry(dot + memory, dot + disk))
            done |= rows
            done |= {
                id(m)
                for m in module.modules()
                if m is not module and isinstance(m, AdaptedLayer) and m.methods == ("TRAINABLE_TOKENS",)
            }
    return [Entry(strip(e.memory), strip(e.disk), e.layer) for e in found]


def _of_layer(layer: AdaptedLayer, adapter: str, dot: str) -> list[Entry]:
    if adapter not in layer._adapters:
        return []
    found = []
    for slot, value in layer.slots(adapter):
        if not slot.is_saved(layer._adapters[adapter]):
            continue
        stored = layer._stored.get(slot.name, slot.name)
        if isinstance(value, Vector):
            found.append(Entry(f"{dot}{stored}.{adapter}.weight", f"{dot}{stored}", layer))
        elif isinstance(value, nn.Module):
            for name, _ in value.named_parameters():
                found.append(Entry(f"{dot}{stored}.{adapter}.{name}", f"{dot}{stored}.{name}", layer))
        else:
            found.append(Entry(f"{dot}{stored}.{adapter}", f"{dot}{stored}", layer))
    return found


def strip(name: str) -> str:
    """A name without what compilation and sharding wrap around modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def bank_entries(model: nn.Module, adapter: str, saved: bool = True) -> dict[str, tuple[str, Tensor]]:
    """Shared tensors of an adapter, by names in files (without prefix): the name in the state dict, and the tensor.

    Args:
        model: The adapted model.
        adapter: The adapter.
        saved: Only those that files hold.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    paths = {id(module): path for path, module in whole.walk(model)}
    for layer in whole.layers(model):
        if adapter not in layer._adapters:
            continue
        config = layer._adapters[adapter]
        wanted = method_of(config).saved_banks(config) if saved else tuple(layer._banks)
        for name in wanted:
            bank: Any = layer._banks.get(name, {})
            if adapter not in bank:
                continue
            held = bank[adapter]
            # Injected without a model around it, it is nowhere but in the layers.
            path = strip(paths.get(id(bank)) or f"{paths[id(layer)]}.{name}")
            parts = [("", held)] if isinstance(held, Tensor) else held.items()
            for part, tensor in parts:
                end = f".{part}" if part else ""
                found[f"{name}{end}"] = (f"{path}.{adapter}{end}", tensor)
    return found


def modules_of(state_dict: Mapping[str, Tensor], method: WeightMethod) -> list[str]:
    """Paths of the layers that the tensors of a file belong to."""
    stems = {slot.name for slot in method.slots}
    stems |= {f"{n.rpartition('_')[0]}_embedding_{n.rpartition('_')[2]}" for n in stems}
    found: dict[str, None] = {}
    for key in state_dict:
        parts = key.removeprefix(BASE_PREFIX).split(".")
        for position, part in enumerate(parts):
            if part in stems:
                found[".".join(parts[:position])] = None
                break
    return list(found)


def to_file(model: nn.Module, found: Iterable[Entry], adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in the file, after each method's own say on the form in which it saves."""
    result: dict[str, Tensor] = {}
    for entry in found:
        if entry.memory not in tensors:
            continue
        tensor = tensors[entry.memory]
        if entry.layer is None:
            result[entry.disk] = tensor
            continue
        parts = Parts(entry.layer, adapter)
        path, _, name = _split(entry.disk, entry.layer)
        for key, value in parts.method.to_file(parts, name, tensor, parts.config).items():
            result[f"{path}{key}"] = value
    return result


def mirrored(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file says again for layers that are tied to others: names there, and the tensors that they should be.

    Args:
        model: The model.
        adapter: The adapter.
        tensors: Those of the adapter, by names in files.
    """
    paths, followers = {}, []
    for path, layer in whole.walk(model):
        if isinstance(layer, AdaptedLayer):
            paths[id(layer)] = strip(path)
            if adapter in layer._leaders:
                followers.append(layer)
    found: dict[str, Tensor] = {}
    for layer in followers:
        leader = layer._leaders[adapter]
        start, method = f"{paths[id(leader)]}.", method_of(layer._adapters[adapter])
        own = {k[len(start) :]: t for k, t in tensors.items() if k.startswith(start) and method.owns(k[len(start) :])}
        found.update({f"{paths[id(layer)]}.{name}": t for name, t in method.mirrored(own).items()})
    return found


def _split(disk: str, layer: AdaptedLayer) -> tuple[str, str, str]:
    stems = set(layer._stored.values()) | set(layer._stored)
    parts = disk.split(".")
    position = max(i for i, part in enumerate(parts) if part in stems)
    path = ".".join(parts[:position])
    return (f"{path}." if path else ""), path, ".".join(parts[position:])


def from_file(
    model: nn.Module, found: Iterable[Entry], adapter: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a file by their names in memory, and the names of the file that belong nowhere.

    Args:
        model: The model they are for.
        found: `entries(model, adapter)`.
        adapter: The adapter.
        tensors: By names as `entries` gives them for files.
    """
    found = list(found)
    by_layer: dict[int, tuple[AdaptedLayer, str]] = {}
    for entry in found:
        if entry.layer is not None:
            by_layer[id(entry.layer)] = (entry.layer, _split(entry.disk, entry.layer)[0])
    remaining = dict(tensors)
    for layer, path in by_layer.values():
        parts = Parts(layer, adapter)
        method = parts.method
        if type(method).from_file is WeightMethod.from_file:
            continue
        own = {
            k[len(path) :]: remaining.pop(k)
            for k in list(remaining)
            if k.startswith(path) and method.owns(k[len(path) :])
        }
        remaining.update({f"{path}{k}": v for k, v in method.from_file(parts, own, parts.config).items()})
    result = {}
    for entry in found:
        if entry.disk in remaining:
            result[entry.memory] = remaining.pop(entry.disk)
    return result, list(remaining)


def assign(module: nn.Module, name: str, tensor: Tensor, replaced: list[tuple[Tensor, Tensor]]) -> None:
    """Put a tensor where the parameter or buffer `name` of a module is; what lay on the meta device becomes real.

    Args:
        module: The model.
        name: As in its state dict.
        tensor: On the right device already.
        replaced: Collects what became real, as (old, new), for `share`.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
    old = held[leaf]
    if old.device.type == "meta":
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        held[leaf] = new
        replaced.append((old, new))
    else:
        with torch.no_grad():
            old.copy_(tensor)


def share(module: nn.Module, adapter: str, replaced: list[tuple[Tensor, Tensor]]) -> None:
    """Let layers that hold the same parameter of an adapter (tied ones) hold the new one that took its place."""
    new = {id(old): fresh for old, fresh in replaced}
    for _, owner in owners(module, adapter) if new else ():
        for key, parameter in owner._parameters.items():
            if id(parameter) in new:
                owner._parameters[key] = new[id(parameter)]  # type: ignore[assignment]


def owners(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold tensors of the base model, of trained copies, and of this adapter; not those of others."""
    for path, module in whole.walk(model):
        yield path, module
        if isinstance(module, AdaptedLayer) and adapter in module._adapters:
            dot = f"{path}." if path else ""
            for name, held in module._modules.items():
                if held is None or name == "base_layer":
                    continue
                yield f"{dot}{name}", held
                if (leaf := held._modules.get(adapter)) is not None:
                    yield from leaf.named_modules(prefix=f"{dot}{name}.{adapter}")


__all__ = [
    "BASE_PREFIX",
    "Entry",
    "assign",
    "bank_entries",
    "container",
    "entries",
    "from_file",
    "mirrored",
    "modules_of",
    "owners",
    "share",
    "strip",
    "to_file",
]
