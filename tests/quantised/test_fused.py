"""Fused forms over layers that run themselves: equal to the plain path, and lean in what they keep for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft
from peft.autograd import Dropout, costs, overlay
from peft.autograd.dropout import where
from peft.hosts import host_class
from peft.hosts.opaque import SelfRunLinearHost
from peft.testing import Holder, SelfRun, close
from tests.quantised.kit import PARAMS, QUANTISERS, Int8Linear, batch, plain, quantised

CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False),
    "LoRA, dropout": lambda: peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, lora_dropout=0.3),
    "LoRA, bias": lambda: peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, lora_bias=True),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, use_dora=True),
    "DoRA, dropout": lambda: peft.LoraConfig(
        r=2, target_modules=["layer"], init_lora_weights=False, use_dora=True, lora_dropout=0.3
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["layer"], init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["layer"], init_weights=False),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["layer"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["layer"], init_weights=False),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["layer"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["layer"]),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=3, target_modules=["layer"]),
}


class Fresh(SelfRunLinearHost):
    """The host of a layer whose outputs may be written over."""

    types = (f"{__name__}.Own",)
    fresh = True


class Own(SelfRun):
    """Its layer."""


@pytest.fixture(params=["large", "small"])
def size(request, monkeypatch):
    """Inputs count as large ones, which nodes of our own run, or as small ones."""
    monkeypatch.setattr(costs, "SMALL", 0 if request.param == "large" else 1 << 30)
    return request.param


def adapted(config: Any, layer: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Holder(layer.to(dtype)), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def step(model: nn.Module, x: Tensor, fused: bool = True) -> list[Tensor | None]:
    """The output, the input's gradient and those of the parameters."""
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(7)
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(overlay, "run", lambda *_: None)
        y = model(x)
    sources = [t for t in (x, *model.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, sources, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))]


def assert_close(found: list[Any], wanted: list[Any], tolerance: float) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype
        close(one, two, tolerance, "fused and plain")


@pytest.mark.parametrize("kind", [SelfRun, Own])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "dropout" not in name])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_equals_the_plain_path(name, kind, needs_input_gradient, size):
    model = adapted(CONFIGS[name](), kind(12, 8))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=needs_input_gradient)
    found, wanted = step(model, x), step(model, x, fused=False)
    assert_close(found, wanted, 1e-12)
    with torch.no_grad():
        close(model(x), found[0], 1e-12, "with and without gradients")


@pytest.mark.parametrize("kind", [SelfRun, Own])
def test_dropout_leaves_the_mean_and_falls_out_alike_in_backward(kind, monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    layer = kind(12, 8)
    model = adapted(CONFIGS["LoRA, dropout"](), layer)
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    seen = model(x) - layer(x)
    torch.manual_seed(3)
    again = model(x)
    (grad,) = torch.autograd.grad(again.sum(), x)
    lora = model.base_model.model.layer
    delta = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    # Of each input the same elements fell out of the output and of the gradient.
    kept = (grad - layer.weight.sum(0)) / delta.sum(0)
    close(F.linear(x * kept, delta), seen, 1e-9, "dropout")
    assert 0.6 < (kept > 0.5).double().mean() < 0.8
    assert abs(kept.mean() - 1) < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [SelfRun, Own])
@pytest.mark.parametrize("name", ["LoRA, dropout", "DoRA, dropout"])
def test_dropout_equals_the_plain_path_on_the_same_mask(name, kind, bias, monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    model = adapted(CONFIGS[name](), kind(12, 8, bias=bias)).train()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    found = step(model, x)

    def same(module: nn.Dropout, x: Tensor) -> Tensor:
        drawn = Dropout.draw(module.p)
        assert drawn is not None
        return where(x, drawn.mask(x)) * drawn.gain

    monkeypatch.setattr(nn.Dropout, "forward", same)
    assert_close(found, step(model, x, fused=False), 1e-12)


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "TinyLoRA"])
def test_differentiates_twice(name, monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    model = adapted(CONFIGS[name](), Own(6, 4))
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradgradcheck(run, (x, *trained))


def test_autocast_runs_adapters_in_its_dtype_and_keeps_that_of_the_layer(size):
    model = adapted(CONFIGS["LoRA"](), Own(64, 32), torch.float32)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = step(model, x), step(model, x, fused=False)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, wanted, 3e-2)


def kept_for_backward(model: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that a forward pass keeps, beyond parameters and x; and all that it keeps."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in others.items() if pointer not in own), kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make", [lambda: Own(256, 128), lambda: QUANTISERS["of nobody's"].make(nn.Linear(256, 128))])
def test_keeps_the_input_and_thin_things(make, dropout, monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, lora_dropout=dropout)
    layer = make().to(torch.bfloat16) if dropout else make().bfloat16()
    model = peft.get_peft_model(Holder(layer), config)
    x = torch.randn(8, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    bare, _ = kept_for_backward(Holder(layer), x)
    found, kept = kept_for_backward(model, x)
    assert all(t.dtype != torch.float32 or t.numel() <= 4 * 256 for t in kept), "x was cast to the adapter's dtype"
    assert found - bare <= 8 * 64 * 4 * 2, "more than the projection of x is kept"


def test_keeps_no_input_where_a_is_frozen(monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    model = adapted(CONFIGS["LoRA, dropout"](), Own(64, 32), torch.bfloat16).train()
    model.base_model.model.layer.lora_A["default"].weight.requires_grad_(False)
    x = torch.randn(8, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    found, kept = kept_for_backward(model, x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert found <= 8 * 64 * 2 * 2 + 32 * 2 * 4, "more than the projection of x, and B, is kept"


def test_a_fresh_output_is_written_over_and_another_is_not(monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    held: list[Tensor] = []

    class Watched(SelfRun):
        def forward(self, x: Tensor) -> Tensor:
            held.append(super().forward(x))
            return held[-1]

    model = adapted(CONFIGS["LoRA"](), Watched(12, 8))
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    assert held[-1].data_ptr() != y.data_ptr()
    assert torch.equal(held[-1], F.linear(x, *model.base_model.model.layer.base_layer.parameters()))
    monkeypatch.setattr(SelfRunLinearHost, "fresh", True)
    assert model(x).data_ptr() == held[-1].data_ptr()


@pytest.mark.parametrize("q", PARAMS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_inputs_of_every_quantiser(q, dims, dtype, monkeypatch):
    monkeypatch.setattr(costs, "SMALL", 0)
    layer = quantised(q, dtype=dtype)
    if q.backend == "hqq" and dtype != torch.float32:
        pytest.skip("its kernel computes in one dtype")
    host: Any = host_class(layer)
    weight, bias = host(layer).weight().float(), host(layer).bias().float().clone()
    model = peft.get_peft_model(Holder(layer), CONFIGS["LoRA"]())
    lora = model.base_model.model.layer
    with torch.no_grad():
        for p in (lora.lora_A, lora.lora_B):
            p["default"].weight.mul_(0.3)
    delta = (lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight).detach()
    x = batch(dtype=dtype)
    x = (x if dims == 3 else x.flatten(0, 1)).requires_grad_()
    y = model(x)
    into = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y, [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight], into.to(y.dtype))
    wide = x.detach().float().requires_grad_()
    wanted = F.linear(wide, weight + delta, bias)
    tolerance = max(1e-4, 4 * q.noise) if dtype == torch.float32 else 4e-2
    close(y.float(), wanted, tolerance, "output")
    close(grads[0].float(), torch.autograd.grad(wanted, wide, into)[0], tolerance, "gradient of the input")
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in grads[1:])


def test_gradients_pass_where_the_kernel_has_none():
    class Rounding(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward((x * 16).round() / 16)

    layer = Rounding(plain())
    model = peft.get_peft_model(Holder(layer), CONFIGS["LoRA"]())
    x = batch().requires_grad_()
    with torch.no_grad():
        model.base_model.model.layer.lora_B["default"].weight.zero_()
    weight = host_class(layer)(layer).weight()  # type: ignore[misc]
    for run in (model, torch.compile(model.base_model, backend="eager")):
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        close(grad, weight.sum(0).expand_as(grad), 1e-5, "gradient of the input")
