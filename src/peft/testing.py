"""The contract suite: what every method must do, on every kind of layer. For this library's methods and for yours.

    from peft.testing import check_method, samples

    for config in samples("MYMETHOD"):
        print(check_method(config))

Each cell, a config on a kind of layer, goes through all checks: the law (running with adapters equals running the
merged weights, alone, stacked, and partly merged), gradients against the dense form, the start, names, saving and
loading, merging and unmerging, adapters side by side, deletion, renaming, disabling, moves, copies, compilation,
gradient checkpointing, autocast, fake tensors. A method may refuse a kind of layer by raising `TargetError`,
`ConfigError` or `UnsupportedError` when it is put there; the cell is then recorded as refused, with the reason.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peft import inject, registry, whole
from peft.config import TargetedConfig
from peft.errors import ConfigError, StateError, TargetError, UnsupportedError
from peft.layer import AdaptedLayer
from peft.method import WeightMethod, method_of
from peft.model import PeftModel

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest relative error (of the norm) between running and merging, by dtype."""

# ---------------------------------------------------------------- kinds of layers


class Holder(nn.Module):
    """A model of one layer, `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SelfAttention(Holder):
    """`Holder` of an attention layer, called as self-attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class Two(nn.Module):
    """Two layers of different sizes, one after the other: `first.layer` and `second.layer`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Holder(nn.Linear(8, 12)), Holder(nn.Linear(12, 24, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Matrix(nn.Module):
    """A module with a bare parameter `weight` (out, in)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class Experts(Matrix):
    """A module with a stack of expert matrices `weight` (experts, out, in), all applied to the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...eo", x, self.weight)


@dataclass(frozen=True)
class Place:
    """A kind of layer to put adapters on.

    Args:
        build: Makes a model; what is adapted in it is called `layer` (or is `layer.weight`).
        shape: Shape of its input: batch first.
        vocabulary: For inputs that are indices: how many there are.
        parameter: Whether the target is the parameter `layer.weight` and not the module `layer`.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 5, 8)
    vocabulary: int = 0
    parameter: bool = False

    def target(self, config: TargetedConfig) -> TargetedConfig:
        """The config with this place as its target."""
        changes: dict[str, Any] = {"target_modules": None if self.parameter else ["layer"]}
        if self.parameter:
            if "target_parameters" not in {f.name for f in fields(config)}:
                raise TargetError(f"{type(config).__name__} has no target_parameters.")
            changes |= {"target_modules": [], "target_parameters": ["layer.weight"]}
        return replace(config, **changes)

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """A batch of three."""
        draw = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(0, self.vocabulary, self.shape, generator=draw)
        return torch.randn(self.shape, generator=draw, dtype=torch.float64).to(dtype)


class SelfRun(nn.Linear):
    """A linear layer that runs itself, as quantised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Holder(Conv1D(12, 8))


PLACES: dict[str, Place] = {
    "Linear": Place(lambda: Holder(nn.Linear(8, 12))),
    "Linear, square, no bias": Place(lambda: Holder(nn.Linear(8, 8, bias=False))),
    "two Linears": Place(Two),
    "Linear that runs itself": Place(lambda: Holder(SelfRun(8, 12))),
    "Conv1D (transformers)": Place(_conv1d_of_transformers),
    "Conv1d": Place(lambda: Holder(nn.Conv1d(4, 8, 3, padding=1)), (3, 4, 6)),
    "Conv2d": Place(lambda: Holder(nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular")), (3, 4, 6, 6)),
    "Conv2d, 1x1": Place(lambda: Holder(nn.Conv2d(8, 12, 1)), (3, 8, 4, 4)),
    "Conv2d, groups": Place(lambda: Holder(nn.Conv2d(4, 8, 3, groups=2)), (3, 4, 5, 5)),
    "Conv2d, dilation": Place(lambda: Holder(nn.Conv2d(4, 8, (2, 3), dilation=2)), (3, 4, 6, 6)),
    "Conv3d": Place(lambda: Holder(nn.Conv3d(4, 8, 2)), (3, 4, 3, 3, 3)),
    "Embedding": Place(lambda: Holder(nn.Embedding(12, 8)), (3, 5), 12),
    "MultiheadAttention": Place(lambda: SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True))),
    "Parameter, 2-D": Place(lambda: Holder(Matrix(12, 8)), parameter=True),
    "Parameter, 3-D": Place(lambda: Holder(Experts(3, 12, 8)), parameter=True),
}
"""Kinds of layers by name. Add your own before calling `check_method`."""

# ---------------------------------------------------------------- the report


@dataclass
class Cell:
    """One config on one kind of layer: what it passed, or why it was refused."""

    place: str
    passed: list[str] = field(default_factory=list)
    refused: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.place:<26} refused: {self.refused}"
        text = f"{self.place:<26} {len(self.passed)} passed"
        text += "".join(f", without {name} ({why})" for name, why in self.left_out.items())
        return text + "".join(f", FAILED {name} ({why})" for name, why in self.failed.items())


@dataclass
class Report:
    """What `check_method` found."""

    peft_type: str
    options: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    @property
    def supported(self) -> list[str]:
        """Names of the kinds of layers that the method works on."""
        return [cell.place for cell in self.cells if not cell.refused and not cell.failed]

    @property
    def failures(self) -> list[str]:
        """One line per broken promise: method × layer × check, and what was found."""
        return [
            f"{self.peft_type} {self.options or ''} × {cell.place} × {name}: {why}"
            for cell in self.cells
            for name, why in cell.failed.items()
        ]

    def __str__(self) -> str:
        head = f"{self.peft_type} {self.options}" if self.options else self.peft_type
        return "\n".join([head, *(f"  {cell}" for cell in self.cells)])


# ---------------------------------------------------------------- running it


def samples(peft_type: str) -> list[TargetedConfig]:
    """Small configs of a method, one per variant: those that it names in `WeightMethod.samples`."""
    cls = registry.config_class(peft_type)
    return [cls(**options) for options in registry.method(peft_type).samples]


def check_method(
    config: TargetedConfig, *, hosts: Iterable[str] | None = None, checks: Iterable[str] | None = None
) -> Report:
    """Put a method on every kind of layer and hold it to its contract.

    Args:
        config: A small config of the method; its targets are replaced. Layers have sides of 8, 12 and 24.
        hosts: Names of kinds of layers (`PLACES`); None: all.
        checks: Names of checks (`CHECKS`); None: all.

    Returns:
        What passed and what was refused.

    Raises:
        AssertionError: a promise is broken; one line for each, with method × layer × check.
        ConfigError: the config is not one of a weight method, or there is no layer or check of that name.

    Example:
        >>> from peft import LoraConfig
        >>> from peft.testing import check_method
        >>> print(check_method(LoraConfig(r=2), hosts=["Linear"], checks=["law", "names"]))
        LORA {'r': 2}
          Linear                     2 passed
    """
    method = method_of(config)
    if not isinstance(method, WeightMethod):
        raise ConfigError(f"{type(config).__name__} configures no weight method; the contract is about those.")
    report = Report(method.peft_type, _options(config))
    for name in _known(hosts, PLACES, "kind of layer"):
        report.cells.append(_try(config, name, _known(checks, CHECKS, "check")))
    if report.failures:
        raise AssertionError("\n".join(report.failures))
    return report


def _known(names: Iterable[str] | None, known: dict[str, Any], what: str) -> list[str]:
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"There is no {what} {name!r}. There are: {', '.join(map(repr, known))}.")
    return chosen


def _options(config: TargetedConfig) -> dict[str, Any]:
    plain = type(config)().to_dict() if _has_defaults(config) else {}
    return {k: v for k, v in config.to_dict().items() if v != plain.get(k) and not k.startswith("target_")}


def _has_defaults(config: TargetedConfig) -> bool:
    try:
        type(config)()
    except (ConfigError, TypeError):
        return False
    return True


def _try(config: TargetedConfig, name: str, checks: list[str]) -> Cell:
    cell, trial = Cell(name), Trial(config, PLACES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial.adapted()
        except (TargetError, ConfigError, UnsupportedError) as refusal:
            cell.refused = str(refusal)
            return cell
        except ImportError as missing:
            cell.refused = f"needs {missing.name}"
            return cell
        except Exception as error:
            cell.failed["injection"] = _reason(error)
            return cell
        for check in checks:
            try:
                CHECKS[check](trial)
            except UnsupportedError as refusal:
                cell.left_out[check] = str(refusal)
            except Exception as error:
                cell.failed[check] = _reason(error)
            else:
                cell.passed.append(check)
    return cell


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) < 400 else f"{text[:300]} … {text[-90:]}"
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


class Trial:
    """A config on a kind of layer, from which checks make models: always the same weights and inputs."""

    def __init__(self, config: TargetedConfig, place: Place) -> None:
        self.config = config
        self.place = place
        self.method = method_of(config)

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The bare model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.place.build().to(dtype).eval()

    def adapted(
        self, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("default",), trained: bool = True
    ) -> PeftModel:
        """The model with adapters of these names, all active, with values as if they had been trained.

        Of methods that train copies of modules the last one is active: a module can't be two.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = PeftModel(self.base(dtype), self.place.target(copy.deepcopy(self.config)), names[0])
            for name in names[1:]:
                model.add_adapter(name, self.place.target(copy.deepcopy(self.config)))
        for seed, name in enumerate(names):
            model.set_adapter(name)
            if trained:
                train(model, seed)
        if len(names) > 1 and self.method.copies is None:
            model.set_adapter(list(names))
        return model.eval()

    def input(self, dtype: torch.dtype = torch.float32, gradient: bool = False) -> Tensor:
        """A batch; with `gradient`, one that gradients reach."""
        x = self.place.input(dtype)
        return x.requires_grad_() if gradient and x.is_floating_point() else x

    def needs_merging(self) -> None:
        """Leave the check out for methods that have no weight to merge."""
        if not self.method.mergeable:
            raise UnsupportedError("depends on the input")


def train(model: nn.Module, seed: int = 0, amount: float = 0.1) -> None:
    """Add noise to all parameters that train, as if steps had been taken."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter += (amount * noise).to(parameter.dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise unless the relative error, of the norm, is within the tolerance."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"{what} differ by {error:.1e}, relatively; allowed are {tolerance:.0e}"


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless two tensors are equal bit for bit."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert torch.equal(actual, expected), f"{what} differ; they should be equal bit for bit"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise unless two states hold the same tensors under the same names."""
    assert list(actual) == list(expected), f"{what}: tensors {sorted(set(actual) ^ set(expected))} come or go"
    for name, tensor in expected.items():
        same(actual[name], tensor, f"{what}: {name}")


def merged(model: PeftModel) -> nn.Module:
    """A plain model with the active adapters in its weights; `model` stays as it is."""
    return copy.deepcopy(model).base_model.merge_and_unload()


# ---------------------------------------------------------------- checks

CHECKS: dict[str, Callable[[Trial], None]] = {}
"""The promises by name."""


def _check(name: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CHECKS[name] = torch.no_grad()(function) if "gradient" not in name and name not in _BACKWARD else function
        return function

    return register


_BACKWARD = ("compile", "autocast", "fake tensors")


@_check("law")
def _law(t: Trial) -> None:
    """Running with the adapter is running the merged weights; and it is not running the base model."""
    for dtype, tolerance in TOLERANCE.items():
        model, x = t.adapted(dtype), t.input(dtype)
        y = model(x)
        assert y.dtype == dtype, f"outputs are {y.dtype}, not {dtype}"
        assert not torch.equal(y, t.base(dtype)(x)), "a trained adapter changes nothing"
        if t.method.mergeable:
            close(y, merged(model)(x), tolerance, f"running and merging ({dtype})")


@_check("stacks")
def _stacks(t: Trial) -> None:
    """Two adapters together: running, merging one, the other or both, in either order, give one output."""
    t.needs_merging()
    if t.method.copies is not None:
        raise UnsupportedError("one copy of a module is active at a time")
    model, x = t.adapted(torch.float64, ("one", "two")), t.input(torch.float64)
    tolerance = 10 * TOLERANCE[torch.float64]
    for order in (["one", "two"], ["two", "one"]):
        model.set_adapter(order)
        y = model(x)
        for chosen in (["one"], ["two"], order, order[::-1]):
            model.base_model.merge_adapter(chosen)
            close(model(x), y, tolerance, f"{order} active: outputs before and after merging {chosen}")
            model.base_model.unmerge_adapter()
        close(merged(model)(x), y, tolerance, f"{order} active: running and unloading")


@_check("gradients")
def _gradients(t: Trial) -> None:
    """Gradients of the way it runs are those of the dense weights; every parameter that trains gets one."""
    model, x = t.adapted(torch.float64), t.input(torch.float64, gradient=True)
    leaves = [x] if x.requires_grad else []
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    found = torch.autograd.grad((y * towards).sum(), [*named.values(), *leaves], allow_unused=True)
    unused = [name for name, gradient in zip(named, found, strict=False) if gradient is None]
    assert not unused, f"no gradient reaches {unused}"
    if not t.method.mergeable:
        return
    with dense(model):
        y = model(x)
    expected = torch.autograd.grad((y * towards).sum(), [*named.values(), *leaves], allow_unused=True)
    for name, one, two in zip([*named, "the input"], found, expected, strict=False):
        assert two is not None, f"no gradient of the dense form reaches {name}"
        close(one, two, 1e-9, f"gradients of {name}, running and dense,")


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run all adapted layers on the dense weights that their stacks mean, differentiably."""

    def run(layer: AdaptedLayer, x: Any, *args: Any, **kwargs: Any) -> Any:
        weight, bias = layer.effective()
        return layer.host.act(weight, bias, x, *args, **kwargs)

    layers = list(whole.layers(model))
    for layer in layers:
        layer.__dict__["forward"] = run.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


@_check("start")
def _start(t: Trial) -> None:
    """An untrained adapter is the identity where the method says so."""
    if not t.method.identity_at_start(t.config):
        raise UnsupportedError("starts elsewhere")
    for dtype in (torch.float64, torch.float32):
        x = t.input(dtype)
        y = t.adapted(dtype, trained=False)(x)
        close(y, t.base(dtype)(x), 100 * TOLERANCE[dtype], f"outputs of the base model and at the start ({dtype})")


@_check("names")
def _names(t: Trial) -> None:
    """What trains is what the slots say, under their names; nothing of the base model does."""
    model = t.adapted(names=("one", "default"))
    model.set_adapter("default")
    declared: set[int] = set()
    for layer in whole.layers(model):
        for slot, value in layer.slots("default"):
            parameters = list(value.parameters()) if isinstance(value, nn.Module) else [value]
            for parameter in parameters:
                assert parameter.requires_grad == (slot.trains and isinstance(parameter, nn.Parameter)), (
                    f"{slot.name} {'is frozen' if slot.trains else 'trains'}"
                )
            declared |= {id(p) for p in parameters if slot.trains}
        banks: list[Any] = list(layer._banks.values())
        shared = [bank["default"] for bank in banks if "default" in bank]
        declared |= {id(p) for held in shared for p in (held.parameters() if isinstance(held, nn.Module) else [held])}
    for copies in whole.copies(model):
        assert all(p.requires_grad for p in copies.trained("default")), "a copy is frozen"
        declared |= {id(p) for p in copies.trained("default")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) in declared, f"{name} trains, but is no slot of the active adapter"
            assert "default" in name.split("."), f"{name} does not name its adapter"
    assert declared, "nothing trains"


@_check("save and load")
def _save(t: Trial) -> None:
    """A saved adapter on a fresh base model gives the same tensors and outputs, bit for bit."""
    model, x = t.adapted(), t.input()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(t.base(), folder)
        again = PeftModel.from_pretrained(t.base(), folder, is_trainable=True)
    same_state(state_of(loaded), state_of(model), "tensors saved and loaded")
    same(loaded(x), model(x), "outputs of the saved and the loaded model")
    assert not any(p.requires_grad for p in loaded.parameters()), "an adapter loaded for inference trains"
    wanted, found = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert wanted == found, f"loaded to go on training, {sorted(wanted ^ found)} differ in whether they train"


@_check("merge and unmerge")
def _merge(t: Trial) -> None:
    """Unmerging restores every bit, in every dtype."""
    t.needs_merging()
    for dtype in TOLERANCE:
        model, x = t.adapted(dtype), t.input(dtype)
        before, y = state_of(model), model(x)
        model.base_model.merge_adapter(safe_merge=True)
        close(model(x), y, TOLERANCE[dtype], f"outputs before and after merging ({dtype})")
        model.base_model.unmerge_adapter()
        same_state(state_of(model), before, f"tensors before merging and after unmerging ({dtype})")
        same(model(x), y, f"outputs before merging and after unmerging ({dtype})")


@_check("several adapters")
def _several(t: Trial) -> None:
    """Adapters don't disturb each other, whichever is active; samples of one batch may have their own."""
    model, x = t.adapted(names=("one", "two")), t.input()
    outputs = {}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        y = model(x)
        same(outputs.setdefault(name, y), y, f"outputs of {name!r} before and after a change of adapter")
    assert not torch.equal(outputs["one"], outputs["two"]), "the second adapter gives the outputs of the first"
    mixed = model(x, adapter_names=["two", "__base__", "one"])
    expected = torch.stack([outputs["two"][0], t.base()(x)[1], outputs["one"][2]])
    close(mixed, expected, TOLERANCE[torch.float32], "outputs of a mixed batch and of each adapter alone")


@_check("deletion")
def _deletion(t: Trial) -> None:
    """A deleted adapter leaves nothing, and the others as they were."""
    model, x = t.adapted(names=("one", "two")), t.input()
    model.set_adapter("two")
    y = model(x)
    model.delete_adapter("one")
    left = [name for name in model.state_dict() if "one" in name.split(".")]
    assert not left, f"{left} are left of the deleted adapter"
    same(model(x), y, "outputs before and after the deletion of another adapter")
    same(model.base_model.unload()(x), t.base()(x), "outputs of the base model and of what unload() left")


@_check("renaming")
def _renaming(t: Trial) -> None:
    """A renamed adapter is the same one."""
    model, x = t.adapted(), t.input()
    y = model(x)
    whole.rename_adapter(model, "default", "renamed")
    same(model(x), y, "outputs before and after renaming")
    left = [name for name in model.state_dict() if "default" in name.split(".")]
    assert not left, f"{left} keep the old name"
    whole.rename_adapter(model, "renamed", "default")
    same_state(state_of(model), state_of(t.adapted()), "tensors after renaming there and back")


@_check("disabling")
def _disabling(t: Trial) -> None:
    """Without adapters the base model runs, bit for bit, merged or not."""
    model, x = t.adapted(), t.input()
    y, base = model(x), t.base()(x)
    with model.disable_adapter():
        same(model(x), base, "outputs of the base model and of the disabled adapter")
    same(model(x), y, "outputs before and after disabling")
    if t.method.mergeable:
        model.base_model.merge_adapter()
        with model.disable_adapter():
            same(model(x), base, "outputs of the base model and of the disabled merged adapter")


@_check("moves")
def _moves(t: Trial) -> None:
    """The model can change its dtype, go to the meta device, and get its adapter there."""
    x = t.input()
    y = t.adapted()(x)
    wide = t.adapted().double()(t.input(torch.float64))
    close(wide, y, 1e-4, "outputs in float64 and float32")
    narrow = t.adapted().to(torch.bfloat16)(t.input(torch.bfloat16))
    close(narrow, y, 2 * TOLERANCE[torch.bfloat16], "outputs in bfloat16 and float32")
    for model in (
        t.adapted().to("meta"),
        PeftModel(t.base().to("meta"), t.place.target(copy.deepcopy(t.config))),
    ):
        assert model(x.to("meta")).shape == y.shape, "outputs on the meta device have another shape"


@_check("late weights")
def _late(t: Trial) -> None:
    """An adapter loaded onto a meta device is whole once the base weights come, or was refused."""
    model, x = t.adapted(), t.input()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            late = PeftModel.from_pretrained(t.base().to("meta"), folder)
            _fill(late.get_base_model(), t.base().requires_grad_(False))
            y = late(x)
        except StateError as refusal:
            raise UnsupportedError(str(refusal)) from None
    close(y, model(x), TOLERANCE[torch.float32], "outputs with base weights before and after loading")


def _fill(adapted: nn.Module, base: nn.Module) -> None:
    """Give an adapted model the tensors of a bare one, as loading with `assign=True` does."""
    for path, module in base.named_modules():
        place = inject._inner(inject._at(adapted, path) if path else adapted)
        place._parameters.update(module._parameters)
        place._buffers.update(module._buffers)


@_check("copies")
def _copies(t: Trial) -> None:
    """A deep copy and a pickle compute the same and share nothing."""
    model, x = t.adapted(), t.input()
    y = model(x)
    for how, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        same(twin(x), y, f"outputs of a model and of its {how}")
        twin.set_adapter("default")
        train(twin, 3)
        same(model(x), y, f"outputs before and after training the {how}")


@_check("compile")
def _compile(t: Trial) -> None:
    """torch.compile takes forward and backward whole."""
    torch._dynamo.reset()
    model, x = t.adapted(), t.input()
    compiled = torch.compile(model.base_model, backend="aot_eager", fullgraph=True)
    close(compiled(x), model(x), TOLERANCE[torch.float32], "outputs with and without torch.compile")
    _same_gradients(model, lambda: compiled(x), lambda: model(x), "with and without torch.compile")


@_check("gradient checkpointing")
def _checkpointing(t: Trial) -> None:
    """Recomputing the forward pass in the backward one changes no gradient."""
    model, x = t.adapted().train(), t.input()
    _same_gradients(model, lambda: checkpoint(model, x, use_reentrant=False), lambda: model(x), "with and without it")


def _same_gradients(model: nn.Module, one: Callable[[], Any], two: Callable[[], Tensor], what: str) -> None:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for run in (one, two):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            found.append(torch.autograd.grad(run().square().sum(), list(named.values()), allow_unused=True))
    for name, a, b in zip(named, *found, strict=True):
        if a is None or b is None:
            assert a is b, f"{what}, a gradient reaches {name} or not"
        else:
            close(a, b, 1e-4, f"gradients of {name} {what}")


@_check("autocast")
def _autocast(t: Trial) -> None:
    """Under autocast outputs have the dtype that the base model's have, and gradients are finite."""
    model, x = t.adapted(), t.input()
    with torch.autocast("cpu", torch.bfloat16):
        base, y = t.base()(x), model(x)
    assert y.dtype == base.dtype, f"outputs are {y.dtype}, those of the base model {base.dtype}"
    close(y, model(x), 2 * TOLERANCE[torch.bfloat16], "outputs with and without autocast")
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite under autocast"


@_check("fake tensors")
def _fake(t: Trial) -> None:
    """Injection, forward and backward pass run without any data, for planning memory."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = PeftModel(t.place.build(), t.place.target(copy.deepcopy(t.config)))
        shape = t.place.shape
        x = torch.zeros(shape, dtype=torch.long) if t.place.vocabulary else torch.randn(shape)
        model(x).sum().backward()
        assert any(p.grad is not None for p in model.parameters()), "no gradient under FakeTensorMode"
