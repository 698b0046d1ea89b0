"""Random sequences of everything that can be done to adapters, against a slow model that only keeps dense matrices.

`Oracle` knows the base model, each adapter alone on a copy of it, and four words of state: which are active, which are
merged, whether all are disabled. After each step the model must compute what the oracle's dense weights compute.
PEFT_EXAMPLES and PEFT_STEPS set how long it looks (defaults 15 and 20); PEFT_SHRINK=1 makes failures short, in minutes.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from peft import LoraConfig, PeftModel, TrainableTokensConfig, registry, whole
from peft.auxiliary import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.errors import ConfigError, PeftError, PeftWarning, StateError, TargetError, UnsupportedError
from peft.layer import AdaptedLayer, Call
from peft.method import WeightMethod
from peft.testing import samples

NAMES = [f"{letter}{i}" for letter in "ab" for i in range(6)] + ["0", "lora_A", "fc"]
PLACES = ("embed", "fc", "conv", "head")


class Tiny(nn.Module):
    """An embedding, a linear layer, a convolution, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(4, 8, (2, 1))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(self.embed(ids)))
        x = self.conv(x.unflatten(-1, (4, 2)).permute(0, 2, 1, 3)).mean(-1).mT  # (batch, tokens - 1, 8)
        return self.head(x + 0.1)


def tiny() -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().double().eval().requires_grad_(False)


@contextmanager
def _quiet_context(context):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        with context as value:
            yield value


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        made = function(*args, **kwargs)
    return _quiet_context(made) if hasattr(made, "__enter__") else made


def _configs() -> list:
    found = []
    for name, method in registry.all_methods().items():
        for config in samples(name) if isinstance(method, WeightMethod) and name != "TRAINABLE_TOKENS" else ():
            for targets in (["fc", "conv"], ["fc"]):
                with contextlib.suppress(ConfigError, TargetError):
                    found.append(replace(config, target_modules=targets))
                    quiet(PeftModel, tiny(), copy.deepcopy(found[-1]))
                    break
                found.pop()
    return found


# Adapters that meet others on one module, in ways of their own.
SPECIAL = [
    LoraConfig(r=2, target_modules=["embed", "fc"], ensure_weight_tying=False),
    LoraConfig(r=2, target_modules=["conv"], modules_to_save=["fc"]),
    LoraConfig(r=2, target_modules=["conv"], trainable_token_indices={"embed": [1, 3]}),
    TrainableTokensConfig(target_modules=["embed"], token_indices=[2, 3], ensure_weight_tying=False),
    LoraConfig(r=2, target_modules=["embed"]),
    LoraConfig(r=2, use_dora=True, target_modules=["head"]),
    TrainableTokensConfig(target_modules=["embed"], token_indices=[3, 4]),
]


IDS = torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(1))


class Oracle:
    """What the model should be."""

    def __init__(self) -> None:
        self.base = tiny()
        self.alone: dict[str, PeftModel] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.disabled = False

    def stack(self) -> list[str]:
        if self.disabled:
            return []
        return [n for n in self.merged if n not in self.active] + self.active

    def merge(self, names: list[str]) -> None:
        order = [n for n in self.active if n in (*self.merged, *names)]
        self.merged = [n for n in dict.fromkeys((*self.merged, *names)) if n not in order] + order

    def delete(self, name: str) -> None:
        del self.alone[name]
        self.active = [n for n in self.active if n != name] or [next(iter(self.alone))]

    def rename(self, old: str, new: str) -> None:
        self.alone = {new if n == old else n: m for n, m in self.alone.items()}
        self.active = [new if n == old else n for n in self.active]
        self.merged = [new if n == old else n for n in self.merged]

    def dense(self, names: list[str], waiting: tuple[str, ...] = ()) -> Tiny:
        """The plain model that a stack of adapters means. Differentiable in their parameters.

        Those that are `waiting` are merged and not active: modules that they trained whole are not in place.
        """
        model = copy.deepcopy(self.base)
        for place in PLACES:
            layers = {name: self.alone[name].base_model.model.get_submodule(place) for name in names}
            rows = {name: m.token_adapter for name, m in layers.items() if isinstance(m, TrainableTokensWrapper)}
            # Trained rows stand around the embedding with all its adapters: they are what is left, in any order.
            layers |= {name: m.base_layer for name, m in rows.items()}
            for name, layer in [*layers.items(), *rows.items()]:
                only = self.only(name)
                if isinstance(layer, AdaptedLayer) and only in layer.available_adapters:
                    self._fold(model.get_submodule(place), layer, only)
                elif isinstance(layer, ModulesToSaveWrapper) and (
                    name not in waiting or type(layer) is not ModulesToSaveWrapper  # LN tuning merges its copies
                ):
                    model._modules[place] = layer.modules_to_save[only]
        return model

    def only(self, name: str) -> str:
        return next(iter(self.alone[name].peft_config))

    @staticmethod
    def _fold(module: nn.Module, layer: AdaptedLayer, name: str) -> None:
        call = Call(layer, layer.host, (), {})
        host = layer.host_cls(module)
        weight, bias = host.weight(), host.bias()
        for update in layer.updates((name,)):
            weight, bias = update.weight(weight, call), update.add_bias(bias, call)
        adjust = host.adjust(weight, host.packed(weight))
        native = host.native(weight)
        for key, value in (("weight", native), ("bias", bias)):
            if value is not None:
                module._parameters.pop(key, None)
                module.__dict__[key] = value
        for key, value in adjust.items():
            setattr(module, key, value)


CONFIGS = st.sampled_from(_configs()) | st.sampled_from(SPECIAL)


class Adapters(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize(target=names, config=CONFIGS, seed=st.integers(0, 9))
    def begin(self, config, seed):
        self.oracle = Oracle()
        self.tolerance, self.rounded = 1e-10, False
        self.seed = seed
        torch.manual_seed(seed)
        self.model = quiet(PeftModel, tiny(), copy.deepcopy(config), "a0").eval()
        self.remember("a0", config)
        self.oracle.active = ["a0"]
        return "a0"

    def remember(self, name: str, config) -> None:
        """Give the oracle its own copy of a new adapter, with values as if it had been trained."""
        draw = torch.Generator().manual_seed(self.seed)
        alone = quiet(PeftModel, tiny(), copy.deepcopy(config), name).eval()
        with torch.no_grad():
            for tensor in trained(self.model, name).values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
            source, target = tensors(self.model, name), tensors(alone, name)
            assert source.keys() == target.keys()
            for key, tensor in target.items():
                tensor.copy_(source[key])
        self.oracle.alone[name] = alone

    # ------------------------------------------------------------ what users do

    @rule(target=names, name=st.sampled_from(NAMES), config=CONFIGS, seed=st.integers(0, 9))
    def add(self, name, config, seed):
        self.seed = seed
        if name in self.oracle.alone:
            with pytest.raises(PeftError):
                quiet(self.model.add_adapter, name, copy.deepcopy(config))
            return name
        torch.manual_seed(seed)
        before = list(self.model.state_dict())
        try:
            quiet(self.model.add_adapter, name, copy.deepcopy(config))
        except (TargetError, StateError):  # a module that one adapter trains whole can't be adapted by another
            assert before == list(self.model.state_dict())
            return "a0"
        self.remember(name, config)
        return name

    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def set(self, chosen):
        chosen = [n for n in chosen if n in self.oracle.alone]
        if not chosen:
            return
        try:
            quiet(self.model.set_adapter, chosen if len(chosen) > 1 else chosen[0])
        except ConfigError:
            assert self.clash(chosen)
            return
        assert not self.clash(chosen)
        self.oracle.active = chosen

    def clash(self, chosen: list[str]) -> bool:
        """Whether two of them train one module whole, or rows of one embedding."""
        wrappers = list(whole.wrappers(self.model))
        return any(len([n for n in chosen if n in w.names()]) > 1 for w in wrappers)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()
        self.oracle.disabled = not enabled

    @rule(chosen=st.none() | st.lists(names, min_size=1, max_size=2, unique=True))
    def merge(self, chosen):
        chosen = None if chosen is None else [n for n in chosen if n in self.oracle.alone]
        if chosen == []:
            return
        wanted = self.oracle.active if chosen is None else chosen
        before = weights(self.model)
        try:
            quiet(self.model.base_model.merge_adapter, chosen)
        except (UnsupportedError, ConfigError):  # depends on the input; or two copies of one module (LN tuning)
            assert all(before[k] is v for k, v in weights(self.model).items())
            return
        self.oracle.merge(wanted)

    @rule()
    def unmerge(self):
        quiet(self.model.base_model.unmerge_adapter)
        self.oracle.merged = []
        for key, value in weights(self.model).items():
            assert torch.equal(value, self.oracle.base.get_parameter(key))

    @rule(name=names)
    def delete(self, name):
        if name not in self.oracle.alone or len(self.oracle.alone) == 1:
            return
        merged = [x.merged_adapters for x in (*whole.layers(self.model), *whole.wrappers(self.model))]
        if name in self.oracle.merged and any(name in names for names in merged):
            with pytest.raises(StateError):
                self.model.delete_adapter(name)
            return
        quiet(self.model.delete_adapter, name)
        self.oracle.merged = [n for n in self.oracle.merged if n != name]
        self.oracle.delete(name)

    @rule(target=names, old=names, new=st.sampled_from(NAMES))
    def rename(self, old, new):
        if old not in self.oracle.alone or new in self.oracle.alone:
            with pytest.raises(PeftError):
                self.model.rename_adapter(old, new)
            return old
        self.model.rename_adapter(old, new)
        self.oracle.rename(old, new)
        return new

    @rule(target=names, name=names, new=st.sampled_from(NAMES), trainable=st.booleans())
    def save_and_load(self, name, new, trainable):
        if name not in self.oracle.alone or new in self.oracle.alone:
            return name
        if self.rounded:  # what follows from the config (a wavelet) is computed anew, and was rounded on the move
            self.tolerance = max(self.tolerance, 1e-5)
        with tempfile.TemporaryDirectory() as folder:
            quiet(self.model.save_pretrained, folder, selected_adapters=[name])
            folder = folder if name == "default" else f"{folder}/{name}"
            fresh = quiet(PeftModel.from_pretrained, tiny(), folder)
            expected = self.oracle.dense([name])(IDS)
            close(fresh(IDS), expected, self.tolerance)
            quiet(self.model.load_adapter, folder, new, is_trainable=trainable)
        alone = quiet(copy.deepcopy, self.oracle.alone[name])
        if new not in alone.peft_config:
            alone.rename_adapter(next(iter(alone.peft_config)), new)
        self.oracle.alone[new] = alone
        return new

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, dtype):
        """There and back: merged or not, nothing may be left behind in another dtype."""
        self.model.to(dtype)
        with torch.no_grad():
            assert self.model(IDS).dtype == dtype
        self.model.to(torch.float64)
        for one in (self.oracle.base, *self.oracle.alone.values()):
            one.to(dtype).to(torch.float64)
        self.rounded |= dtype == torch.float32
        if dtype == torch.float32 and self.oracle.merged:  # the merged weights were rounded, not what they are made of
            self.tolerance = 1e-4

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @precondition(lambda self: not self.oracle.disabled and not self.oracle.merged)
    @rule(seed=st.integers(0, 9))
    def train(self, seed):
        """One step of gradient descent, through the layers and through dense weights."""
        self.model.set_adapter(list(self.oracle.active) if len(self.oracle.active) > 1 else self.oracle.active[0])
        mine = {n: trained(self.model, n) for n in self.oracle.active}
        theirs = {n: trained(self.oracle.alone[n], self.oracle.only(n)) for n in self.oracle.active}
        self.tolerance = max(self.tolerance, min(10 * self.tolerance, 1e-5))  # steps amplify the last bits
        step(self.model(IDS), mine, seed)
        step(self.oracle.dense(self.oracle.stack())(IDS), theirs, seed)

    # ------------------------------------------------------------ what must hold after each step

    @invariant()
    def outputs_agree(self):
        if not hasattr(self, "oracle"):
            return
        with torch.no_grad():
            oracle = self.oracle
            waiting = tuple(name for name in oracle.merged if name not in oracle.active)
            close(self.model(IDS), oracle.dense(oracle.stack(), waiting)(IDS), self.tolerance)
            with quiet(self.model.disable_adapter):
                close(self.model(IDS), self.oracle.base(IDS), 1e-10)

    @rule(chosen=st.lists(names, min_size=1, max_size=2, unique=True))
    def use(self, chosen):
        """Contexts choose for themselves and leave nothing behind."""
        chosen = [n for n in chosen if n in self.oracle.alone]
        if self.clash(chosen):
            return
        with torch.no_grad(), self.model.use(*chosen):
            close(self.model(IDS), self.oracle.dense(chosen)(IDS), self.tolerance)

    @rule(chosen=st.lists(names, min_size=4, max_size=4))
    def mix(self, chosen):
        """A batch in which each sample has its own adapter."""
        chosen = [n if n in self.oracle.alone else "__base__" for n in chosen]
        with torch.no_grad():
            y = self.model(IDS, adapter_names=chosen)
            for i, name in enumerate(chosen):
                alone = self.oracle.dense([] if name == "__base__" else [name])
                close(y[i : i + 1], alone(IDS[i : i + 1]), self.tolerance)

    @invariant()
    def active_ones_are_known(self):
        if hasattr(self, "oracle"):
            assert self.model.active_adapters == self.oracle.active
            assert list(self.model.peft_config) == list(self.oracle.alone)


def step(y: torch.Tensor, parameters: dict[str, dict[str, nn.Parameter]], seed: int) -> None:
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    leaves = list({id(p): p for held in parameters.values() for p in held.values()}.values())
    gradients = torch.autograd.grad((y * towards).mean(), leaves, allow_unused=True)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf -= 0 if gradient is None else 0.1 * gradient


def trained(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that train when it is active, by where they are."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and name in module.available_adapters:
            for slot, value in module.slots(name):
                for i, p in enumerate(value.parameters() if isinstance(value, nn.Module) else [value]):
                    if slot.trains and isinstance(p, nn.Parameter):
                        found[f"{plain(path)}.{slot.name}.{i}"] = p
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.names():
            found |= {f"{plain(path)}.{i}": p for i, p in enumerate(module.trained(name))}
    for bank in whole.banks(model):
        if name in bank:
            held = bank[name]
            parts = held.values() if isinstance(held, nn.ParameterDict) else [held]
            found |= {f"bank.{i}.{tuple(p.shape)}": p for i, p in enumerate(parts) if isinstance(p, nn.Parameter)}
    return {key: p for key, p in found.items() if p.is_floating_point()}


def tensors(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """All tensors of an adapter, by where they are."""
    found: dict[str, torch.Tensor] = dict(trained(model, name))
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and name in module.available_adapters:
            for slot, value in module.slots(name):
                for i, t in enumerate(value.parameters() if isinstance(value, nn.Module) else [value]):
                    found[f"{plain(path)}.{slot.name}.{i}"] = t
            for key, bank in module._banks.items():
                if name in bank and isinstance(bank[name], torch.Tensor):
                    found[f"bank {key}"] = bank[name]
    return found


def plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in ("token_adapter", "base_layer"))


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base model's parameters, by their names in the bare model."""
    found = {}
    for place in PLACES:
        module = model.base_model.model.get_submodule(place)
        while hasattr(module, "base_layer") or hasattr(module, "token_adapter") or hasattr(module, "original_module"):
            module = module._modules.get("base_layer") or module._modules.get("token_adapter") or module.original_module
        found |= {f"{place}.{k}": p for k, p in module._parameters.items() if p is not None}
    return found


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


Adapters.TestCase.settings = settings(
    max_examples=int(os.environ.get("PEFT_EXAMPLES", "15")),
    stateful_step_count=int(os.environ.get("PEFT_STEPS", "20")),
    deadline=None,
    derandomize="PEFT_EXAMPLES" not in os.environ,  # the suite is repeatable; new seeds come with longer searches
    print_blob=True,
    report_multiple_bugs=False,
    phases=tuple(p for p in Phase if p is not Phase.shrink or "PEFT_SHRINK" in os.environ),
    suppress_health_check=list(HealthCheck),
)
TestAdapters = Adapters.TestCase
