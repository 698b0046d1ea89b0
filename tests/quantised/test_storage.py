"""What is particular to one quantiser, and how layers are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft
from peft import LoraConfig
from peft.errors import TargetError
from peft.hosts import host_class
from peft.hosts.embedding import EmbeddingHost
from peft.hosts.linear import LinearHost
from peft.hosts.opaque import OpaqueEmbeddingHost, OpaqueLinearHost, SelfRunLinearHost
from peft.hosts.tensors import PackedConv2dHost, PackedLinearHost
from peft.testing import Holder, SelfRun, close, same, train
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from peft.utils.quantization_utils import resolve_quantization_backend
from tests.quantised.kit import PARAMS, QUANTISERS, Int8Linear, batch, plain, quantised


class Float8Linear(nn.Linear):
    """A subclass of `nn.Linear` whose weight is not what its type says."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__(inner, out)
        self.scale = nn.Parameter(self.weight.detach().abs().amax() / 400)
        self.weight = nn.Parameter((self.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Masked(nn.Module):
    """Has the sizes of a linear layer and a mask of booleans, and packs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 40, 30
        self.kernel = nn.Parameter(torch.ones(30, 40))
        self.register_buffer("mask", torch.ones(30, 40, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("layer", "host"),
    [
        (nn.Linear(4, 3), LinearHost),
        (nn.Linear(4, 3, device="meta"), LinearHost),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 3), LinearHost),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), LinearHost),
        (SelfRun(4, 3), SelfRunLinearHost),
        (Float8Linear(4, 3), OpaqueLinearHost),
        (Int8Linear(nn.Linear(4, 3)), OpaqueLinearHost),
        (nn.Embedding(4, 3), EmbeddingHost),
        (Masked(), None),
        (nn.ReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_are_told_apart_by_what_they_hold_and_do(layer, host):
    assert host_class(layer) is host


def test_a_packed_subclass_of_linear_is_not_read_as_it_stands():
    layer, x = Float8Linear(64, 96), batch()
    weight = host_class(layer)(layer).weight()  # type: ignore[misc]
    close(weight, layer.weight.float() * layer.scale, 1e-6, "weight")
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], use_dora=True))
    close(model(x), layer(x), 1e-5, "outputs at the start")


def test_a_large_bias_takes_nothing_from_the_weight():
    """The weight is found without the bias, beside which it would be rounded away."""
    layer = Int8Linear(plain())
    weight = host_class(layer)(layer).weight()  # type: ignore[misc]
    layer.bias = torch.full((96,), 1e6)
    same(host_class(layer)(layer).weight(), weight, "weights under biases")  # type: ignore[misc]


def test_a_layer_without_sizes_says_so():
    layer = Float8Linear(4, 3)
    del layer.in_features
    with pytest.raises(TargetError, match="in_features and out_features"):
        host_class(layer)(layer).weight()  # type: ignore[misc]


@pytest.mark.parametrize("q", PARAMS)
def test_dequantising_by_the_names_of_hf_peft(q):
    layer = quantised(q)
    weight = host_class(layer)(layer).weight()  # type: ignore[misc]
    same(dequantize_module_weight(layer), weight, "weights")
    backend = resolve_quantization_backend(layer)
    assert backend is not None
    assert backend.backend == q.backend
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None
    if q.needs == "bitsandbytes":
        found: Any = layer.weight
        same(dequantize_bnb_weight(found, getattr(layer, "state", None)), weight, "weights")


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "bitsandbytes NF4, scales in 32 bits"])
def test_weights_repacked_for_the_cpu_are_read_trained_and_merged_right(name):
    """In evaluation mode bitsandbytes lays 4-bit weights out anew for some CPUs, and has no backward there."""
    pytest.importorskip("bitsandbytes")
    layer = quantised(QUANTISERS[name])
    host: Any = host_class(layer)
    weight = host(layer).weight()
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        model(batch())
    close(host(layer).weight(), weight, 4e-3, "weights before and after the first call in evaluation mode")
    x = batch().requires_grad_()
    found = torch.autograd.grad(model(x).sum(), x)[0]
    close(found, model.base_model.model.layer.effective()[0].sum(0).expand_as(found), 4e-3, "gradient of the input")
    with torch.no_grad():
        wanted = model.base_model.model.layer.effective()[0]
        model.merge_adapter()
        close(model.base_model.model.layer.host.weight(), wanted, 0.12, "merged weight")
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match="dequantize_module_weight"):
            dequantize_bnb_weight(layer.weight)  # type: ignore[arg-type]


def test_a_call_below_merged_adapters_leaves_the_kept_weight_whole():
    """A stack of which the upper part is merged runs on the kept weight, which the first call may pack anew."""
    pytest.importorskip("bitsandbytes")
    layer = quantised(QUANTISERS["bitsandbytes NF4"])
    before = host_class(layer)(layer).weight()  # type: ignore[misc]
    turning = peft.OFTConfig(target_modules=["layer"], oft_block_size=8, init_weights=False)
    model = peft.get_peft_model(Holder(layer), turning)
    model.add_adapter("above", LoraConfig(target_modules=["layer"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "above"])
    model.eval()
    with torch.no_grad():
        model.merge_adapter(["above"])
        y = model(batch())
        model.unmerge_adapter()
        close(model(batch()), y, 4e-3, "while merged and after")
    close(host_class(layer)(layer).weight(), before, 4e-3, "weights before and after")  # type: ignore[misc]


def test_8_bit_layers_that_quantise_in_each_call():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=True).requires_grad_(False).eval()
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False)).eval()
    x = batch()
    with torch.no_grad():
        y = model(x)
        model.merge_adapter()
        close(model(x), y, 0.03, "merged and not")
        model.unmerge_adapter()
        same(model(x), y, "before and after")


@pytest.mark.parametrize("cls", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_bitsandbytes_before_they_are_quantised(cls):
    """Their weight is quantised when it is moved; adapters may be put there earlier."""
    bnb = pytest.importorskip("bitsandbytes")
    options = {"has_fp16_weights": False} if cls == "Linear8bitLt" else {}
    layer = getattr(bnb.nn, cls)(64, 96, **options).requires_grad_(False)
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False))
    adapted = model.base_model.model.layer
    assert type(adapted).__name__ == cls
    same(adapted.host.weight(), layer.weight.detach().as_subclass(Tensor), "weights")
    before = adapted.effective()[0]
    model.to("cpu")
    close(adapted.effective()[0], before, 0.15, "weights before and after quantising")
    assert not adapted.host.raw.is_floating_point()


def test_quantised_convolutions():
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    layer = quanto.nn.QConv2d.from_module(nn.Conv2d(4, 8, 3, padding=1), weights=quanto.qint8)
    layer.freeze()
    layer.requires_grad_(False)
    assert host_class(layer) is PackedConv2dHost
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False)).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        y = model(x)
        weight, _ = model.base_model.model.layer.effective()
        close(y, nn.functional.conv2d(x, weight.view(8, 4, 3, 3), layer.bias, padding=1), 1e-5, "running and merging")
        model.merge_adapter()
        close(model(x), y, 0.03, "merged and not")
        model.unmerge_adapter()
        same(model(x), y, "before and after")


def test_quantised_embeddings():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Embedding8bit(12, 64).to("cpu").requires_grad_(False)
    assert host_class(layer) is OpaqueEmbeddingHost
    model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], r=2))
    train(model)
    ids = torch.arange(12)
    with torch.no_grad():
        weight, _ = model.base_model.model.layer.effective()
        close(model(ids), weight.mT, 1e-5, "running and merging")


def test_embeddings_with_weights_of_torchao():
    ao = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Embedding(12, 64)).requires_grad_(False)
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=ao.PerAxis(0))
    ao.quantize_(holder, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    model = peft.get_peft_model(holder, LoraConfig(target_modules=["0"], init_lora_weights=False))
    ids = torch.arange(12)
    with torch.no_grad():
        y = model(ids)
        weight, _ = model.base_model.model[0].effective()
        close(y, weight.mT, 1e-6, "running and merging")
        model.merge_adapter()
        close(model(ids), y, 0.03, "merged and not")
        model.unmerge_adapter()
        same(model(ids), y, "before and after")


def test_preparing_a_quantised_model_raises_norms_and_not_what_kernels_read():
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.norm, self.layer, self.config = nn.LayerNorm(64), layer, {}

    for name in ("of nobody's", "bitsandbytes NF4", "torchao int8"):
        q = QUANTISERS[name]
        if q.needs != "torch":
            pytest.importorskip(q.needs)
        model = Model(q.make(plain())).bfloat16()
        held = {n: (type(p), p.dtype) for n, p in model.named_parameters()}
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        raised = torch.bfloat16 if name == "of nobody's" else torch.float32  # its kernel might refuse float32
        assert model.norm.weight.dtype == raised
        assert not any(p.requires_grad for p in model.parameters())
        if "layer.weight" in held:
            assert (type(model.layer.weight), model.layer.weight.dtype) == held["layer.weight"]


def test_a_weight_of_torchao_keeps_its_settings_when_merged():
    ao = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(plain())
    ao.quantize_(holder, ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=ao.PerGroup(32)))
    assert host_class(holder[0]) is PackedLinearHost
    model = peft.get_peft_model(holder, LoraConfig(target_modules=["0"], init_lora_weights=False))
    old: Any = model.base_model.model[0].base_layer.weight
    model.merge_adapter()
    new: Any = model.base_model.model[0].base_layer.weight
    assert type(new) is type(old)
    for setting in ("block_size", "target_dtype", "dtype", "activation_quantization"):
        assert getattr(new, setting) == getattr(old, setting)


def test_fingerprints_know_quantised_layers_by_their_plain_names_and_shapes():
    from peft.checkpoint.fingerprint import compare
    from peft.checkpoint.state import base_sketch

    sketches = []
    for layer in (plain(), Int8Linear(plain())):
        model = peft.get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"]))
        sketches.append(base_sketch(model, "default"))
    assert [(d.what, d.name) for d in compare(*sketches)] == [("precision", "layer.weight")]  # type: ignore[misc]
