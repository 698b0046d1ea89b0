"""LN tuning: copies of modules train in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LNTuningConfig, PeftModel, get_peft_model
from peft.errors import ConfigError, StateError
from peft.testing import same_state, state_of, train

NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "Linear": lambda: nn.Linear(4, 4),
}


class Model(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.lin, self.norm = nn.Linear(3, 4), norm

    def forward(self, x):
        return self.norm(self.lin(x)) + self.norm.weight.sum()


@pytest.fixture(params=list(NORMS))
def base(request):
    torch.manual_seed(0)
    return Model(NORMS[request.param]()).eval()


def adapted(base, *names):
    model = get_peft_model(copy.deepcopy(base), LNTuningConfig(target_modules=["norm"]), names[0])
    for name in names[1:]:
        model.add_adapter(name, LNTuningConfig(target_modules=["norm"]))
    for seed, name in enumerate(names):
        model.set_adapter(name)
        train(model, seed)
    return model.eval()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_it_starts_as_the_base_model_and_trains_the_copy_alone(base):
    model = get_peft_model(copy.deepcopy(base), LNTuningConfig(target_modules=["norm"])).eval()
    assert torch.equal(model(X), base(X))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model.norm.ln_tuning_layers.default"
    assert trained == {f"{prefix}.{name}" for name, _ in base.norm.named_parameters()}


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(base, tmp_path):
    model = adapted(base, "default")
    assert not torch.equal(model(X), base(X))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    same_state(state_of(loaded), state_of(model), "saved and loaded")
    assert torch.equal(loaded(X), model(X))


@torch.no_grad()
def test_merged_the_copy_stays_and_unloaded_the_original_does(base):
    model = adapted(base, "default")
    y = model(X)
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(X), y)
    left = model.unload()
    assert torch.equal(left(X), base(X))
    same_state(state_of(left), state_of(base), "before injection and after unloading")


@torch.no_grad()
def test_one_adapter_at_a_time():
    base = Model(nn.LayerNorm(4)).eval()
    model = adapted(base, "one", "two")
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model.base_model.model.norm(X.new_ones(3, 4))
    assert not torch.equal(outputs["one"], outputs["two"])
    with pytest.raises(ConfigError, match="one adapter"):
        model.base_model.set_adapter(["one", "two"])
    model.delete_adapter("two")
    assert not [name for name in model.state_dict() if ".two." in name]
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))


@torch.no_grad()
def test_merging_swaps_the_copy_in_and_unmerging_swaps_it_out(base):
    model = adapted(base, "one", "two")
    model.set_adapter("one")
    before, y = state_of(model), model(X)
    model.base_model.merge_adapter(safe_merge=True)
    norm = model.base_model.model.norm
    assert torch.equal(norm.base_layer.weight, norm.ln_tuning_layers["one"].weight)
    assert torch.equal(model(X), y)
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(X), y)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    with pytest.raises(ConfigError, match="one adapter"):
        model.base_model.merge_adapter(["two"])
    with pytest.raises(StateError, match="merged"):
        model.delete_adapter("one")
    assert torch.equal(copy.deepcopy(model).double().unload()(X.double()), copy.deepcopy(base).double()(X.double()))
    model.base_model.unmerge_adapter()
    same_state(state_of(model), before, "before merging and after unmerging")
    assert torch.equal(model(X), y)


@torch.no_grad()
def test_a_broken_copy_is_not_merged():
    model = adapted(Model(nn.LayerNorm(4)), "default")
    model.base_model.model.norm.ln_tuning_layers["default"].weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.base_model.merge_adapter(safe_merge=True)
    assert model.base_model.model.norm.merged_adapters == []


def test_parameters_are_no_targets():
    with pytest.raises(ConfigError, match="target_modules"):
        LNTuningConfig(target_parameters=["norm.weight"])
