"""Adapters of a whole model, by name: which are there, active, trainable, merged, and how they come out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from peft.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, check_name
from peft.errors import AdapterNameError, PeftWarning, StateError, nearest
from peft.layer import AdaptedLayer


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, without what adapters put into layers: its cost does not grow with their number."""
    seen: set[int] = set()
    todo = [(prefix, model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        dot = f"{path}." if path else ""
        children = (("base_layer", module.base_layer),) if isinstance(module, AdaptedLayer) else module._modules.items()
        todo.extend((f"{dot}{name}", child) for name, child in reversed(children) if child is not None)


def base_of(model: Any) -> Any:
    """The base model under a PeftModel or a tuner; other models are their own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """All adapted layers of a model."""
    return (m for _, m in walk(model) if isinstance(m, AdaptedLayer))


def wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """All modules of a model that stand for trained copies."""
    return (m for _, m in walk(model) if isinstance(m, AuxiliaryTrainingWrapper))


def copies(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    """All modules of a model that hold copies trained in their place."""
    return (m for _, m in walk(model) if isinstance(m, ModulesToSaveWrapper))


def adapters_in(model: nn.Module) -> list[str]:
    """Names of all adapters that have something in the model, in order of appearance."""
    return _names(*adapted(model))


def adapted(model: nn.Module) -> tuple[list[AdaptedLayer], list[AuxiliaryTrainingWrapper]]:
    """`layers` and `wrappers`, in one walk."""
    found = [m for _, m in walk(model)]
    every = [m for m in found if isinstance(m, AdaptedLayer)]
    return every, [m for m in found if isinstance(m, AuxiliaryTrainingWrapper)]


def _apart(every: Sequence[AdaptedLayer], besides: Sequence[AuxiliaryTrainingWrapper]) -> list[AdaptedLayer]:
    """The layers that are not inside a wrapper, which sees to its own."""
    theirs = _seen_to(besides)
    return [layer for layer in every if id(layer) not in theirs]


def _seen_to(besides: Iterable[AuxiliaryTrainingWrapper]) -> set[int]:
    """The ids of layers that are inside these wrappers."""
    return {id(w.token_adapter) for w in besides if isinstance(w, TrainableTokensWrapper)}


def _names(every: Sequence[AdaptedLayer], besides: Sequence[AuxiliaryTrainingWrapper]) -> list[str]:
    names: dict[str, None] = {}
    for layer in every:
        names.update(layer._adapters)
    for wrapper in besides:
        names.update(dict.fromkeys(wrapper.names()))
    return list(names)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make adapters active in all layers, and trainable unless `inference_mode`.

    Raises:
        AdapterNameError: nothing in the model has such an adapter.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    every, besides = adapted(model)
    there = _names(every, besides)
    for name in names:
        if name not in there and there:
            raise AdapterNameError(f"Adapter {name!r} was not found.{nearest(name, there)} Adapters: {there}.")
    for wrapper in besides:
        if len([n for n in names if n in wrapper.names()]) > 1:
            wrapper.set_adapter(names)  # raises before anything changes
    for layer in _apart(every, besides):
        if layer.merged and layer.merged_adapters != names:
            warnings.warn(
                "Adapters are merged; the merged ones stay in effect until unmerge().", PeftWarning, stacklevel=2
            )
        layer.set_adapter(names, inference_mode)
    for wrapper in besides:
        wrapper.set_adapter(names, inference_mode)
    for bank in _banks(every):
        train_bank(bank, list(bank), False)
        train_bank(bank, names, not inference_mode)


def successors(active: Iterable[str], adapters: Iterable[str], gone: str) -> list[str]:
    """Who is active once an adapter is gone: the others that were, else the first adapter that there is.

    >>> successors(["fr"], ["de", "fr", "it"], "fr"), successors(["fr", "it"], ["de", "fr", "it"], "fr")
    (['de'], ['it'])
    """
    return [n for n in active if n != gone] or [n for n in adapters if n != gone][:1]


def delete_adapter(model: nn.Module, adapter_name: str) -> list[str]:
    """Remove an adapter from all layers; returns the names of the adapters active afterwards.

    Raises:
        StateError: it is merged.
    """
    every, besides = adapted(model)
    for module in (*every, *besides):
        if adapter_name in module.merged_adapters:
            raise StateError(f"Adapter {adapter_name!r} is merged; call unmerge_adapter() before deleting it.")
    active = next((m.active_adapters for m in every), [])
    left = successors(active, _names(every, besides), adapter_name)
    for layer in _apart(every, besides):
        layer._forget(adapter_name)
        if adapter_name in active:
            layer.set_adapter(left)
    for wrapper in besides:
        wrapper.delete_adapter(adapter_name, left)
    for bank in _banks(every):
        if adapter_name in bank:
            del bank[adapter_name]
    return left


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name in all layers, keeping its place in the order.

    Raises:
        AdapterNameError: there is no such adapter, or already one of the new name.
    """
    check_name(new)
    every, besides = adapted(model)
    there = _names(every, besides)
    if old not in there or new in there:
        wrong = f"no adapter {old!r}" if old not in there else f"an adapter {new!r} already"
        raise AdapterNameError(f"There is {wrong}.{nearest(old, there)} Adapters: {there}.")
    for bank in _banks(every):
        if old in bank:
            value = bank[old]
            del bank[old]
            bank[new] = value
    for module in (*_apart(every, besides), *besides):
        module.rename_adapter(old, new)


def banks(model: nn.Module) -> list[Any]:
    """What layers share: per-adapter dicts of the root module."""
    return _banks(layers(model))


def _banks(every: Iterable[AdaptedLayer]) -> list[Any]:
    return list({id(bank): bank for layer in every for bank in layer._banks.values()}.values())


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Run with adapters, or as the base model."""
    for module in (*layers(model), *wrappers(model)):
        module.enable_adapters(enabled)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train, or freeze them."""
    for module in (*layers(model), *wrappers(model)):
        module.set_requires_grad(adapter_names, requires_grad)
    for bank in banks(model):
        train_bank(bank, [adapter_names] if isinstance(adapter_names, str) else adapter_names, requires_grad)


def train_bank(bank: Any, adapter_names: Sequence[str], requires_grad: bool) -> None:
    """Let what the layers of adapters share train, or freeze it."""
    for name in adapter_names:
        if name in bank and isinstance(bank[name], (nn.Parameter, nn.ParameterDict)):
            bank[name].requires_grad_(requires_grad)


def stand_by(model: nn.Module, adapter_name: str, active: Sequence[str]) -> None:
    """Let a new adapter wait to be chosen, in layers too where it is the only one; all others stay as they are."""
    every, besides = adapted(model)
    for module in (*_apart(every, besides), *besides):
        if module.active_adapters == [adapter_name]:
            module.set_adapter(active)
        else:
            module.set_requires_grad(adapter_name, False)
    for bank in _banks(every):
        train_bank(bank, [adapter_name], False)


def unload(
    model: nn.Module,
    merge: bool,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Take all adapters out, after merging them or not; returns the model.

    Raises:
        ValueError: `safe_merge`, and a merged weight is not finite.
    """
    if merge:
        check_merge(model, safe_merge, adapter_names)
        if any(layer.merged and layer._inside is not None for layer in layers(model)):
            merge_all(model, safe_merge, adapter_names)
    else:
        for layer in layers(model):
            if layer.merged:
                layer.unmerge()
    theirs = _seen_to(wrappers(model))
    todo = [
        (key, m)
        for key, m in model.named_modules()
        if isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper)) and id(m) not in theirs
    ]
    turns = range(len(todo))
    for _ in _with_progress(turns, "Merging" if merge else "Unloading") if progress else turns:
        key, module = todo.pop()  # let go of, or all weights would be there twice until the last is merged
        if isinstance(module, AuxiliaryTrainingWrapper):
            left = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        else:
            if merge and (adapter_names or module.active_adapters) and not module.disable_adapters:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", PeftWarning)
                    module.merge(safe_merge, adapter_names)
            left = module.base_layer
        if not key:
            return left
        parent_key, _, name = key.rpartition(".")
        model.get_submodule(parent_key)._modules[name] = left
    _settle_ties(model)
    return model


def merge_all(model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
    """Fold adapters (None: the active ones) into the weights of all layers; of two around one weight, the inner
    first.

    If a layer would refuse, nothing is merged. Raises as `check_merge`.
    """
    check_merge(model, safe_merge, adapter_names)
    every = list(layers(model))
    outer = {id(layer): list(layer.merged_adapters) for layer in every if layer.merged and layer._inside is not None}
    for layer in every:
        if id(layer) in outer:
            layer.unmerge()
    for layer in sorted(every, key=lambda layer: layer._inside is not None):
        names = layer.active_adapters if adapter_names is None else list(adapter_names)
        again = [name for name in outer.get(id(layer), ()) if name not in names]
        layer.merge(safe_merge, [*again, *names])


def check_merge(model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
    """Raise if a layer would refuse to merge, before any has.

    Raises:
        AdapterNameError: nothing in the model has such an adapter.
        UnsupportedError: a method has no weight to merge.
        ValueError: `safe_merge`, and a merged weight is not finite.
    """
    there = adapters_in(model)
    for name in adapter_names or ():
        if name not in there:
            raise AdapterNameError(f"There is no adapter {name!r} to merge.{nearest(name, there)} Adapters: {there}.")
    for module in (*layers(model), *copies(model)):
        module.check_merge(safe_merge, adapter_names)


def _with_progress(items: Sequence[Any], text: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=text)


def _settle_ties(model: nn.Module) -> None:
    """Tie embeddings again that merging left equal; if it parted them, say so in the config, which a reload obeys."""
    config: Any = getattr(model, "config", None)
    get_in: Any = getattr(model, "get_input_embeddings", None)
    get_out: Any = getattr(model, "get_output_embeddings", None)
    if not getattr(config, "tie_word_embeddings", False) or get_in is None or get_out is None:
        return
    one, two = get_in(), get_out()
    if one is None or two is None or one.weight is two.weight:
        return
    if one.weight.shape == two.weight.shape and torch.equal(one.weight, two.weight):
        two.weight = one.weight
    else:
        config.tie_word_embeddings = False
        warnings.warn(
            "Merging gave the input and output embeddings different weights; config.tie_word_embeddings is now False.",
            PeftWarning,
            stacklevel=3,
        )
