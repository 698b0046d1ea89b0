"""What the tests ask of a PEFT library. Public API only, so that the same lines run on ours and on the reference.

Every action takes and returns plain values (numbers, strings, tensors), because they cross a process boundary.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pydoc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import peft
from tests import models

ACTIONS: dict[str, Callable[..., Any]] = {}


def action(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function one that a side can be asked for by name."""
    ACTIONS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Config:
    """A config by the name of its class, so that a case can be written without either library."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        options = {k: v.make() if isinstance(v, Config) else v for k, v in self.options.items()}
        return getattr(peft, self.kind)(**options)


@dataclass(frozen=True)
class Case:
    """An adapter on a model: `extra` are further keyword arguments of the forward pass (task ids and the like)."""

    name: str
    model: str
    config: Config
    extra: dict[str, Any] = field(default_factory=dict)
    mergeable: bool = True

    def run(self, model: nn.Module) -> torch.Tensor:
        return models.run(model, models.example(self.model), **self.extra)


def perturb(model: nn.Module, std: float = 0.05) -> None:
    """Move every trainable parameter by noise that depends on its name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))


def describe(model: nn.Module) -> dict[str, Any]:
    """What a user can see of a freshly adapted model."""
    return {
        "class": type(model).__name__,
        "trainable": {
            name: (tuple(parameter.shape), str(parameter.dtype))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
        "parameters": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "scaling": {
            name: {adapter: float(value) for adapter, value in module.scaling.items()}
            for name, module in model.named_modules()
            if isinstance(getattr(module, "scaling", None), dict) and module.scaling
        },
        "state_dict": {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()},
    }


def adapt(case: Case, **options: Any) -> nn.Module:
    """The case's model with its adapter, initialised from a fixed random state, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(models.build(case.model), case.config.make(), **options).eval()


@action
def birth(case: Case) -> dict[str, Any]:
    """Adapt the case's model; describe it, and say how far its output is from the bare model's."""
    base = models.run(models.build(case.model), models.example(case.model))
    model = adapt(case)
    output = case.run(model)
    change = (output - base).abs().max().item() if output.shape == base.shape else None
    return {**describe(model), "change": change}


@action
def write(case: Case, directory: str) -> dict[str, torch.Tensor]:
    """Adapt, disturb, save; returns the output before and after merging."""
    model = adapt(case)
    perturb(model)
    output = case.run(model)
    model.save_pretrained(directory)
    return {"output": output, **_merged(case, model)}


@action
def read(case: Case, directory: str, **options: Any) -> dict[str, torch.Tensor]:
    """Load the adapter in `directory`; returns the output before and after merging."""
    model = peft.PeftModel.from_pretrained(models.build(case.model), directory, **options).eval()
    return {"output": case.run(model), **_merged(case, model)}


def _merged(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    return {"merged": case.run(model.merge_and_unload())} if case.mergeable else {}


@action
def error(name: str, *args: Any, **kwargs: Any) -> list[str]:
    """The names of the builtin exceptions that an action's failure is an instance of; empty if it does not fail."""
    try:
        ACTIONS[name](*args, **kwargs)
    except Exception as problem:
        return [kind.__name__ for kind in type(problem).__mro__ if kind.__module__ == "builtins"]
    return []


@action
def several(case: Case, names: list[str], active: list[str] | str, directory: str) -> dict[str, Any]:
    """Several adapters of one config on one model, some active: output, status, and what is written."""
    model = adapt(case, adapter_name=names[0])
    for name in names[1:]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(name.encode()))
            model.add_adapter(name, case.config.make())
    model.eval()
    for name in names:
        model.set_adapter(name)
        perturb(model)
    (model.base_model if isinstance(active, list) else model).set_adapter(active)
    outputs = {"output": case.run(model)}
    with model.disable_adapter():
        outputs["disabled"] = case.run(model)
    model.save_pretrained(directory)
    return {**outputs, "trainable": sorted(n for n, p in model.named_parameters() if p.requires_grad)}


@action
def read_several(case: Case, places: dict[str, str], active: list[str] | str) -> dict[str, torch.Tensor]:
    """Load adapters by name from their directories; the output with `active` of them."""
    first, *others = places
    model = peft.PeftModel.from_pretrained(models.build(case.model), places[first], adapter_name=first)
    for name in others:
        model.load_adapter(places[name], adapter_name=name)
    (model.base_model if isinstance(active, list) else model).set_adapter(active)
    model.eval()
    return {"output": case.run(model), **_merged(case, model)}


@action
def mixed_batch(case: Case, places: dict[str, str], adapter_names: list[str]) -> dict[str, torch.Tensor]:
    """One batch in which each sample names its adapter (`__base__`: none)."""
    first, *others = places
    model = peft.PeftModel.from_pretrained(models.build(case.model), places[first], adapter_name=first)
    for name in others:
        model.load_adapter(places[name], adapter_name=name)
    inputs = models.example(case.model, batch=len(adapter_names))
    return {"output": models.run(model.eval(), inputs, adapter_names=adapter_names, **case.extra)}


@action
def combine(case: Case, places: dict[str, str], weights: list[float], **options: Any) -> dict[str, Any]:
    """`add_weighted_adapter` over adapters from their directories; output, tensors, scaling of the result."""
    first, *others = places
    model = peft.PeftModel.from_pretrained(models.build(case.model), places[first], adapter_name=first)
    for name in others:
        model.load_adapter(places[name], adapter_name=name)
    torch.manual_seed(0)
    model.add_weighted_adapter(list(places), weights, "sum", **options)
    model.set_adapter("sum")
    model.eval()
    state = peft.get_peft_model_state_dict(model, adapter_name="sum")
    return {"output": case.run(model), "state_dict": {k: tuple(v.shape) for k, v in state.items()}}


@action
def inject(case: Case) -> dict[str, Any]:
    """`inject_adapter_in_model` on the bare model: names, state dict, and whether it is the same object."""
    model = models.build(case.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        injected = peft.inject_adapter_in_model(case.config.make(), model)
    return {**describe(injected), "same_object": injected is model, "configs": list(injected.peft_config)}


@action
def status(case: Case) -> dict[str, Any]:
    """`get_model_status` and `get_layer_status` of a freshly adapted model, as dictionaries."""
    model = adapt(case)
    layers = peft.get_layer_status(model)
    return {"model": vars(peft.get_model_status(model)), "layers": [vars(layer) for layer in layers]}


@action
def config_json(config: Config) -> dict[str, Any]:
    """`to_dict` of a config, enums and sets made plain."""

    def plain(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        return getattr(value, "value", value)

    return {key: plain(value) for key, value in config.make().to_dict().items()}


@action
def signature(path: str) -> list[tuple[str, str, str]]:
    """Name, kind and default of each parameter of a function or class given by its dotted path."""

    def shown(default: Any) -> str:
        if default is inspect.Parameter.empty:
            return "required"
        return default.__name__ if isinstance(default, type) else repr(getattr(default, "value", default))

    parameters = inspect.signature(pydoc.locate(path)).parameters.values()
    return [(p.name, p.kind.name, shown(p.default)) for p in parameters]


@action
def call(expression: str, **names: Any) -> Any:
    """Evaluate an expression in the presence of `peft`, `torch` and `models`: for facts too small for an action."""
    return eval(expression, {"peft": peft, "torch": torch, "models": models, **names})


def perform(name: str, *args: Any, **kwargs: Any) -> Any:
    """Run one action by name, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        return ACTIONS[name](*args, **kwargs)
