"""SHiRA, Super-Tuning, MiSS: masks, selections, shards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft.errors import PeftWarning, TargetError
from tests.methods.test_structured import one


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), Conv1D(10, 6)], ids=["Linear", "Conv1D"])
def test_a_mask_of_ones_own_has_the_shape_of_the_weight(layer):
    seen = {}

    def largest(base_layer, r, **kwargs):
        seen.update(kwargs, r=r)
        weight = base_layer.weight
        threshold = weight.abs().flatten().kthvalue(weight.numel() - r * sum(weight.shape)).values
        return weight.abs() > threshold

    config = peft.ShiraConfig(r=1, random_seed=5)
    config.mask_fn = largest
    _, adapted = one(layer, config)
    assert seen == {"r": 1, "random_seed": 5}
    adapted.shira_weight["default"].data.fill_(1.0)
    changed = adapted.get_delta_weight("default")
    assert changed.shape == layer.weight.shape
    assert torch.equal(changed.bool(), largest(layer, 1))


def test_a_mask_with_another_number_of_ones_is_refused():
    config = peft.ShiraConfig(r=1)
    config.mask_fn = lambda layer, r, **kwargs: torch.ones_like(layer.weight)
    with pytest.raises(TargetError, match=r"chose 60 entries of '0'; with r = 1 .* = 16"):
        one(nn.Linear(6, 10), config)


def test_a_named_mask_without_a_function_warns():
    with pytest.warns(PeftWarning, match="mask_type is 'mine' without a mask_fn"):
        one(nn.Linear(6, 10), peft.ShiraConfig(r=1, mask_type="mine"))


@pytest.mark.parametrize("top", [True, False])
def test_supertuning_selects_by_size(top):
    _, layer = one(nn.Linear(6, 10), peft.SupertuningConfig(sparsity=0.8, select_top=top, init_weights=False))
    chosen = layer.get_delta_weight("default") != 0
    size = layer.weight.abs()
    inside, outside = size[chosen], size[~chosen]
    assert inside.numel() == 11
    assert inside.min() >= outside.max() if top else inside.max() <= outside.min()


def test_supertuning_finds_its_places_again(tmp_path):
    base = nn.Sequential(nn.Linear(6, 10))
    weights = base.state_dict()
    config = peft.SupertuningConfig(
        sparsity=0.8, init_weights=False, save_precomputed_indices=False, target_modules=["0"]
    )
    model, x = peft.get_peft_model(base, config), torch.randn(2, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(6, 10))
    fresh.load_state_dict({k.replace("base_layer.", ""): v for k, v in weights.items()})
    assert torch.equal(peft.PeftModel.from_pretrained(fresh, tmp_path)(x), expected)


def test_dropout_of_supra_spares_the_entries():
    config = peft.SupertuningConfig(sparsity=0.8, r=2, lora_dropout=1.0, init_weights=False)
    _, layer = one(nn.Linear(6, 10), config)
    x = torch.randn(2, 6)
    alone = (
        layer.base_layer(x)
        + x
        @ torch.zeros(60)
        .scatter(0, layer.supertuning_indices["default"].long(), layer.supertuning_values["default"].detach())
        .view(10, 6)
        .T
    )
    assert torch.allclose(layer.train()(x), alone, atol=1e-6)


@pytest.mark.parametrize(("form", "options"), [(False, {}), ("mini", {"mini_r": 2}), ("bat", {})])
def test_miss_entry_by_entry(form, options):
    out, inner, r = 6, 9, 3
    _, layer = one(nn.Linear(inner, out), peft.MissConfig(r=r, init_weights=form, **options))
    block = layer.miss_block["default"]
    block.data.normal_()
    weight, delta = layer.weight, layer.get_delta_weight("default")
    for o in range(out):
        for i in range(inner):
            if form == "bat":
                d = block[o // r]
                row = weight[o, i - i % r : i - i % r + r]
                expected = row @ d[:, i % r] + d[o % r, i % r]
            else:
                expected = block[i % r, o % block.shape[1]]
            assert torch.allclose(delta[o, i], expected, atol=1e-6)
