"""Files whose names are those of another release of the base model's code: modules renamed, or experts fused.

What is renamed is found by structure, never from a list of releases: a path without its `model` parts, or from its
first numbered part on, together with the shape. It is done only if it is unambiguous and leaves nothing over.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft import patterns
from peft.checkpoint.keys import BASE_PREFIX

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.lora_(A|B)\.weight")
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}

Shapes = Mapping[str, tuple[int, ...]]


def renamed(missing: Shapes, unexpected: Shapes) -> dict[str, str] | None:
    """Names of a file to names of the model, if there is just one way to pair all of both.

    >>> renamed({"model.language_model.layers.0.q.lora_A": (2, 4)}, {"language_model.model.layers.0.q.lora_A": (2, 4)})
    {'language_model.model.layers.0.q.lora_A': 'model.language_model.layers.0.q.lora_A'}
    """
    if not missing or len(missing) != len(unexpected):
        return None
    for address in (_without_model, _from_first_number):
        pairs = _pair(missing, unexpected, address)
        if pairs is not None:
            return pairs
    return None


def _pair(missing: Shapes, unexpected: Shapes, address: Callable[[str], str]) -> dict[str, str] | None:
    places: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in missing.items():
        places[address(name), tuple(shape)].append(name)
    pairs = {}
    for name, shape in unexpected.items():
        found = places.get((address(name), tuple(shape)), [])
        if len(found) != 1 or not address(name):
            return None
        pairs[name] = found[0]
    return pairs if len(set(pairs.values())) == len(pairs) else None


def _without_model(name: str) -> str:
    return ".".join(part for part in name.removeprefix(BASE_PREFIX).split(".") if part != "model")


def _from_first_number(name: str) -> str:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if not first else ".".join(parts[first - 1 :])


# ---------------------------------------------------------------- experts that became stacks


def fuse_experts(model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """LoRA on each expert's own layers (`experts.0.w1`), for a model that holds all experts in stacks. Exact.

    The stack of gate and up projections gets both ranks: A is A₁ over A₃, B is block diagonal.

    Args:
        model: The bare model.
        config: The file's config.
        state: The file's tensors.

    Returns:
        The config and tensors for the stacks; None if this is not such a file, or can't be converted.
    """
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))  # path, role, expert, factor -> tensor
    for name, tensor in state.items():
        if match := _EXPERT.fullmatch(name):
            path, number, layer, factor = match.groups()
            found[path][_ROLES[layer]][int(number)][factor] = tensor
    stacks = {_numbers(path): path for path in _stacks(model)}
    places = {path: stacks.get(_numbers(path)) for path in found}
    if not found or None in places.values() or getattr(config, "use_dora", True) or config.lora_bias:
        return None
    result = {name: t for name, t in state.items() if not _EXPERT.fullmatch(name)}
    ranks: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for path, roles in found.items():
        module = model.get_submodule(places[path])  # type: ignore[arg-type]
        used = [name for name in module._parameters if set(_FUSED.get(name, ())) & set(roles)]
        for depth, name in enumerate(reversed(used)):
            fused = _fuse(config, path, {role: roles[role] for role in _FUSED[name] if role in roles}, module, name)
            if fused is None:
                return None
            a, b, rank, scale = fused
            start = f"{BASE_PREFIX}{places[path]}.{'base_layer.' * depth}"
            result |= {f"{start}lora_A.weight": a, f"{start}lora_B.weight": b}
            ranks[name].add((rank, scale))
    if any(len(kinds) != 1 for kinds in ranks.values()):
        return None
    return _for_stacks(config, {name: next(iter(kinds)) for name, kinds in ranks.items()}), result


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())


def _stacks(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if any(p is not None and p.dim() == 3 and name in _FUSED for name, p in module._parameters.items())
    ]


def _fuse(
    config: Any, path: str, roles: Mapping[str, Mapping[int, Mapping[str, Tensor]]], module: nn.Module, name: str
) -> tuple[Tensor, Tensor, int, float] | None:
    """A, B, rank and scaling of one stack; None unless all experts have all tensors of one shape."""
    experts, parts = module._parameters[name].shape[0], len(_FUSED[name])  # type: ignore[union-attr]
    scales = {role: _scale(config, path, role, held) for role, held in roles.items()}
    scale = next(iter(scales.values()))
    downs, ups = [], []
    for expert in range(experts):
        down, up = [], []
        for position, role in enumerate(_FUSED[name]):
            pair = roles.get(role, {}).get(expert, {})
            if role in roles and set(pair) != {"A", "B"}:
                return None
            if role in roles:
                block = pair["B"] * (scales[role] / scale)
                rows = [torch.zeros_like(block)] * parts
                rows[position] = block
                down.append(pair["A"])
                up.append(torch.cat(rows))
        downs.append(torch.cat(down))
        ups.append(torch.cat(up, dim=1))
    if len({(d.shape, u.shape) for d, u in zip(downs, ups, strict=True)}) != 1:
        return None
    return torch.cat(downs), torch.stack(ups, dim=-1).flatten(1), downs[0].shape[0], scale


def _scale(config: Any, path: str, role: str, held: Mapping[int, Mapping[str, Tensor]]) -> float:
    layer = next(old for old, kind in _ROLES.items() if kind == role)
    key = f"{path.removeprefix(BASE_PREFIX)}.0.{layer}"
    rank = patterns.lookup(config.rank_pattern, key, config.r)
    alpha = patterns.lookup(config.alpha_pattern, key, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _for_stacks(config: Any, ranks: Mapping[str, tuple[int, float]]) -> Any:
    changed = copy.copy(config)
    if not isinstance(config.target_modules, str):
        changed.target_modules = {t for t in config.target_modules or () if t.rpartition(".")[2] not in _ROLES}
    changed.target_parameters = [*(config.target_parameters or []), *(f"experts.{name}" for name in ranks)]
    changed.rank_pattern = {**config.rank_pattern, **{f"experts.{n}": rank for n, (rank, _) in ranks.items()}}
    alphas = {n: scale * (rank**0.5 if config.use_rslora else rank) for n, (rank, scale) in ranks.items()}
    changed.alpha_pattern = {**config.alpha_pattern, **{f"experts.{n}": alpha for n, alpha in alphas.items()}}
    return changed
