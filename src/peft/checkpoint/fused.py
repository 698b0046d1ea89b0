"""Adapters of weights that a model holds in other pieces: q, k and v as one layer, experts as one stack, and back.

A `Layout` numbers the rows of all weights, in the model that the adapter was written for and in the model at hand;
the same row has the same number. LoRA moves along exactly, since row i of ΔW is (row i of B) A: rows that come from
one layer keep its A, and rows that come from several get all their As on top of each other, and B block by block.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peft import patterns
from peft.checkpoint.keys import BASE_PREFIX
from peft.errors import LoadError
from peft.targets import Names, condense, layer_index, matcher

_SLOT = re.compile(
    r"(.+?)((?:\.base_layer)*)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)"
)
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "layer_replication")
_REMEDY = (
    "Where the adapter was trained (with that release of the base model's code), save it as a plain LoRA "
    "(model.save_as_lora), which can be carried over; or load it there."
)


@dataclass(frozen=True)
class Layout:
    """Two ways to hold the same rows.

    Args:
        there: By the names of weights in the model of the file: numbers of their rows (matrices, rows); stacks of
            experts have several matrices, layers one.
        here: The same of the model at hand.
    """

    there: Mapping[str, Tensor]
    here: Mapping[str, Tensor]

    def same(self) -> dict[str, str]:
        """Weights of the file's model to those here that are the same, row by row."""
        firsts = {(int(n.flatten()[0]), tuple(n.shape)): name for name, n in self.here.items() if n.numel()}
        found = {}
        for name, numbers in self.there.items():
            other = firsts.get((int(numbers.flatten()[0]), tuple(numbers.shape))) if numbers.numel() else None
            if other is not None and torch.equal(numbers, self.here[other]):
                found[name] = other
        return found


@dataclass
class _Factors:
    """LoRA on one matrix: (r, in), (out, r), what ΔW is multiplied with, and values by row."""

    A: Tensor
    B: Tensor
    scale: float
    rows: dict[str, Tensor] = field(default_factory=dict)


def convert(
    config: Any, state: Mapping[str, Tensor], layout: Layout, strict: bool = True
) -> tuple[Any, dict[str, Tensor]] | None:
    """An adapter for the weights of `layout.there`, as one for those of `layout.here`. The same function, exactly.

    Args:
        config: Its config; not changed.
        state: Its tensors, by names in files.
        layout: Where the rows went.
        strict: Raise for weights that moved, that the config names and the file lacks; else they have no change.

    Returns:
        Config and tensors; None if no tensor is of a weight that moved.

    Raises:
        LoadError: it can't be carried over; the message says why, and what to do.
    """
    same = layout.same()
    moves = {_module(old): _module(new) for old, new in same.items() if old.endswith(".weight")}
    held, rest, touched = _sort(config, state, layout, same, moves)
    if not touched:
        return None
    if held and strict:
        _demand(config, held, layout, same)
    result = dict(rest)
    settings = _settings(config, held, rest, layout)
    result.update(_move(config, held, layout, settings))
    return _reconfigured(config, settings, layout), result


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _sort(
    config: Any,
    state: Mapping[str, Tensor],
    layout: Layout,
    same: Mapping[str, str],
    moves: Mapping[str, str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], bool]:
    """Tensors of weights that moved, by weight and slot; all others, renamed if need be; whether anything changed."""
    stacks = _stacks(config, layout.there)
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest: dict[str, Tensor] = {}
    touched = False
    for name, tensor in state.items():
        plain = name.removeprefix(BASE_PREFIX)
        prefix = name[: len(name) - len(plain)]
        match = _SLOT.fullmatch(plain)
        weight = _weight(match, stacks, layout.there) if match else None
        is_stack = weight is not None and layout.there[weight].shape[0] > 1
        if match and weight is not None and (weight not in same or (is_stack and same[weight] != weight)):
            held[weight][match.group(3).removesuffix(".weight")] = tensor
            touched = True
            continue
        owner = next((p for p in _paths(plain) if f"{p}.weight" in layout.there), None)
        if owner is not None and owner not in moves:
            _refuse(config, owner, plain[len(owner) + 1 :])
        new = plain if owner is None or moves[owner] == owner else moves[owner] + plain[len(owner) :]
        touched |= new != plain
        rest[prefix + new] = tensor
    return held, rest, touched


def _paths(name: str) -> Iterable[str]:
    """Paths that a name begins with, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _stacks(config: Any, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Adapted stacks by the module that holds them, the outermost of the nested layers first."""
    names = Names(getattr(config, "target_parameters", None) or [])
    found: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        if not name.endswith(".weight") and names.entry(name) is not None:
            found[name.rpartition(".")[0]].insert(0, name)
    return found


def _weight(match: re.Match[str], stacks: Mapping[str, list[str]], weights: Mapping[str, Tensor]) -> str | None:
    path, nested = match.group(1), match.group(2).count(".base_layer")
    if f"{path}.weight" in weights and not nested:
        return f"{path}.weight"
    return stacks[path][nested] if nested < len(stacks.get(path, ())) else None


def _demand(config: Any, held: Mapping[str, Any], layout: Layout, same: Mapping[str, str]) -> None:
    """Raise if the file lacks what its config names among the weights that moved: nothing else would notice."""
    named, exclude = (
        matcher(config.target_modules, "target_modules"),
        matcher(config.exclude_modules, "exclude_modules"),
    )
    only = config.layers_to_transform
    only = {only} if isinstance(only, int) else only
    stacks = {name for group in _stacks(config, layout.there).values() for name in group}
    lacking = []
    for name in layout.there:
        path = _module(name)
        if name in held or name in same:
            continue
        wanted = name in stacks or (path != name and named is not None and named.entry(path) is not None)
        if wanted and not (exclude and exclude.entry(path)) and (only is None or layer_index(config, path) in only):
            lacking.append(path)
    if lacking:
        raise LoadError(
            f"The adapter's config names {len(lacking)} layers that its file has no tensors for: {lacking[:3]}"
            f"{' …' if len(lacking) > 3 else ''}. The file is incomplete. Pass strict=False to load what is there."
        )


def _refuse(config: Any, owner: str, slot: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    raise LoadError(
        f"The adapter changes {owner!r} by {kind} ({slot}); this model holds that weight as a part of another, or in "
        f"parts, and only LoRA can be carried over. {_REMEDY}"
    )


# ---------------------------------------------------------------- the move


def _settings(
    config: Any, held: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Tensor], layout: Layout
) -> dict[str, tuple[int, float]]:
    """Rank and alpha of what stays in one piece, by path; those of what moves join later."""
    found: list[str] = []
    for name in rest:
        match = _SLOT.fullmatch(name.removeprefix(BASE_PREFIX))
        if match and match.group(3) == "lora_A.weight":
            found.append(match.group(1))
    old = {new: _module(before) for before, new in ((o, _module(n)) for o, n in layout.same().items())}
    return {path: _said(config, old.get(path, path)) for path in found}


def _said(config: Any, path: str) -> tuple[int, float]:
    rank = patterns.lookup(config.rank_pattern, path, config.r)
    return rank, patterns.lookup(config.alpha_pattern, path, config.lora_alpha)


def _move(
    config: Any,
    held: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    settings: dict[str, tuple[int, float]],
) -> dict[str, Tensor]:
    if not held:
        return {}
    for name in _VARIANTS:
        if getattr(config, name, None):
            _refuse(config, _module(next(iter(held))), name)
    factors = {name: _unpack(config, name, tensors, layout.there[name]) for name, tensors in held.items()}
    pieces = _pieces(layout, factors)
    result = {}
    depths = _depths([name for name in layout.here if name in pieces])
    for name, matrices in pieces.items():
        numbers = layout.here[name]
        scale = next(source.scale for sources in matrices.values() for source, _, _ in sources)
        joined = [_join(name, matrices.get(e, []), numbers.shape[1], scale) for e in range(numbers.shape[0])]
        rank = max(a.shape[0] for a, _, _ in joined)
        width = max(a.shape[1] for a, _, _ in joined)
        path = _module(name)
        start = f"{BASE_PREFIX}{name.rpartition('.')[0]}.{'base_layer.' * depths[name]}"
        downs = [_padded(a, rank, width) for a, _, _ in joined]
        ups = [_padded(b, b.shape[0], rank) for _, b, _ in joined]
        result[f"{start}lora_A.weight"] = torch.cat(downs)
        result[f"{start}lora_B.weight"] = torch.stack(ups, dim=-1).flatten(1)
        for slot, values in joined[0][2].items():
            result[start + slot] = values
        settings[path] = (rank, scale * (rank**0.5 if config.use_rslora else rank))
    return result


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))


def _unpack(config: Any, name: str, tensors: Mapping[str, Tensor], numbers: Tensor) -> list[_Factors]:
    """The factors of each matrix of a weight."""
    count, rows = numbers.shape
    a, b = tensors.get("lora_A"), tensors.get("lora_B")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2:
        raise LoadError(f"The adapter holds {sorted(tensors)} for {_module(name)!r}; it needs two factors A and B.")
    if b.shape[0] != rows or a.shape[0] != b.shape[1] or not a.shape[0] or a.shape[0] % count:
        raise LoadError(
            f"The factors of {_module(name)!r} have shapes {tuple(a.shape)} and {tuple(b.shape)}; for {count} matrices "
            f"with {rows} rows they would be ({count} r, in) and ({rows}, {count} r)."
        )
    rank = a.shape[0] // count
    said, alpha = _said(config, _module(name))
    scale = alpha / (said**0.5 if config.use_rslora else said)
    by_row = {slot: value for slot, value in tensors.items() if slot not in ("lora_A", "lora_B")}
    if by_row and count > 1:
        _refuse(config, _module(name), ", ".join(by_row))
    downs, ups = a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count))
    return [_Factors(downs[e], ups[..., e], scale, by_row) for e in range(count)]


def _pieces(
    layout: Layout, factors: Mapping[str, Sequence[_Factors]]
) -> dict[str, dict[int, list[tuple[_Factors, Tensor, Tensor]]]]:
    """By weight and matrix here: where its rows come from, as (factors, rows here, rows there)."""
    count = 1 + max(int(n.max()) for n in layout.there.values() if n.numel())
    matrix, place = torch.full((count,), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    index: list[tuple[str, int]] = []
    for name, numbers in layout.here.items():
        if layout.there.get(name) is numbers or (name in layout.there and torch.equal(layout.there[name], numbers)):
            continue
        for e, row in enumerate(numbers):
            matrix[row], place[row] = len(index), torch.arange(len(row), dtype=torch.int32)
            index.append((name, e))
    found: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for name, sources in factors.items():
        used: dict[tuple[int, ...], Tensor] = {}
        for source, numbers in zip(sources, layout.there[name], strict=True):
            owners = matrix[numbers]
            for owner in owners.unique().tolist():
                if owner < 0:
                    raise LoadError(f"This model has no place for {_module(name)!r}, which the adapter changes.")
                where = (owners == owner).nonzero()[:, 0]
                target, e = index[owner]
                part = _part(source, where, sources, used)
                found[target][e].append((part, place[numbers[where]].long(), where))
    return found


def _part(
    source: _Factors, where: Tensor, sources: Sequence[_Factors], used: dict[tuple[int, ...], Tensor]
) -> _Factors:
    """Factors for some rows, without the ranks that only other rows use: what was joined comes apart again."""
    if len(where) == source.B.shape[0]:
        return source
    key = (int(where[0]), int(where[-1]), len(where))
    if key not in used:
        used[key] = torch.stack([(other.B[where] != 0).any(dim=0) for other in sources]).any(dim=0)
    keep = used[key]
    return replace(source, A=source.A[keep], B=source.B[:, keep]) if keep.any() else source


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How deep in nested layers the adapter of each weight lies: of several in one module, the last is outermost."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_module[name.rpartition(".")[0]].append(name)
    return {name: depth for group in by_module.values() for depth, name in enumerate(reversed(group))}


def _join(
    name: str, sources: Sequence[tuple[_Factors, Tensor, Tensor]], rows: int, scale: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The factors of one matrix here, of scaling `scale`, and what it has by row."""
    if not sources:
        return torch.zeros(0, 0), torch.zeros(rows, 0), {}
    first = sources[0][0]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for source, here, there in sources:
        block = source.B.new_zeros(rows, source.B.shape[1])
        block[here] = source.B[there] if source.scale == scale else source.B[there] * (source.scale / scale)
        shared = next((i for i, down in enumerate(downs) if torch.equal(down, source.A)), None)
        if shared is None:
            downs.append(source.A)
            ups.append(block)
        else:
            ups[shared] += block
    by_row = {}
    for slot in {slot for source, _, _ in sources for slot in source.rows}:
        covered = sum(len(here) for source, here, _ in sources if slot in source.rows)
        if slot != "lora_B.bias" and covered != rows:
            raise LoadError(
                f"{_module(name)!r} would need {slot} for all of its {rows} rows; the adapter has {covered}. {_REMEDY}"
            )
        values = first.B.new_zeros(rows)
        for source, here, there in sources:
            if slot in source.rows:
                ratio = source.scale / scale if slot == "lora_B.bias" else 1
                values[here] = source.rows[slot].flatten()[there].to(values.dtype) * ratio
        by_row[slot] = values
    if len({source.A.shape[1] for source, _, _ in sources}) != 1:
        raise LoadError(f"The parts of {_module(name)!r} take inputs of different sizes in the adapter.")
    return torch.cat(downs), torch.cat(ups, dim=1), by_row


# ---------------------------------------------------------------- the config


def _reconfigured(config: Any, settings: Mapping[str, tuple[int, float]], layout: Layout) -> Any:
    """The config that asks for what the adapter changes here."""
    changed = copy.copy(config)
    layers = {_module(name) for name in layout.here if name.endswith(".weight")}
    stacks = {name for name, numbers in layout.here.items() if not name.endswith(".weight") and numbers.shape[0] > 1}
    if not settings:  # another method, whose layers only have other names
        return _retargeted(changed, layers, layout)
    modules = [path for path in settings if path in layers]
    parameters = [path for path in settings if path in stacks]
    _target(changed, modules, layers)
    every = condense(parameters, stacks)
    order = [next(n for n in every if path == n or path.endswith(f".{n}")) for path in parameters]
    changed.target_parameters = list(dict.fromkeys(order)) or None
    for name, position in (("rank_pattern", 0), ("alpha_pattern", 1)):
        default = (config.r, config.lora_alpha)[position]
        groups: dict[Any, list[str]] = defaultdict(list)
        for path, values in settings.items():
            if (value := _whole(values[position])) != default:
                groups[value].append(path)
        table = {key: v for v, paths in groups.items() for key in sorted(condense(paths, layers | stacks))}
        setattr(changed, name, table)
    return changed


def _whole(value: float) -> float:
    rounded = round(value)
    return rounded if abs(value - rounded) <= 1e-9 * max(1.0, abs(value)) else value


def _target(config: Any, modules: Sequence[str], layers: Iterable[str]) -> None:
    """Name the layers, by the entries that there are if those still mean the same."""
    layers = set(layers)
    spec, wanted = config.target_modules, set(modules)
    found = matcher(spec, "target_modules")
    if found is not None and config.exclude_modules is None and config.layers_to_transform is None:
        hit = {path: entry for path in layers if (entry := found.entry(path)) is not None}
        if set(hit) == wanted:
            config.target_modules = spec if isinstance(spec, str) else set(hit.values())
            return
    config.target_modules = condense(wanted, layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _retargeted(config: Any, layers: Iterable[str], layout: Layout) -> Any:
    """A config whose lists name layers as the file's model does, for this model."""
    spec = matcher(config.target_modules, "target_modules")
    if spec is None:
        return config
    new = {_module(old): _module(name) for old, name in layout.same().items()}
    wanted = [path for old, path in new.items() if path in layers and spec.entry(old) is not None]
    if config.exclude_modules is None and config.layers_to_transform is None and wanted:
        _target(config, wanted, layers)
    return config
