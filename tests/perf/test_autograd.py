"""The fused nodes: equal to the plain path in values and gradients, and lean in what they keep."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import peft
from peft import LoraConfig, PeftModel, autograd, get_peft_model, plans
from peft.autograd import costs
from peft.autograd.dropout import keep, where

CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=3, target_modules=["lin"]),
    "LoRA with bias": lambda: LoraConfig(r=3, target_modules=["lin"], lora_bias=True),
    "LoRA, biases train": lambda: LoraConfig(r=3, target_modules=["lin"], bias="lora_only"),
    "DoRA": lambda: LoraConfig(r=3, target_modules=["lin"], use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["lin"]),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["lin"]),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["lin"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["lin"]),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=["lin"]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["lin"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["lin"]),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=["lin"]),
    "IA3": lambda: peft.IA3Config(target_modules=["lin"], feedforward_modules=[]),
    "IA3, feedforward": lambda: peft.IA3Config(target_modules=["lin"], feedforward_modules=["lin"]),
    "RoAd": lambda: peft.RoadConfig(group_size=4, target_modules=["lin"]),
    "BEFT": lambda: peft.BeftConfig(target_modules=["lin"]),
    "MiSS": lambda: peft.MissConfig(r=2, target_modules=["lin"]),
    "FRoD": lambda: peft.FrodConfig(sparse_rate=0.1, target_modules=["lin"]),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=3, target_modules=["lin"]),
    "PSOFT": lambda: peft.PsoftConfig(r=3, target_modules=["lin"]),
}
A_FROZEN = ("LoRA", "LoRA with bias", "DoRA", "VeRA", "TinyLoRA", "PSOFT", "FRoD")
"""Methods whose first factor is not trained, or may be frozen (LoRA-FA)."""


class One(nn.Module):
    def __init__(self, inner: int, out: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(inner, out, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def adapted(
    config: Any, dtype: torch.dtype = torch.float64, inner: int = 12, out: int = 8, bias: bool = True
) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(One(inner, out, bias, dtype), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def step(model: nn.Module, x: Tensor, plain: bool = False, seed: int = 0, run: Any = None) -> list[Tensor | None]:
    """The output, the input's gradient and those of the parameters."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(autograd.Form, "run", lambda *_: None)
        y = (run or model)(x)
        y.backward(torch.ones_like(y) + torch.arange(y.numel()).view(y.shape).to(y) / y.numel())
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * (1 + two.abs().max().item()))


def with_dropout(config: Any, rate: float) -> Any:
    """The config, with dropout of the input if there is a field for it."""
    field = next((f for f in vars(config) if f.endswith("_dropout") and f != "module_dropout"), None)
    if rate and field is None:
        pytest.skip("no dropout of the input")
    if rate:
        setattr(config, field, rate)
    return config


def freeze_down(model: nn.Module) -> None:
    """Freeze A, as LoRA-FA does."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


@pytest.fixture
def fused_calls(monkeypatch):
    """Whether a fused form ran, for each time that one was asked for, as it goes on."""
    calls: list[bool] = []
    run, form = autograd.Form.run, plans.Plan.form.fget

    def asked(plan: plans.Plan) -> Any:
        found = form(plan)  # type: ignore[misc]
        calls.extend([False] if found is None else [])
        return found

    def counting(*args: Any) -> Any:
        y = run(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(autograd.Form, "run", counting)
    monkeypatch.setattr(plans.Plan, "form", property(asked))
    return calls


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The inputs of these tests are small; they are treated as large ones unless a test says otherwise."""
    monkeypatch.setattr(costs, "SMALL", 0)


@pytest.fixture
def small(monkeypatch, large):
    monkeypatch.setattr(costs, "SMALL", 1 << 30)


@pytest.fixture
def beside(monkeypatch, large):
    """Inputs count as few beside the weight."""
    monkeypatch.setattr(costs, "_BESIDE", 0)


@pytest.mark.parametrize("needs_input_gradient", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_path(name, needs_input_gradient, fused_calls):
    model = adapted(CONFIGS[name]())
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=needs_input_gradient)
    found = step(model, x)
    assert fused_calls == [True], "this form should be fused"
    assert_equal(found, step(model, x, plain=True), 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_path_in_bfloat16(name):
    model = adapted(CONFIGS[name](), torch.bfloat16)
    x = torch.randn(2, 5, 12, dtype=torch.bfloat16, requires_grad=True)
    assert_equal(step(model, x), step(model, x, plain=True), 4e-2)


@pytest.mark.parametrize("size", ["small", "beside"])
@pytest.mark.parametrize("name", CONFIGS)
def test_small_inputs_equal_the_plain_path(name, size, request, fused_calls):
    request.getfixturevalue(size)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 4e-2)):
        model = adapted(CONFIGS[name](), dtype)
        x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
        assert_equal(step(model, x), step(model, x, plain=True), tolerance)
    assert fused_calls == [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_inference_equals_the_plain_path(name, dtype, monkeypatch):
    model = adapted(CONFIGS[name](), dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-12
    with torch.no_grad():
        found = []
        for limit in (0, 1 << 30):
            monkeypatch.setattr(costs, "SMALL", limit)
            found.append(model(x))
        monkeypatch.setattr(autograd.Form, "run", lambda *_: None)
        wanted = model(x)
    assert_equal(found, [wanted, wanted], tolerance)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_shapes(inner, out, rank, batch, bias):
    for dora in (False, True):
        model = adapted(LoraConfig(r=rank, target_modules=["lin"], use_dora=dora), inner=inner, out=out, bias=bias)
        x = torch.randn(*batch, inner, dtype=torch.float64, requires_grad=True)
        assert_equal(step(model, x), step(model, x, plain=True), 1e-11)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa", "OFT", "SHiRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, dtype):
    model = adapted(CONFIGS[name](), torch.float32)
    x = torch.randn(4, 12, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = step(model, x), step(model, x, plain=True)
    assert found[0] is not None
    assert found[0].dtype == torch.bfloat16
    assert_equal(found, wanted, 4e-2)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "C3A", "FRoD"])
def test_can_be_differentiated_twice(name):
    model = adapted(CONFIGS[name]())
    results = []
    for plain in (False, True):
        x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(autograd.Form, "run", lambda *_: None)
            (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
            model.zero_grad()
            first.square().sum().backward()
        results.append([first.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert_equal(results[0], results[1], 1e-11)


# dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_repeats_itself_and_keeps_its_rate(rate, dtype):
    x = torch.ones(300, 301, dtype=dtype)
    dropout = autograd.Dropout(rate, seed=7)
    mask = dropout.mask(x)
    assert torch.equal(mask, dropout.mask(x))
    kept = keep(x, mask)
    assert torch.equal(kept, (kept != 0).to(dtype)), "elements are whole or nothing"
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=0.006)
    assert dropout.gain * (1 - rate) == pytest.approx(1 if rate < 1 else 0, abs=1e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_equals_the_plain_path_on_the_same_mask(dora, monkeypatch):
    model = adapted(LoraConfig(r=3, target_modules=["lin"], lora_dropout=0.4, use_dora=dora)).train()
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    found = step(model, x, seed=3)

    def same(module: nn.Dropout, x: Tensor) -> Tensor:
        dropout = autograd.Dropout.draw(module.p)
        assert dropout is not None
        return where(x, dropout.mask(x)) * dropout.gain

    monkeypatch.setattr(nn.Dropout, "forward", same)
    assert_equal(found, step(model, x, plain=True, seed=3), 1e-12)


def test_dropout_differs_between_calls_and_is_off_in_evaluation():
    model = adapted(LoraConfig(r=3, target_modules=["lin"], lora_dropout=0.5)).train()
    x = torch.randn(6, 12, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LoRA", "LoRA-FA", "DoRA", "OFT", "VeRA", "TinyLoRA"])
def test_gradient_checkpointing_replays_dropout(name, reentrant):
    config = CONFIGS[name.removesuffix("-FA")]()
    model = adapted(config if name == "OFT" else with_dropout(config, 0.3)).train()
    if name == "LoRA-FA":
        freeze_down(model)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    found = step(model, x, run=lambda t: checkpoint(model, t, use_reentrant=reentrant))
    assert_equal(found, step(model, x), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", A_FROZEN)
def test_a_frozen_first_factor_changes_no_gradient(name, dropout, monkeypatch, fused_calls):
    model = adapted(with_dropout(CONFIGS[name](), dropout)).train()
    freeze_down(model)

    def same(module: nn.Dropout, x: Tensor) -> Tensor:
        drawn = autograd.Dropout.draw(module.p)
        return x if drawn is None else where(x, drawn.mask(x)) * drawn.gain

    monkeypatch.setattr(nn.Dropout, "forward", same)
    results = []
    for plain in (False, True):
        x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        results.append(step(model, x, plain, seed=3))
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(autograd.Form, "run", lambda *_: None)
            torch.manual_seed(3)
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            first = torch.autograd.grad(model(x).pow(3).sum(), wanted, create_graph=True)
            model.zero_grad()
            sum(g.square().sum() for g in first).backward()
        results[-1] += [g.detach() for g in first] + [x.grad, *(p.grad for p in model.parameters())]
    assert all(fused_calls)
    assert_equal(results[0], results[1], 1e-10)


# what is kept


def kept(run: Any, model: nn.Module) -> int:
    """Bytes kept for backward that are not parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(s.nbytes() for s in found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("DoRA", "LoRA with bias", "RoAd", "FRoD")])
def test_keeps_the_input_and_nothing_else(name, dropout):
    config = CONFIGS[name]()
    if dropout:
        if not isinstance(config, LoraConfig):
            pytest.skip("no dropout of this name")
        config.lora_dropout = dropout
    model = adapted(config, torch.bfloat16, inner=16, out=16).train()
    x = torch.randn(999, 16, dtype=torch.bfloat16, requires_grad=True)
    # what methods derive from their parameters before the node may be kept; nothing else of the size of tokens or
    # weights
    adapter = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert kept(lambda: model(x), model) <= x.untyped_storage().nbytes() + adapter


def test_keeps_what_the_middle_of_a_product_sees_in_place_of_the_input():
    model = adapted(CONFIGS["FRoD"](), torch.bfloat16, inner=64, out=64)
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    entries = (16 + 4) * sum(p.numel() for p in model.parameters() if p.requires_grad)  # places and values
    assert kept(lambda: model(x), model) <= x.untyped_storage().nbytes() + entries


@pytest.mark.parametrize("name", ["LoRA", "TinyLoRA"])
def test_nothing_waits_for_the_garbage_collector(name):
    model = adapted(CONFIGS[name]())
    freeze_down(model)
    gc.collect()
    gc.disable()
    try:
        for run in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
            x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
            y = run(x * 1)
            kept = weakref.ref(y.grad_fn)
            y.sum().backward()
            del y
            assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", [n for n in A_FROZEN if n not in ("DoRA", "FRoD")])
def test_keeps_what_a_frozen_first_factor_makes_in_place_of_the_input(name, dropout):
    model = adapted(with_dropout(CONFIGS[name](), dropout), torch.bfloat16, inner=64, out=64).train()
    freeze_down(model)
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    made = 4 * 64 * 64  # what methods derive from their parameters has at most a weight's size
    assert kept(lambda: model(x), model) <= x.untyped_storage().nbytes() // 8 + made


def test_projections_of_one_input_share_what_they_keep():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), self.k(x)

    model = get_peft_model(Two(), LoraConfig(r=2, target_modules=["q", "k"]))
    x = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    assert kept(lambda: model(x), model) == x.untyped_storage().nbytes()


# where the plain path must run


def test_hooks_on_the_base_layer_are_called():
    model = adapted(CONFIGS["LoRA"]())
    called = []
    model.get_base_model().lin.base_layer.register_forward_hook(lambda *_: called.append(1))
    model(torch.randn(2, 12, dtype=torch.float64))
    assert called


def test_function_transforms():
    model = adapted(CONFIGS["LoRA"]())
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 12, dtype=torch.float64)

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_several_adapters_run_as_one():
    model = adapted(CONFIGS["LoRA"]())
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["lin"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert_equal(step(model, x), step(model, x, plain=True), 1e-12)


# samples with their own adapters


@pytest.mark.parametrize("grad", [True, False])
def test_mixed_batches_equal_single_ones(grad):
    model = adapted(CONFIGS["LoRA"]())
    model.add_adapter("wide", LoraConfig(r=5, lora_alpha=7, target_modules=["lin"], init_lora_weights=False))
    model.eval()
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    names = ["default", "wide", "__base__", "wide", "default"]
    with nullcontext() if grad else torch.no_grad():
        found = model(x, adapter_names=names)
        for row, name in enumerate(names):
            with model.use(*([] if name == "__base__" else [name])):
                torch.testing.assert_close(found[row], model(x[row]), rtol=1e-12, atol=1e-12)


def test_mixed_batches_train_each_adapter_on_its_rows():
    model = adapted(CONFIGS["LoRA"]())
    model.add_adapter("wide", LoraConfig(r=5, target_modules=["lin"], init_lora_weights=False))
    model.set_requires_grad(["default", "wide"])
    x = torch.randn(4, 12, dtype=torch.float64)
    results = []
    for batched in (True, False):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if not batched:
                patch.setattr(autograd, "mixed", lambda *_: None)
            model(x, adapter_names=["default", "wide", "wide", "default"]).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert_equal(results[0], results[1], 1e-12)


def test_mixed_batches_follow_every_change_of_an_adapter():
    model = adapted(CONFIGS["LoRA"]())
    model.add_adapter("wide", LoraConfig(r=5, target_modules=["lin"], init_lora_weights=False))
    model.eval()
    layer, x = model.get_base_model().lin, torch.randn(2, 12, dtype=torch.float64)
    fresh = nn.Linear(12, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.lora_B["wide"].weight.mul_(2),
            lambda: layer.scaling.__setitem__("wide", 0.3),
            lambda: setattr(layer.lora_A["wide"].weight, "data", torch.randn(5, 12, dtype=torch.float64)),
            lambda: setattr(layer.lora_A["wide"], "weight", nn.Parameter(torch.randn(5, 12, dtype=torch.float64))),
            lambda: layer.lora_A.__setitem__("wide", fresh),
            lambda: layer.base_layer.weight.add_(0.1),
        ):
            model(x, adapter_names=["default", "wide"])
            change()
            found = model(x, adapter_names=["default", "wide"])
            for row, name in enumerate(("default", "wide")):
                weight, bias = layer.effective((name,))
                torch.testing.assert_close(
                    found[row], nn.functional.linear(x[row], weight, bias), rtol=1e-12, atol=1e-12
                )


def test_norms_are_kept_in_inference_until_something_changes():
    model = adapted(CONFIGS["DoRA"]()).eval()
    layer, x = model.get_base_model().lin, torch.randn(3, 12, dtype=torch.float64)

    def wanted() -> Tensor:
        weight, bias = layer.effective()
        return nn.functional.linear(x, weight, bias)

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.lora_B["default"].weight.mul_(2),
            lambda: layer.scaling.__setitem__("default", 0.3),
            lambda: layer.base_layer.weight.add_(0.1),
            lambda: setattr(layer.lora_A["default"].weight, "data", torch.randn(3, 12, dtype=torch.float64)),
        ):
            model(x)
            change()
            torch.testing.assert_close(model(x), wanted(), rtol=1e-12, atol=1e-12)


def test_norms_in_training_follow_a_weight_that_changes_without_a_trace():
    model = adapted(CONFIGS["DoRA"]()).train()
    layer, x = model.get_base_model().lin, torch.randn(3, 12, dtype=torch.float64)
    model(x)
    layer.base_layer.weight.data.mul_(3)
    weight, bias = layer.effective()
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.eval()(x)
        layer.base_layer.weight.data.mul_(3)
        weight, bias = model.eval().get_base_model().lin.effective()  # eval() and train() drop what is kept
        torch.testing.assert_close(model(x), nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
