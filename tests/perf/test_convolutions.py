"""The fused forms of convolutions: equal to the plain path in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft
from peft import LoraConfig, PeftModel, autograd, get_peft_model
from peft.hosts import conv

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 5, 6)),
    "2d, groups, strides": (lambda: nn.Conv2d(8, 12, 3, stride=2, groups=4), (2, 8, 7, 8)),
    "2d, reflected": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False), (2, 8, 5, 6)),
    "1d": (lambda: nn.Conv1d(8, 12, 3, dilation=2), (2, 8, 11)),
    "3d": (lambda: nn.Conv3d(8, 4, 2), (2, 8, 3, 4, 3)),
}
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["0"]),
    "LoRA with bias": lambda: LoraConfig(r=4, target_modules=["0"], lora_bias=True),
    "LoRA with dropout": lambda: LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5),
    "DoRA": lambda: LoraConfig(r=4, target_modules=["0"], use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["0"]),
    "SHiRA": lambda: peft.ShiraConfig(r=1, target_modules=["0"]),
}


def adapted(config: Any, layer: Any, dtype: torch.dtype = torch.float64) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer()).to(dtype).requires_grad_(False), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def step(model: PeftModel, x: Tensor, plain: bool = False, twice: bool = False) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(autograd, "can_fuse", lambda _: False)
        y = model(x)
        weights = torch.arange(y.numel()).view(y.shape).to(y) / y.numel()
        found = torch.autograd.grad(y, sources, weights, create_graph=twice, allow_unused=True)
        if twice:
            square: Any = sum(g.square().sum() for g in found if g is not None)
            found = (*found, *torch.autograd.grad(square, sources, allow_unused=True))
    return [y.detach(), *(g for g in found if g is not None)]


@pytest.fixture(params=[0, 1 << 16], ids=["large", "small"])
def size(request, monkeypatch):
    """Inputs as they are dealt with where calls cost more than arithmetic, and where they don't."""
    monkeypatch.setattr(conv, "SMALL", request.param)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_path(name, layer, size):
    make, shape = LAYERS[layer]
    model, x = adapted(CONFIGS[name](), make), torch.randn(shape, dtype=torch.float64)
    found, wanted = step(model, x), step(model, x, plain=True)
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    model.eval()
    with torch.no_grad():
        quick = model(x)
    torch.testing.assert_close(quick, step(model, x, plain=True)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", ["2d", "2d, groups, strides"])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa"])
def test_equals_the_plain_path_in_bfloat16(name, layer, size):
    make, shape = LAYERS[layer]
    model, x = adapted(CONFIGS[name](), make, torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16)
    for one, two in zip(step(model, x), step(model, x, plain=True), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * (1 + two.abs().max().item()))


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_can_be_differentiated_twice(name, size):
    make, shape = LAYERS["2d"]
    model, x = adapted(CONFIGS[name](), make), torch.randn(shape, dtype=torch.float64)
    for one, two in zip(step(model, x, twice=True), step(model, x, plain=True, twice=True), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa"])
def test_memory_formats(name, size):
    make, shape = LAYERS["2d"]
    model, x = adapted(CONFIGS[name](), make), torch.randn(shape, dtype=torch.float64)
    wanted = step(model, x)
    found = step(model, x.to(memory_format=torch.channels_last))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_one_sample_without_a_batch():
    model, x = adapted(CONFIGS["LoRA"](), LAYERS["2d"][0]), torch.randn(8, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[None])[0])


def test_dense_updates_run_one_convolution(monkeypatch):
    model, x = adapted(CONFIGS["LoHa"](), LAYERS["2d"][0]), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    calls, run = [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: calls.append(1) or run(*a, **k))
    model(x)
    assert len(calls) == 1


def test_hooks_on_the_base_layer_are_called(size):
    model, x = adapted(CONFIGS["LoRA"](), LAYERS["2d"][0]), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    wanted, seen = model(x), []
    model.get_base_model()[0].get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), wanted)
    assert seen


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Tripled(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 3 * weight, bias)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa"])
@pytest.mark.parametrize("kind", [Standardised, Tripled])
def test_subclasses_with_a_forward_of_their_own_run_by_it(name, kind, size):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(8, 12, 3, padding=1)).double(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    wanted = model(x)
    config = CONFIGS[name]()
    if name == "LoHa":
        config.init_weights = True
    torch.testing.assert_close(get_peft_model(model, config)(x), wanted)
