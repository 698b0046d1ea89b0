"""What is done with adapters, on quantised layers: written once for all layers, so one method speaks for the others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.errors import UnsupportedError
from peft.hosts import host_class
from peft.testing import Holder, SelfRun, close, same, train
from tests.quantised.kit import PARAMS, WRITABLE, Quantiser, batch, plain, quantised


class Two(nn.Module):
    """A quantised layer and a head that is not."""

    def __init__(self, q: Quantiser) -> None:
        super().__init__()
        self.layer, self.head = quantised(q), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


def adapted(q: Quantiser, **options: Any) -> PeftModel:
    torch.manual_seed(5)
    model = peft.get_peft_model(Two(q), LoraConfig(**{"r": 4, "target_modules": ["layer"], **options}))
    train(model)
    with torch.no_grad():
        model.eval()(batch())  # after it 4-bit weights lie as they will in each further call
    return model


@pytest.mark.parametrize("q", PARAMS)
def test_all_linear_finds_it_and_status_names_it(q):
    model = adapted(q, target_modules="all-linear")
    assert model.targeted_module_names == ["layer", "head"]
    assert [s.quantization_backend for s in model.get_layer_status()] == [q.backend, None]
    assert adapted(q).get_model_status().quantization_backend == q.backend
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("q", PARAMS)
def test_adapters_come_and_go(q):
    model, x = adapted(q), batch()
    base = Two(q).eval()
    base.head.load_state_dict(model.base_model.model.head.state_dict())
    with torch.no_grad():
        base(x)
        y = model(x)
        with model.disable_adapter():
            same(model(x), base(x), "outputs of the base model")
        model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
        model.set_adapter("other")
        assert not torch.equal(model(x), y)
        model.delete_adapter("other")
        model.set_adapter("default")
        same(model(x), y, "outputs before and after another adapter")
        same(model.unload()(x), base(x), "outputs without adapters")


@pytest.mark.parametrize("q", PARAMS)
def test_mixed_batches_run_each_sample_on_its_adapter(q):
    model, x = adapted(q), batch()
    model.add_adapter("wide", LoraConfig(r=9, target_modules=["layer"], init_lora_weights=False))
    with torch.no_grad():
        alone = []
        for name in ("wide", "default"):
            model.set_adapter(name)
            alone.append(model(x))
        with model.disable_adapter():
            alone.append(model(x))
        found = model(x, adapter_names=["default", "__base__", "wide"])
    wanted = torch.stack([alone[1][0], alone[2][1], alone[0][2]])
    close(found, wanted, max(1e-5, q.noise), "mixed and alone")


@pytest.mark.parametrize("q", PARAMS)
def test_files_fit_the_plain_model_and_back(q, tmp_path):
    model, x = adapted(q, modules_to_save=["head"]), batch()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Two(q), tmp_path).eval()
    with torch.no_grad():
        again(x)
        same(again(x), model(x), "outputs of the saved and the loaded model")
    other = Two(q)
    other.layer = plain()
    twin = PeftModel.from_pretrained(other, tmp_path).eval()
    for name in ("lora_A", "lora_B"):
        one, two = (getattr(m.base_model.model.layer, name)["default"].weight for m in (model, twin))
        same(one, two, name)


@pytest.mark.parametrize("q", WRITABLE)
def test_a_merged_part_of_a_stack_stays_a_part_of_it(q):
    model, x = adapted(q), batch()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer: Any = model.base_model.model.layer
    with torch.no_grad():
        y, delta = model(x), layer.get_delta_weight("second")
        assert (delta.shape, delta.dtype) == ((96, 64), torch.float32)
        model.merge_adapter(["second"])
        close(model(x), y, 0.2, "before and after merging the second")
        model.base_model.set_adapter("default")
        close(layer.effective()[0], layer.frozen.weight() + delta + layer.get_delta_weight("default"), 1e-5, "weights")
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "second"])
        same(model(x), y, "outputs before merging and after unmerging")


@pytest.mark.parametrize("q", WRITABLE)
def test_unloading_a_merged_model_leaves_a_quantised_layer(q):
    model, x = adapted(q), batch()
    kind = type(model.base_model.model.layer.base_layer._parameters[model.base_model.model.layer.host.parameter])
    with torch.no_grad():
        model.merge_adapter()
        y = model(x)
        done = model.merge_and_unload()
        same(done(x), y, "outputs of the merged and of the unloaded model")
    assert any(type(p) is kind for p in done.layer._parameters.values())


@pytest.mark.parametrize("q", [q for q in PARAMS if not q.values[0].writable])  # type: ignore[attr-defined]
def test_where_nothing_can_be_merged_nothing_changes(q):
    model, x = adapted(q), batch()
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="unquantised"):
            merge()
    assert not model.base_model.model.layer.merged
    same(model(x), y, "outputs before and after")


@pytest.mark.parametrize("q", [q for q in PARAMS if q.values[0].copies])  # type: ignore[attr-defined]
def test_copies_are_independent(q):
    model, x = adapted(q), batch()
    y = model(x)
    twins = [copy.deepcopy(model)]
    if not q.backend or q.backend != "torchao":  # whose tensors don't pickle
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        same(twin(x), y, "outputs of a model and of its copy")
        train(twin, 9)
        same(model(x), y, "outputs before and after training the copy")


@pytest.mark.parametrize("q", WRITABLE)
def test_safe_merging_refuses_what_is_not_finite(q):
    model, x = adapted(q), batch()
    y = model(x)
    layer: Any = model.base_model.model.layer
    first = layer.lora_A["default"].weight[0, 0].item()
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Nothing was merged"):
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = first
    assert not layer.merged
    same(model(x), y, "outputs before and after")


@pytest.mark.parametrize("q", PARAMS)
def test_no_device_is_needed_to_plan(q):
    """Sizes are known without dequantising, so that adapters can be put on layers without values."""
    host: Any = host_class(quantised(q))
    assert (host(quantised(q)).out_features, host(quantised(q)).in_features) == (96, 64)
    model = peft.get_peft_model(Holder(quantised(q)), LoraConfig(target_modules=["layer"]), low_cpu_mem_usage=True)
    assert model.base_model.model.layer.lora_A["default"].weight.is_meta


def test_a_forward_of_its_own_is_not_computed_past():
    """A subclass of `nn.Linear` may do anything in its forward; it is run."""

    class Doubled(SelfRun):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base, x = Doubled(8, 6), torch.randn(3, 8)
    model = peft.get_peft_model(Holder(base), LoraConfig(target_modules=["layer"]))
    close(model(x), base(x), 1e-6, "outputs at the start")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_transposed_layer_with_a_forward_of_its_own(scale):
    class Scaled(Conv1D):
        def forward(self, x):
            return scale * super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(8, 12)), torch.randn(3, 12)
    wanted = model(x)
    torch.testing.assert_close(get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))(x), wanted)


def test_a_plain_weight_below_a_merged_one_moves_as_a_parameter():
    model: Any = get_peft_model(Holder(SelfRun(8, 12)), LoraConfig(r=2, target_modules="all-linear"))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    weight = next(m for m in model.modules() if isinstance(m, SelfRun)).weight
    assert type(weight) is nn.Parameter
    assert weight.dtype == torch.float64
