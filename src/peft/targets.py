"""Which modules and parameters a config asks for. Reads the model's structure, never changes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from torch import Tensor, nn

from peft import patterns, registry
from peft.config import PeftType, TargetedConfig
from peft.errors import NoMatchingPeftModuleError, TargetError, nearest
from peft.hosts import host_class
from peft.hosts.linear import LinearHost
from peft.layer import AdaptedLayer

ALL_LINEAR = "all-linear"
DUMMY = "dummy-target-modules"
HEADS = ("score", "classifier")
_LINEAR = ("Linear", "Conv1D")
_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")


# ---------------------------------------------------------------- matching names


class Names:
    """A list of names: an entry matches a module of that name, or whose path ends with a dot and the entry."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = set(entries)

    def entry(self, key: str) -> str | None:
        """The entry that matches the module path, or None."""
        position = -1
        while True:
            suffix = key[position + 1 :]
            if suffix in self.entries:
                return suffix
            position = key.find(".", position + 1)
            if position < 0:
                return None


class Endings(Names):
    """Names as `modules_to_save` reads them: an entry matches whatever path ends with it, within a word too.

    `classifier` means `pre_classifier` as well: adapter files of that kind have always held both.
    """

    def entry(self, key: str) -> str | None:
        return next((entry for entry in self.entries if key.endswith(entry)), None)


class Regex:
    """A regular expression that must match the whole path."""

    def __init__(self, pattern: str, where: str) -> None:
        self.pattern, self.where = pattern, where
        self.entries = {pattern}

    def entry(self, key: str) -> str | None:
        return self.pattern if patterns.fullmatch(self.pattern, key) else None


def matcher(spec: Iterable[str] | str | None, where: str) -> Names | Regex | None:
    """What matches paths against a config's list of names or regex."""
    if not spec:
        return None
    return Regex(spec, where) if isinstance(spec, str) else Names(spec)


def layer_index(config: TargetedConfig, key: str) -> int | None:
    """The index of the layer that a module is in, counted in `layers_pattern` or in the first list of modules."""
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if not names:
        found = _INDEX.match(key)
        return int(found.group(1)) if found else None
    for name in names:
        found = patterns.compiled(rf"(?:^|.*?\.){name}\.(\d+)\.", "layers_pattern").match(key)
        if found:
            return int(found.group(1))
    return None


# ---------------------------------------------------------------- defaults


@cache
def _tables() -> dict[str, Any]:
    return json.loads(resources.files("peft").joinpath("default_targets.json").read_text())


def default_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """The modules that a method adapts in an architecture if nothing is said; None if none are known."""
    tables = _tables()
    own = tables["methods"].get(peft_type, {})
    return own[model_type] if model_type in own else tables["targets"].get(model_type)


def default_table(peft_type: str) -> dict[str, Any]:
    """All of `default_targets` for a method, by architecture."""
    tables = _tables()
    table = {**tables["targets"], **tables["methods"].get(peft_type, {})}
    return {model_type: names for model_type, names in table.items() if names is not None}


def feedforward_table() -> dict[str, Any]:
    """Feed-forward modules by architecture, where (IA)³ scales inputs."""
    return dict(_tables()["feedforward"])


def model_type(model: nn.Module) -> str | None:
    """The architecture's name in the model's config, or None."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config.get("model_type")
    return getattr(config, "model_type", None)


# ---------------------------------------------------------------- choosing


@dataclass
class Matches:
    """What a config finds in a model.

    Args:
        modules: Paths of the modules to adapt, in model order, with the entry that matched each.
        parameters: Paths of parameters to adapt, with the entry that matched.
        unmatched: Entries of each list that matched nothing.
        excluded: Paths that matched and were excluded.
    """

    modules: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)


def complete(config: TargetedConfig, model: nn.Module) -> None:
    """Fill in `target_modules` where the config leaves the choice to the architecture.

    Raises:
        TargetError: nothing is known about the architecture.
    """
    if stacked := getattr(config, "_in_stacks", None):  # names of layers that a loader has put into stacks
        found = Names(stacked)
        others = {entry for key, _ in _adaptable(model) if (entry := found.entry(key)) is not None}
        config.target_modules = {e for e in config.target_modules or () if e not in stacked or e in others}
    if config.target_modules is not None or config.target_parameters:
        return
    kind = PeftType(config.peft_type).value
    known = model_type(model)
    method = registry.method(kind)
    found = method.default_targets(config, model) or (default_targets(kind, known) if known else None)
    found = found or method.fallback_targets
    if found is None:
        linear = sorted({key.rpartition(".")[2] for key in linear_modules(model)})[:12]
        hint = f" Names of its linear layers: {linear}." if linear else ""
        what = f"the architecture {known!r}" if known else f"{type(model).__name__}, which names no architecture"
        raise TargetError(
            f"Please specify `target_modules` in the {type(config).__name__}: there is no default for {what}. "
            f"Give a list of module names, a regex, or 'all-linear'.{hint}"
        )
    config.target_modules = found if isinstance(found, str) else set(found)


def linear_modules(model: nn.Module) -> list[str]:
    """Paths of the linear layers, less the output head: what 'all-linear' means."""
    heads = {id(head) for head in (_output_embeddings(model),) if head is not None}
    if hasattr(model, "save_pretrained"):  # classification heads of transformers' models are new, so they train whole
        heads |= {id(m) for key, m in model.named_modules() if key in HEADS}
    found = []
    for key, module in _adaptable(model):
        inner = module.get_base_layer() if isinstance(module, AdaptedLayer) else module
        host = host_class(inner)
        if host is not None and issubclass(host, LinearHost) and id(inner) not in heads and id(module) not in heads:
            found.append(key)
    return found


def spell_out(config: TargetedConfig, model: nn.Module, matches: Matches) -> None:
    """Replace 'all-linear' in a config by the names that it stood for, so that a file says the same to everyone."""
    if config.target_modules != ALL_LINEAR:
        return
    modules = [key for key, _ in _adaptable(model) if key]
    config.target_modules = condense(matches.modules, modules)
    if matches.parameters:
        every = [f"{key}.{name}" for key, module in _adaptable(model) if key for name, _ in _own_parameters(module)]
        names = condense(matches.parameters, every)
        order = [next(n for n in names if path == n or path.endswith(f".{n}")) for path in matches.parameters]
        config.target_parameters = list(dict.fromkeys(order))


def condense(keys: Iterable[str], names: Iterable[str]) -> set[str]:
    """The shortest entries that match `keys` and nothing else among `names`.

    >>> sorted(condense(["a.0.q", "a.1.q", "b.out"], ["a.0.q", "a.1.q", "b.out", "c.out"]))
    ['b.out', 'q']
    """
    wanted = set(keys)
    shared: dict[str, bool] = {}
    for name in names:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            suffix = ".".join(parts[-n:])
            shared[suffix] = shared.get(suffix, True) and name in wanted
    found = set()
    for key in wanted:
        parts = key.split(".")
        suffixes = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.add(next((suffix for suffix in suffixes if shared.get(suffix)), key))
    return found


def find(config: TargetedConfig, model: nn.Module) -> Matches:
    """Match the config against the model, once. Nothing is raised for entries that match nothing: see `demand`."""
    matches = Matches()
    where = type(config).__name__
    everything = linear_modules(model) if config.target_modules == ALL_LINEAR else None
    targets = Names(everything) if everything is not None else matcher(config.target_modules, f"{where}.target_modules")
    exclude = matcher(config.exclude_modules, f"{where}.exclude_modules")
    only = config.layers_to_transform
    layers = None if only is None else {only} if isinstance(only, int) else set(only)
    whole = Endings(config.modules_to_save) if config.modules_to_save else None
    used: set[str] = set()
    dropped: set[str] = set()
    for key, _ in _adaptable(model):
        entry = targets.entry(key) if targets else None
        if entry is None:
            continue
        if exclude and (why := exclude.entry(key)) is not None:
            dropped.add(why)
            matches.excluded.append(key)
            used.add(entry)
            continue
        if layers is not None and (index := layer_index(config, key)) is not None and index not in layers:
            used.add(entry)
            continue
        if layers is not None and layer_index(config, key) is None:
            continue
        used.add(entry)
        if whole is None or not _inside(whole, key):
            matches.modules[key] = ALL_LINEAR if everything is not None else entry
    if everything is not None:
        matches.parameters = dict.fromkeys(_expert_stacks(model, exclude), ALL_LINEAR)
    _find_parameters(config, model, matches)
    if targets and everything is None:
        matches.unmatched["target_modules"] = sorted(targets.entries - used)
    if exclude:
        unused = exclude.entries - dropped
        matches.unmatched["exclude_modules"] = sorted(unused)
    for name in ("rank_pattern", "alpha_pattern"):
        # Lists are a record of which ranks are left (AdaLoRA), not a request.
        table = {k: v for k, v in (getattr(config, name, None) or {}).items() if not isinstance(v, list)}
        hit = {patterns.matching(table, key) for key in (*matches.modules, *matches.parameters)} if table else set()
        matches.unmatched[name] = sorted(str(k) for k in table if k not in hit and not _overshadowed(table, k, matches))
    return matches


def _overshadowed(table: Mapping[str, Any], key: str, matches: Matches) -> bool:
    return any(patterns.matching({key: 0}, path) for path in (*matches.modules, *matches.parameters))


def _inside(whole: Names, key: str) -> bool:
    """Whether a module, or one that holds it, is trained whole."""
    parts = key.split(".")
    return any(whole.entry(".".join(parts[: n + 1])) is not None for n in range(len(parts)))


def _expert_stacks(model: nn.Module, exclude: Names | Regex | None) -> list[str]:
    """Paths of 3-D parameters: stacks of linear layers, one per expert. Routers are 2-D and stay as they are."""
    return [
        path
        for key, module in _adaptable(model)
        for name, tensor in _own_parameters(module)
        for path in (f"{key}.{name}" if key else name,)
        if tensor.dim() == 3 and tensor.is_floating_point() and key
        if host_class(module.get_base_layer() if isinstance(module, AdaptedLayer) else module) is None
        if exclude is None or not (exclude.entry(key) or exclude.entry(path))
    ]


def _find_parameters(config: TargetedConfig, model: nn.Module, matches: Matches) -> None:
    if not config.target_parameters:
        return
    names = Names(config.target_parameters)
    # Several parameters of one module nest in the order in which the module defines them, whatever the config's.
    for key, module in _adaptable(model):
        for name, tensor in _own_parameters(module):
            path = f"{key}.{name}" if key else name
            entry = names.entry(path)
            if entry is not None and isinstance(tensor, Tensor):
                matches.parameters[path] = entry
    matches.unmatched["target_parameters"] = sorted(set(config.target_parameters) - set(matches.parameters.values()))


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    inner = module.get_base_layer() if isinstance(module, AdaptedLayer) else module
    yield from ((name, p) for name, p in inner._parameters.items() if p is not None)


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model as its author wrote it: adapted layers count as the layer they adapt, their insides don't.

    Modules that are trained whole by an earlier adapter are passed over too.
    """

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, module
        if getattr(module, "is_auxiliary_wrapper", False):
            inner = module.original_module
            if isinstance(inner, AdaptedLayer):
                inner = inner.get_base_layer()
            if isinstance(inner, nn.Module):
                yield from children(prefix, inner)
            return
        inner = module.get_base_layer() if isinstance(module, AdaptedLayer) else module
        yield from children(prefix, inner)

    def children(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                yield from walk(f"{prefix}.{name}" if prefix else name, child)

    seen: set[int] = set()
    yield from walk("", model)


def demand(config: TargetedConfig, model: nn.Module, matches: Matches) -> None:
    """Raise unless the config found something.

    Raises:
        NoMatchingPeftModuleError: nothing matched; the message names the nearest modules there are.
    """
    if matches.modules or matches.parameters or config.target_modules == DUMMY:
        return
    names = sorted({key.rpartition(".")[2] for key, _ in _adaptable(model) if key})
    if matches.excluded:
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation: every match of target_modules is excluded by exclude_modules "
            f"{config.exclude_modules!r} ({', '.join(matches.excluded[:3])}"
            f"{', …' if len(matches.excluded) > 3 else ''})."
        )
    wanted = config.target_modules or config.target_parameters
    shown = wanted if isinstance(wanted, str) else sorted(wanted or ())
    hint = (
        "" if isinstance(wanted, str) else "".join(nearest(str(entry).rpartition(".")[2], names) for entry in shown[:1])
    )
    layers = f" in layers {config.layers_to_transform}" if config.layers_to_transform is not None else ""
    raise NoMatchingPeftModuleError(
        f"Target modules {shown} not found in the base model{layers}. Please check the target modules and try "
        f"again.{hint} Modules here: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    try:
        return None if get is None else get()
    except (NotImplementedError, AttributeError):
        return None
