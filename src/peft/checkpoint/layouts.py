"""How a model holds its weights, and how the model that a file was written for did: see `checkpoint.fused`.

The other layout is read off transformers' own conversion of checkpoints; or, for experts, off their names; or the
caller states it (`fused=`). What each row of a fused layer means can't be seen on its shape, so that is never guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft import registry, targets
from peft.checkpoint import fused, keys
from peft.checkpoint.fused import Layout
from peft.errors import ConfigError, LoadError
from peft.hosts import host_class
from peft.integrations import transformers
from peft.method import WeightMethod

_ROLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)")


def rows(model: nn.Module) -> dict[str, Tensor]:
    """Numbers for the rows of each parameter of the bare model, (matrices, rows), in order."""
    found, first = {}, 0
    for key, module in targets._adaptable(model):
        for name, parameter in targets._own_parameters(module):
            count, size = _shape(_bare(module), name, parameter)
            path = f"{key}.{name}" if key else name
            found[path] = torch.arange(first, first + count * size).view(count, size)
            first += count * size
    return found


def _bare(module: Any) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _shape(module: Any, name: str, parameter: Tensor) -> tuple[int, int]:
    if _is_stack(module, parameter):
        return parameter.shape[0], parameter.shape[2 if getattr(module, "is_transposed", False) else 1]
    if name == "weight" and isinstance(size := getattr(module, "out_features", None), int):
        return 1, size  # quantised layers store other shapes
    return 1, parameter.shape[0] if parameter.dim() else 1


def _is_stack(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.dim() == 3 and host_class(module) is None


def fit(
    model: nn.Module,
    config: Any,
    state: Mapping[str, Tensor],
    stated: Mapping[str, Sequence[str]] | None = None,
    strict: bool = True,
) -> tuple[Any, Mapping[str, Tensor]]:
    """An adapter as it is for this model, if the file was written for one that holds its weights in other pieces.

    Args:
        model: The bare model.
        config: The file's config.
        state: The file's tensors.
        stated: What the caller knows: `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`, a layer and those whose rows it
            has, in order.
        strict: Raise for tensors that the file lacks.

    Returns:
        Config and tensors, as they were if all layers of the file are here.

    Raises:
        LoadError: the adapter can't be carried over.
    """
    method = registry.method(str(getattr(config.peft_type, "value", config.peft_type)))
    if not isinstance(method, WeightMethod):
        return config, state
    paths = {path.replace(".base_layer", "") for path in keys.modules_of(state, method)}
    modules = dict(targets._adaptable(model))
    lost = [path for path in paths if path not in modules or not _has_weights(modules[path])]
    if not lost:
        return config, state
    here = rows(model)
    for there in (
        _stated(here, stated or {}, lost, state),
        _original_rows(model, here),
        _expert_rows(model, config, here, lost),
    ):
        names = {path for name in there for path in (name.removesuffix(".weight"), name.rpartition(".")[0])}
        if names.isdisjoint(lost):
            continue
        if (found := fused.convert(config, state, Layout(there=there, here=here), strict)) is not None:
            return found
    return config, state


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in targets._own_parameters(module))


# ---------------------------------------------------------------- layouts of the same rows


def to_original(model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
    """An adapter of this model, for the weights as its original checkpoints call and hold them.

    Args:
        model: The bare model.
        config: Of the adapter.
        state: Its tensors, by names in files.

    Returns:
        Config and tensors, as they were if the adapted weights are the same there.

    Raises:
        LoadError: the adapter can't be carried over.
    """
    numbers = rows(model)
    original = _original_rows(model, numbers)
    found = fused.convert(config, state, Layout(there=numbers, here=original), strict=False) if original else None
    return found or (config, state)


def _original_rows(model: nn.Module, here: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows by their names in original checkpoints; empty if they are called and held as they are here.

    The conversion is run on the numbers, in the place of weights with one column: whatever it does is known exactly.
    """
    probes, stacks = {}, set()
    for key, module in targets._adaptable(model):
        for name, parameter in targets._own_parameters(module):
            path = f"{key}.{name}" if key else name
            if _is_stack(_bare(module), parameter):
                probes[path] = here[path].unsqueeze(1 if getattr(_bare(module), "is_transposed", False) else 2)
                stacks.add(path)
            else:
                probes[path] = here[path].view(-1, *[1] * max(parameter.dim() - 1, 0))
    found = transformers.original_format(model, probes)
    if all(name in probes and torch.equal(numbers, probes[name]) for name, numbers in found.items()):
        return {}
    stacked = torch.cat([here[path].flatten() for path in stacks] or [torch.zeros(0, dtype=torch.long)])
    return {name: _matrices(numbers, stacked) for name, numbers in found.items()}


def _matrices(numbers: Tensor, stacked: Tensor) -> Tensor:
    whole = numbers.dim() == 3 and bool((stacked == numbers.flatten()[0]).any())
    return numbers.flatten(1) if whole else numbers.reshape(1, -1)


def _stated(
    here: Mapping[str, Tensor],
    stated: Mapping[str, Sequence[str]],
    lost: Iterable[str],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    if not stated:
        return {}
    there = dict(here)
    for whole, parts in stated.items():
        if isinstance(parts, str) or len(parts) < 2:
            raise ConfigError(f"fused[{whole!r}] is {parts!r}; give the names of the layers that it holds, in order.")
        for path in {path.rpartition(".")[0] for path in lost if path.rpartition(".")[2] in (whole, *parts)}:
            one, several = _in(path, whole), [_in(path, part) for part in parts]
            sizes: list[int] = []
            if f"{one}.weight" in here:
                sizes = _sizes(one, several, here[f"{one}.weight"].shape[1], state)
            for end in ("weight", "bias"):
                names = [f"{part}.{end}" for part in several]
                if all(name in here for name in names):
                    there[f"{one}.{end}"] = torch.cat([there.pop(name) for name in names], dim=1)
                elif f"{one}.{end}" in here:
                    there.update(zip(names, there.pop(f"{one}.{end}").split(sizes, dim=1), strict=True))
    return there


def _in(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sizes(one: str, several: Sequence[str], rows: int, state: Mapping[str, Tensor]) -> list[int]:
    """Rows of the parts of a layer, as the file's factors say."""
    ups = [state.get(f"{keys.BASE_PREFIX}{part}.lora_B.weight", state.get(f"{part}.lora_B.weight")) for part in several]
    known = [None if up is None else up.shape[0] for up in ups]
    left, open_ = rows - sum(size or 0 for size in known), known.count(None)
    # Where a part begins depends on the sizes of those before it.
    unclear = any(size is not None and 0 < known[:i].count(None) < open_ for i, size in enumerate(known))
    if left < 0 or (open_ == 0 and left) or (open_ and left % open_) or unclear:
        raise LoadError(
            f"{one!r} has {rows} rows here; the adapter's {list(several)} have {known} (None: not adapted)."
        )
    return [left // open_ if size is None else size for size in known]


def _expert_rows(model: nn.Module, config: Any, here: Mapping[str, Tensor], lost: Iterable[str]) -> dict[str, Tensor]:
    """The layout with experts apart if they are stacked here, and the other way round, by their names."""
    there = dict(here)
    stacks, lists = _stacked(model), _listed(here)
    by_numbers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in (*stacks, *lists):
        by_numbers[_numbers(path)].append(path)
    for path in sorted({match.group(1) if (match := _EXPERT.fullmatch(p)) else p for p in lost}):
        found = by_numbers.get(_numbers(path), [])
        if len(found) != 1:
            continue
        place = found[0]
        if place in stacks:
            there.update(_apart(path, place, there, [p for p in lost if p.startswith(f"{path}.")]))
        else:
            there.update(_together(path, place, lists[place], there))
    return there


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())


def _stacked(model: nn.Module) -> list[str]:
    return [
        key
        for key, module in targets._adaptable(model)
        if any(_is_stack(_bare(module), p) for _, p in targets._own_parameters(module))
        and getattr(_bare(module), "is_concatenated", True)
    ]


def _listed(here: Mapping[str, Tensor]) -> dict[str, dict[str, set[int]]]:
    """Lists of experts: by path, names of their layers and the experts that have them."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    known = {name for names in _ROLES for name in names}
    for name in here:
        match = _EXPERT.fullmatch(name.removesuffix(".weight"))
        if match and match.group(3) in known and name.endswith(".weight"):
            found[match.group(1)][match.group(3)].add(int(match.group(2)))
    return found


def _apart(path: str, place: str, there: dict[str, Tensor], lost: Sequence[str]) -> dict[str, Tensor]:
    """Rows of each expert's layers, for the stacks at `place`."""
    used = {p.rpartition(".")[2] for p in lost}
    names = next((names for names in _ROLES if used <= set(names)), None)
    if names is None:
        return {}
    gate, up, down = names
    parts: dict[str, Tensor] = {}
    if (both := there.pop(f"{place}.gate_up_proj", None)) is not None:
        parts[gate], parts[up] = both.chunk(2, dim=1)
    elif (single := there.pop(f"{place}.up_proj", None)) is not None:
        parts[up] = single
    if (single := there.pop(f"{place}.down_proj", None)) is not None:
        parts[down] = single
    return {f"{path}.{e}.{name}.weight": row[None] for name, stack in parts.items() for e, row in enumerate(stack)}


def _together(path: str, place: str, layers: Mapping[str, set[int]], there: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of stacks, for the experts listed at `place`."""
    gate, up, down = next(names for names in _ROLES if set(layers) & set(names))
    count = len(layers[up])
    if any(numbers != set(range(count)) for numbers in layers.values()):
        return {}

    def stack(*names: str) -> Tensor:
        one = (torch.cat([there.pop(f"{place}.{e}.{name}.weight") for name in names], dim=1) for e in range(count))
        return torch.cat(list(one))

    first = {f"{path}.gate_up_proj": stack(gate, up)} if gate in layers else {f"{path}.up_proj": stack(up)}
    return {**first, f"{path}.down_proj": stack(down)}


__all__ = ["fit", "rows", "to_original"]
