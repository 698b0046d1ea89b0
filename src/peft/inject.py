"""Putting adapters into a model: plan first, then touch; all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft import targets, whole
from peft.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, check_name
from peft.bulk import bulk
from peft.config import PeftType, TargetedConfig
from peft.errors import AdapterNameError, ConfigError, PeftWarning, StateError, TargetError, nearest
from peft.hosts import Host, host_class
from peft.hosts.parameter import ParameterHost
from peft.layer import AdaptedLayer, adapt
from peft.method import Site, WeightMethod, method_of
from peft.slots import BufferDict, adapter_dtype, container
from peft.targets import Matches


@dataclass
class Target:
    """One layer to adapt."""

    key: str
    module: nn.Module
    parameter: str | None = None

    @property
    def host(self) -> Host:
        """The layer as a weight that acts, without the adapters that are merged into it."""
        layer = _layer_of(_under_tokens(self.module), self.parameter)
        if layer is not None:
            return layer.frozen
        inner = _inner(self.module)
        if self.parameter is not None:
            return ParameterHost(inner, self.parameter)
        cls = host_class(inner)
        if cls is None:
            adapt(inner, WeightMethod(), self.key)  # raises, with the reason
            raise AssertionError
        return cls(inner)


@dataclass
class Plan:
    """What adding an adapter would do."""

    targets: list[Target]
    whole: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    matches: Matches = field(default_factory=Matches)
    followers: dict[str, str] = field(default_factory=dict)
    """Layers that share the weight of a target, and take part in its adapter: their paths, and the target's."""
    first: bool = False
    """Whether the model had no adapter before."""


def make_plan(model: nn.Module, config: TargetedConfig, keys: Sequence[str] | None = None) -> Plan:
    """Decide what to adapt, without changing anything but `config.target_modules` where that was left open.

    Args:
        model: The model.
        config: What is asked for.
        keys: Adapt exactly these modules (they come from the tensors of a file).
    """
    modules = dict(_named_modules(model))
    method_of(config).complete(config, model)
    if keys is not None:
        matches = targets.Matches(modules={key: key for key in keys})
    else:
        targets.complete(config, model)
        matches = targets.find(config, model)
        targets.spell_out(config, model, matches)
        if (
            (not config.trainable_token_indices and not config.modules_to_save)
            or config.target_modules
            or config.target_parameters
        ):
            targets.demand(config, model, matches)
    found = [Target(key, modules[key], _sole_matrix(modules[key])) for key in matches.modules]
    for path in matches.parameters:
        key, _, name = path.rpartition(".")
        if not key:
            raise TargetError(
                f"target_parameters: {name!r} belongs to the model itself; only parameters of submodules can be "
                f"adapted."
            )
        found.append(Target(key, modules[key], name))
    besides = []
    if config.modules_to_save:
        spec = targets.Endings(config.modules_to_save)
        besides = [key for key in modules if key and spec.entry(key) is not None]
        missed = spec.entries - {spec.entry(key) for key in besides}
        matches.unmatched["modules_to_save"] = sorted(missed)
    return Plan(found, besides, _tokens(model, config, modules), matches)


def _sole_matrix(module: nn.Module) -> str | None:
    """For a layer of a type of its own that is named as a target (a router, say): its matrix, if it has just one."""
    inner = _inner(module)
    if host_class(inner) is not None:
        return None
    names = [n for n, p in inner._parameters.items() if p is not None and p.dim() == 2 and p.is_floating_point()]
    return names[0] if len(names) == 1 and not list(inner.children()) else None


def _tokens(model: nn.Module, config: TargetedConfig, modules: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    if not isinstance(wanted, Mapping):
        name = input_embedding_name(model)
        if name is None:
            raise TargetError(
                "trainable_token_indices: no input embedding was found; give {'name of the embedding': ids}."
            )
        wanted = {name: list(wanted)}
    result = {}
    for entry, ids in wanted.items():
        found = [key for key in modules if targets.Names([entry]).entry(key)]
        if not found:
            raise TargetError(f"trainable_token_indices: there is no module {entry!r}.{nearest(entry, modules)}")
        result.update((key, list(ids)) for key in found)
    return result


def input_embedding_name(model: nn.Module) -> str | None:
    """Path of the input embedding: what the model says it is, else the only `nn.Embedding` of its kind."""
    get = getattr(model, "get_input_embeddings", None)
    module = None
    if callable(get):
        try:
            module = get()
        except (NotImplementedError, AttributeError):
            module = None
    for key, candidate in _named_modules(model):
        if module is not None and candidate is module:
            return key
    names = [key for key, m in _named_modules(model) if isinstance(m, nn.Embedding)]
    return next((k for k in names if k.rpartition(".")[2] in ("embed_tokens", "word_embeddings", "wte")), None)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules as targets name them, as they stand in the model now (adapted layers and wrappers included)."""
    yield from targets._adaptable(model)


class Undo:
    """Replacements of submodules that can be taken back."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def replace(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put `new` where the module `name` of `parent` stands."""
        old = parent._modules[name]
        parent._modules[name] = new
        self.later(lambda: parent._modules.__setitem__(name, old))

    def later(self, step: Callable[[], None]) -> None:
        """A step to run if all is taken back."""
        self._steps.append(step)

    def back(self) -> None:
        """Take everything back, last first."""
        while self._steps:
            self._steps.pop()()


def parent_of(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds `key`, and the name in it; adapted layers on the way count as the layers they adapt."""
    parent: Any = model
    *path, name = key.split(".")
    for part in path:
        parent = _inner(parent)._modules[part]
    return _inner(parent), name


def _inner(module: Any) -> nn.Module:
    if isinstance(module, AdaptedLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _inner(module.original_module)
    return module


def inject(
    model: nn.Module,
    config: TargetedConfig,
    adapter_name: str,
    *,
    root: nn.Module | None = None,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    keys: Sequence[str] | None = None,
    create: Callable[..., None] | None = None,
) -> Plan:
    """Add an adapter to a model, in place. If it fails, the model is as it was.

    Args:
        model: The base model, with or without adapters.
        config: A weight method's config; `target_modules` is filled in if it was left to the architecture.
        adapter_name: A new name.
        root: Module that holds tensors which layers share (default: the model).
        low_cpu_mem_usage: Create adapters on the meta device, for a load that follows.
        autocast_adapter_dtype: Train adapters of half precision models in float32.
        keys: Adapt exactly these modules.
        create: Replaces `wrap` (a hook of the tuner classes).

    Raises:
        TargetError: a target does not exist or has no host; or the method has no meaning on it.
        AdapterNameError: the name is taken, or can't be one.
    """
    check_name(adapter_name)
    with bulk():
        return _inject(
            model,
            config,
            adapter_name,
            root or model,
            keys,
            {"meta": low_cpu_mem_usage, "autocast": autocast_adapter_dtype},
            create or wrap,
        )


def _inject(
    model: nn.Module,
    config: TargetedConfig,
    adapter_name: str,
    root: nn.Module,
    keys: Sequence[str] | None,
    options: dict[str, bool],
    create: Callable[..., Any],
) -> Plan:
    method = method_of(config)
    plan = make_plan(model, config, keys)
    check_unmatched(model, config, plan)
    _check_bias(model, config)
    tied = tied_modules(model)
    if method.copies is None:
        _follow_ties(config, method, plan, tied)
    undo = Undo()
    layers, wrappers = whole.adapted(model)
    plan.first = not layers and not wrappers
    disabled = any(module._disable_adapters for module in (*layers, *wrappers))
    frozen = base_parameters(model, wrappers)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        undo.later(lambda: [p.requires_grad_(True) for p in frozen])  # type: ignore[func-returns-value]
        _adapt_layers(model, method, config, adapter_name, plan, undo, root, options, create)
        for key, lead in plan.followers.items():
            leader = _layer_of(_at(model, lead), None)
            wrap(model, config, adapter_name, Target(key, _at(model, key)), {"leader": leader}, undo)
        _train_whole(model, config, adapter_name, plan.whole, tied, undo, options["autocast"])
        _train_tokens(model, config, adapter_name, plan.tokens, tied, undo, **options)
    except BaseException:
        undo.back()
        raise
    if disabled:
        whole.enable_adapters(model, False)
    if not config.inference_mode:
        for _, parameter in bias_parameters(model, config.bias, adapter_name):
            parameter.requires_grad_(True)
    return plan


def base_parameters(model: nn.Module, wrappers: Iterable[AuxiliaryTrainingWrapper] | None = None) -> list[nn.Parameter]:
    """Parameters that require gradients and that no adapter trains: not the copies, nor the biases, of those before."""
    wrappers = whole.wrappers(model) if wrappers is None else wrappers
    theirs = {id(p) for wrapper in wrappers for name in wrapper.names() for p in wrapper.trained(name)}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        theirs.update(id(p) for _, p in bias_parameters(model, getattr(config, "bias", "none"), name))
    every = (p for _, m in whole.walk(model) for p in m._parameters.values() if p is not None)
    return [p for p in every if p.requires_grad and id(p) not in theirs]


def _follow_ties(config: TargetedConfig, method: WeightMethod, plan: Plan, tied: dict[int, list[str]]) -> None:
    """Where targets share a weight and ties are kept: one has the adapter, and all others follow it."""
    for paths in tied.values():
        mine = [t for t in plan.targets if t.parameter is None and t.key in paths]
        others = [p for p in paths if p not in plan.whole]
        if not mine or len(others) < 2:
            continue
        apart = (config._from_file and not method.ties) or not set(paths).isdisjoint(plan.matches.excluded)
        if config.ensure_weight_tying is None and apart:
            config.ensure_weight_tying = False
        partners = [p for p in others if p != mine[0].key]
        if not _keep_tied(config, "the adapter", mine[0].key, partners):
            continue
        if not method.mergeable:
            raise TargetError(
                f"{mine[0].key!r} shares its weight with {partners}, and {method.peft_type} has no weight that they "
                "could share. Set ensure_weight_tying=False to adapt it alone."
            )
        leader = next((t for t in mine if t.host.one_hot), mine[0]).key
        plan.followers.update({path: leader for path in others if path != leader})
    plan.targets = [t for t in plan.targets if t.parameter is not None or t.key not in plan.followers]


def _at(model: nn.Module, key: str) -> nn.Module:
    parent, name = parent_of(model, key)
    return _under_tokens(parent._modules[name])


def _under_tokens(module: Any) -> nn.Module:
    """The layer under the trained rows of an embedding."""
    return module.original_module if isinstance(module, TrainableTokensWrapper) else module


def check_unmatched(model: nn.Module, config: TargetedConfig, plan: Plan) -> None:
    """Raise for entries of a new adapter's lists and patterns that match nothing; warn if the config is a file's.

    Raises:
        TargetError: with the nearest names that there are.
    """
    heads = getattr(config, "_heads", ())
    lost = {name: [e for e in entries if e not in heads] for name, entries in plan.matches.unmatched.items()}
    lost = {name: entries for name, entries in lost.items() if entries}
    if not lost or config.allow_unmatched:
        return
    names = {part for key, _ in targets._adaptable(model) for part in (key, key.rpartition(".")[2]) if part}
    parameters = [n for n, _ in model.named_parameters()]

    def hint(entries: list[str]) -> str:
        held = next((n for n in parameters for e in entries if n.endswith(f".{e}")), None)
        if held is not None and "target_modules" in lost:
            return f" {held!r} is a parameter, not a module: name it in target_parameters."
        return nearest(entries[0].rpartition(".")[2], names) or nearest(entries[0], parameters)

    said = "; ".join(f"{name}: {entries} match nothing in the model.{hint(entries)}" for name, entries in lost.items())
    if config._from_file:
        warnings.warn(said, PeftWarning, stacklevel=5)
        return
    raise TargetError(f"{said} If one list is meant to serve several models, set allow_unmatched=True.")


def _adapt_layers(
    model: nn.Module,
    method: WeightMethod,
    config: TargetedConfig,
    adapter_name: str,
    plan: Plan,
    undo: Undo,
    root: nn.Module,
    options: dict[str, bool],
    create: Callable[..., Any],
) -> None:
    autocast = options["autocast"]
    if method.copies is not None:
        keys, tied = [t.key for t in plan.targets], tied_modules(model)
        if config._from_file and config.ensure_weight_tying is None and any(_partners(tied, key) for key in keys):
            config.ensure_weight_tying = False  # files that say nothing of ties were made without them
        _train_whole(model, config, adapter_name, keys, tied, undo, autocast, method.copies)
        return
    hosts: dict[str, Host] = {}
    for target in plan.targets:
        key = target.key if target.parameter is None else f"{target.key}.{target.parameter}"
        hosts[key] = target.host
        if hosts[key].beside:
            hosts[f"{key}.out_proj"] = Target(f"{key}.out_proj", hosts[key].module.out_proj).host
    method.check_targets(config, hosts)
    _note_layout(config, hosts.values())
    banks, shared = _share(method, config, adapter_name, hosts, root, undo, autocast)
    places = {key: index for index, key in enumerate(hosts)}
    for target in plan.targets:
        key = target.key if target.parameter is None else f"{target.key}.{target.parameter}"
        site = Site(key, places[key], len(hosts), shared)
        create(model, config, adapter_name, target, {"site": site, "banks": banks, **options}, undo)


def _note_layout(config: Any, hosts: Iterable[Host]) -> None:
    """Say in the config how the targeted matrices are stored, for those who read the file; we look at the layers."""
    stored = [host.fan_in_fan_out for host in hosts if host.name == "Linear"]
    if not stored or not hasattr(config, "fan_in_fan_out"):
        return
    if config.fan_in_fan_out and not stored[-1]:
        warnings.warn(
            "fan_in_fan_out is True, but the targets are nn.Linear layers, which store (out, in); it is now False.",
            PeftWarning,
            stacklevel=4,
        )
    config.fan_in_fan_out = stored[-1]


def wrap(
    model: nn.Module, config: Any, adapter_name: str, target: Target, options: dict[str, Any], undo: Undo
) -> AdaptedLayer:
    """Add the adapter to one layer, which becomes an adapted layer if it is none yet."""
    method = method_of(config)
    parent, name = parent_of(model, target.key)
    module = parent._modules[name]
    assert module is not None
    holder = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
    if isinstance(module, ModulesToSaveWrapper):
        raise TargetError(
            f"{target.key!r} is trained whole by another adapter (modules_to_save, LN tuning); it can't be adapted "
            "as well."
        )
    existing = _layer_of(holder.base_layer if holder is not None else module, target.parameter)
    if existing is not None:
        _guard(existing, adapter_name, target.key)
        _take_back(existing, adapter_name, undo)
        existing.add_adapter(adapter_name, config, **options)
        layers = [existing]
    else:
        inner = holder.base_layer if holder is not None else module
        layer = adapt(inner, method, target.key, target.parameter)
        layer._active_adapter = [adapter_name]
        layer.add_adapter(adapter_name, config, **options)
        if holder is not None:
            holder.base_layer = layer
            undo.later(lambda: setattr(holder, "base_layer", inner))
        else:
            undo.replace(parent, name, layer)
        _keep_called(layer, parent, name)
        layers = [layer]
    if layers[0].host.beside:
        layers.append(_wrap_output(layers[0], config, adapter_name, options, undo))
    for layer in layers:
        if not layer._active_adapter:
            layer.set_adapter(adapter_name)
    return layers[0]


def _take_back(layer: AdaptedLayer, adapter_name: str, undo: Undo) -> None:
    """Let `undo` take an adapter out of a layer, however much of it was added."""
    active = layer.active_adapters

    def step() -> None:
        layer._forget(adapter_name)
        layer._active_adapter = active

    undo.later(step)


def _keep_called(layer: AdaptedLayer, parent: nn.Module, name: str) -> None:
    """See to it that torch's transformer layers, which read weights of the layers inside them, see the adapters."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_no_shortcut)
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        layer._uncalled = True


def _no_shortcut(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing; in evaluation, `nn.TransformerEncoderLayer` calls its layers only if one has a hook."""


def _guard(layer: AdaptedLayer, adapter_name: str, key: str) -> None:
    if adapter_name in layer._adapters:
        raise AdapterNameError(
            f"{key!r} has an adapter named {adapter_name!r} already; delete it or choose another name."
        )


def _layer_of(module: nn.Module | None, parameter: str | None) -> AdaptedLayer | None:
    """The adapted layer, among those nested around one module, that adapts this parameter (None: the layer itself)."""
    while isinstance(module, AdaptedLayer):
        if module.__dict__.get("parameter_name") == parameter:
            return module
        module = module.base_layer
    return None


def _wrap_output(layer: AdaptedLayer, config: Any, name: str, options: dict[str, Any], undo: Undo) -> AdaptedLayer:
    """The output projection of an attention layer, adapted beside its input projection."""
    attention: Any = layer.get_base_layer()
    projection = attention.out_proj
    first = options["site"]
    site = replace(first, key=f"{first.key}.out_proj", index=first.index + 1)
    if not isinstance(projection, AdaptedLayer):
        wrapped = adapt(projection, method_of(config), site.key)
        attention._modules["out_proj"] = wrapped
        undo.later(lambda: attention._modules.__setitem__("out_proj", projection))
        projection = wrapped
    _take_back(projection, name, undo)
    projection.add_adapter(name, config, **{**options, "site": site})
    return projection


def _share(
    method: WeightMethod,
    config: Any,
    adapter_name: str,
    hosts: Mapping[str, Host],
    root: nn.Module,
    undo: Undo,
    autocast: bool,
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """What the layers of one adapter share; tensors become banks of the root module."""
    first = next(iter(hosts.values()), None)
    if first is None:
        return {}, {}
    with torch.no_grad():
        shared = method.shared(config, hosts, first.device, adapter_dtype(first.dtype, autocast))
    banks: dict[str, nn.Module] = {}
    for name, value in shared.items():
        if not isinstance(value, (Tensor, nn.ParameterDict, BufferDict)):
            continue
        bank = next((b for layer in whole.layers(root) for n, b in layer._banks.items() if n == name), None)
        if bank is None:
            bank = container(value, saved=False)
            root.add_module(name, bank)
        bank[adapter_name] = value  # type: ignore[index]
        undo.later(lambda bank=bank: bank.__delitem__(adapter_name))  # type: ignore[union-attr]
        banks[name] = bank
    return banks, shared


# ---------------------------------------------------------------- ties


def tied_modules(model: nn.Module) -> dict[int, list[str]]:
    """Modules that share a weight, by the weight's identity: `{id: [paths]}`, only where there are several."""
    found: dict[int, list[str]] = {}
    for key, module in targets._adaptable(model):
        inner = _inner(module)
        weight = _weight_as_it_was(module)
        if weight is not None and isinstance(inner, (nn.Embedding, nn.Linear)):
            found.setdefault(id(weight), []).append(key)
    return {identity: keys for identity, keys in found.items() if len(keys) > 1}


def _weight_as_it_was(module: nn.Module) -> nn.Parameter | None:
    """The weight of a layer under its adapters, merged ones too."""
    kept: nn.Parameter | None = None
    while isinstance(module, (AdaptedLayer, TrainableTokensWrapper)):
        if isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        kept = module._originals.get("parameters", {}).get("weight", kept)  # of several around it, the innermost's
        module = module.base_layer
    return _inner(module)._parameters.get("weight") if kept is None else kept


def _partners(tied: dict[int, list[str]], key: str) -> list[str]:
    return next(([k for k in keys if k != key] for keys in tied.values() if key in keys), [])


def _keep_tied(config: TargetedConfig, what: str, key: str, partners: list[str]) -> bool:
    """Whether what trains at `key` shall train at its partners too; new adapters say so in their config."""
    if config.ensure_weight_tying is None:
        config.ensure_weight_tying = True
    if not config.ensure_weight_tying:
        warnings.warn(
            f"{key!r} shares its weight with {partners}, but ensure_weight_tying is False: {what} changes {key!r} "
            "alone, and after merging the two are no longer tied.",
            PeftWarning,
            stacklevel=4,
        )
    return config.ensure_weight_tying


# ---------------------------------------------------------------- what trains besides


def _train_whole(
    model: nn.Module,
    config: TargetedConfig,
    adapter_name: str,
    keys: list[str],
    tied: dict[int, list[str]],
    undo: Undo,
    autocast: bool,
    cls: type[ModulesToSaveWrapper] = ModulesToSaveWrapper,
) -> None:
    done: dict[str, ModulesToSaveWrapper] = {}
    todo = list(keys)
    for key in keys:
        partners = _partners(tied, key)
        if partners and _keep_tied(config, "modules_to_save", key, partners):
            todo += [p for p in partners if p not in todo]
    for key in todo:
        parent, name = parent_of(model, key)
        module: Any = parent._modules[name]
        source = (
            next((done[p] for p in _partners(tied, key) if p in done), None) if config.ensure_weight_tying else None
        )
        if type(module) is cls:
            wrapper = module
            undo.later(lambda w=wrapper: w.delete_adapter(adapter_name))
            wrapper.update(adapter_name, autocast=autocast)
        else:
            if isinstance(module, AuxiliaryTrainingWrapper):
                raise TargetError(f"{key!r} is trained already in another way, as a {type(module).__name__}.")
            wrapper = cls.around(module)
            wrapper.update(adapter_name, autocast=autocast)
            undo.replace(parent, name, wrapper)
        if source is not None:
            wrapper.modules_to_save[adapter_name].weight = source.modules_to_save[adapter_name].weight
        done[key] = wrapper
        if not wrapper._active_adapter:
            wrapper.set_adapter(adapter_name)


def _train_tokens(
    model: nn.Module,
    config: TargetedConfig,
    adapter_name: str,
    tokens: dict[str, list[int]],
    tied: dict[int, list[str]],
    undo: Undo,
    meta: bool,
    autocast: bool,
) -> None:
    for key, ids in tokens.items():
        first: AdaptedLayer | None = None
        for place in (key, *_partners(tied, key)):
            parent, name = parent_of(model, place)
            module = parent._modules[name]
            assert module is not None
            if isinstance(module, ModulesToSaveWrapper):
                raise TargetError(f"{place!r} can't be in both modules_to_save and trainable_token_indices.")
            options = {"token_indices": ids, "tied_adapter": first, "meta": meta, "autocast": autocast}
            if isinstance(module, TrainableTokensWrapper):
                wrapper = module
                undo.later(lambda w=wrapper: w.delete_adapter(adapter_name))
                wrapper.update(adapter_name, **options)
            else:
                wrapper = TrainableTokensWrapper(module, adapter_name, **options)
                undo.replace(parent, name, wrapper)
            first = first or wrapper.token_adapter
            if not wrapper._active_adapter:
                wrapper.set_adapter(adapter_name)


def train_besides(model: nn.Module, config: Any, adapter_name: str, autocast: bool = True) -> None:
    """Train the config's `modules_to_save` whole, for methods that change no layer."""
    wanted = getattr(config, "modules_to_save", None)
    if not wanted:
        return
    names = targets.Endings(wanted)
    keys = [key for key, _ in _named_modules(model) if key and names.entry(key)]
    undo = Undo()
    try:
        _train_whole(model, _Untied(), adapter_name, keys, {}, undo, autocast)  # type: ignore[arg-type]
    except BaseException:
        undo.back()
        raise


class _Untied:
    """What `_train_whole` reads of a config that knows no ties."""

    ensure_weight_tying = False


def _check_bias(model: nn.Module, config: TargetedConfig) -> None:
    if config.bias == "none":
        return
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    others = [n for n, c in configs.items() if getattr(c, "bias", "none") != "none" and c is not config]
    if others:
        raise StateError(
            f"Adapter {others[0]!r} trains biases of the base model (bias={configs[others[0]].bias!r}); they belong "
            "to the base layers, so only 1 adapter with bias is possible. Set bias='none' for the new one."
        )


def bias_parameters(model: nn.Module, bias: str, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Biases of the base model that an adapter trains, by their names in the state dict.

    Args:
        model: The model.
        bias: What its config says: 'none', 'all', or '<method>_only' for those of the layers that it adapts.
        adapter_name: The adapter.
    """
    if bias == "none":
        return
    adapted = {id(m.get_base_layer()) for m in whole.layers(model) if adapter_name in m.available_adapters}
    inside = {
        id(p)
        for m in model.modules()
        if isinstance(m, AdaptedLayer)
        for k, c in m._modules.items()
        if k != "base_layer" and c is not None
        for p in c.parameters()
    }
    copies = {id(p) for m in model.modules() if isinstance(m, ModulesToSaveWrapper) for p in m.parameters()}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or key != "bias" or id(parameter) in inside or id(parameter) in copies:
                continue
            if bias == "all" or (bias.endswith("_only") and id(module) in adapted):
                yield (f"{name}.{key}" if name else key), parameter


def peft_type_name(config: Any) -> str:
    """The method of a config, as a string."""
    if config.peft_type is None:
        raise ConfigError(f"{type(config).__name__} names no method; use the config class of one, such as LoraConfig.")
    return PeftType(config.peft_type).value
