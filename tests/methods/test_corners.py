"""Layers and options at the edge of what a method covers: each was found by random stacks, and is the least of its
kind."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft
from peft import updates
from peft.errors import StateError, TargetError
from peft.operators import LowRank
from peft.testing import Holder, SelfAttention, close, merged, same, same_state, state_of, train
from peft.whole import rename_adapter


def stack(layer: nn.Module, *configs: peft.PeftConfig, seed: int = 0) -> peft.PeftModel:
    """A frozen layer in float64 with adapters "0", "1", … on it, as if trained, all active."""
    torch.manual_seed(seed)
    model = layer if isinstance(layer, (Holder, SelfAttention)) else Holder(layer)
    model = model.double().eval().requires_grad_(False)
    for number, config in enumerate(configs):
        config.target_modules = {"layer"}
        if number:
            model.add_adapter(str(number), config)
        else:
            model = peft.PeftModel(model, config, "0")
        model.set_adapter(str(number))
        train(model, number, 0.2)
    model.set_adapter([str(n) for n in range(len(configs))])
    return model.eval()


@torch.no_grad()
def check_law(model: peft.PeftModel, x: torch.Tensor) -> None:
    close(merged(model)(x), model(x), 1e-11, "running and merging")


IMAGE = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.tensor([[0, 3, 5, 3], [1, 0, 0, 7]])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_outputs_of_several_groups_of_a_convolution_are_mixed(size):
    """Rows of different groups have columns that mean different channels: mixed, they need those of all groups."""
    model = stack(nn.Conv1d(4, 8, 3, groups=2), peft.RoadConfig(group_size=size))
    check_law(model, IMAGE)
    config, tensors = peft.convert_to_lora(model, None, "0")
    output = model(IMAGE)
    bare = peft.PeftModel(model.unload(), config)
    peft.set_peft_model_state_dict(bare, tensors, strict=True)
    close(bare.eval()(IMAGE), output, 1e-11, "the adapter and the LoRA it became")


def test_inputs_turn_after_lora_has_widened_a_grouped_convolution():
    lora, oft = peft.LoraConfig(r=2), peft.OFTConfig(r=0, oft_block_size=3)
    check_law(stack(nn.Conv1d(4, 8, 3, groups=2), lora, oft), IMAGE)


def test_the_difference_that_lora_makes_to_a_grouped_convolution():
    model = stack(nn.Conv1d(4, 8, 3, groups=2), peft.LoraConfig(r=2))
    layer = model.base_model.model.layer
    assert layer.get_delta_weight("0").shape == (8, 4, 3)


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(4, 6, bias=False), nn.Conv1d(4, 6, 1, bias=False)], ids=["linear", "conv"])
def test_a_bias_that_a_second_merge_brings_goes_again(layer):
    model, x = stack(layer, peft.LoraConfig(r=2), peft.BeftConfig()), IMAGE
    x = x.mT if isinstance(layer, nn.Linear) else x
    before, y = state_of(model), model(x)
    for name in ("0", "1"):
        model.base_model.merge_adapter([name])
        close(model(x), y, 1e-11, f"outputs before and after merging {name!r}")
    model.base_model.unmerge_adapter()
    same_state(state_of(model), before, "before merging and after")


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.OFTConfig, peft.HiraConfig])
def test_padding_tokens_send_no_gradients(kind):
    """As with the layer that has the merged weight: `padding_idx` keeps its row from training."""
    options = {"r": 0, "oft_block_size": 4} if kind is peft.OFTConfig else {"r": 2}
    model = stack(nn.Embedding(8, 4, padding_idx=0), kind(**options))
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight, _ = model.base_model.model.layer.effective()
    y, dense = model(TOKENS), nn.functional.embedding(TOKENS, weight.mT, padding_idx=0)
    towards = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((out * towards).sum(), parameters) for out in (y, dense)), strict=True):
        close(a, b, 1e-10, "gradients, running and dense,")


@torch.no_grad()
def test_embeddings_that_clip_their_rows_stay_as_they_are():
    """torch clips rows of the stored weight when it looks them up; under adapters that would change W by the way."""
    bare = Holder(nn.Embedding(8, 4, max_norm=0.5)).double()
    model = stack(copy.deepcopy(bare), peft.LoraConfig(r=2), peft.HiraConfig(r=2))
    weight, y = bare.layer.weight.clone(), model(TOKENS)
    assert y.norm(dim=-1).max() < 0.5 + 1e-6
    with model.disable_adapter():
        same(model(TOKENS), bare(TOKENS), "outputs of the base model and of disabled adapters")
    check_law(model, TOKENS)
    model.base_model.merge_adapter(["0"])
    close(model(TOKENS), y, 1e-11, "outputs before and after a merge")
    model.base_model.unmerge_adapter()
    same(model.base_model.model.layer.base_layer.weight, weight, "weights before and after")


def test_attention_with_projections_of_several_widths_says_what_to_name():
    attention = SelfAttention(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(TargetError, match="q_proj_weight"):
        peft.get_peft_model(attention, peft.LoraConfig(target_modules=["layer"]))
    names = [f"layer.{name}_proj_weight" for name in "qkv"]
    model = peft.get_peft_model(
        attention, peft.LoraConfig(target_parameters=names, init_lora_weights=False)
    ).base_model.model
    x = torch.randn(3, 5, 8)
    y = model.layer(x, x[..., :4], x[..., 4:])[0]
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("layer", "config", "says"),
    [
        (nn.Linear(4, 6, bias=False), peft.GloraConfig(config_A_B="none"), "no bias"),
        (nn.Linear(4, 6), peft.GloraConfig(config_A_B="none", config_C="none", config_D_E="none"), "config_A_B"),
        (nn.Conv1d(4, 8, 1, groups=4), peft.RandLoraConfig(r=1), "deviation"),
        (nn.Linear(4, 6), peft.PsoftConfig(r=1, psoft_mag_a=False, psoft_mag_b=False), "raise r"),
    ],
    ids=["glora-no-bias", "glora-none", "randlora", "psoft"],
)
def test_nothing_to_train_is_refused(layer, config, says):
    with pytest.raises(TargetError, match=says):
        stack(layer, config)


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (nn.Linear(4, 6), peft.PsoftConfig(r=1)),
        (nn.Conv1d(4, 8, 1, groups=4), peft.FrodConfig(progressbar=False)),
        (nn.Embedding(8, 8, padding_idx=0), peft.FrodConfig(progressbar=False)),
    ],
    ids=["psoft of rank one", "frod of width one", "frod of a singular weight"],
)
def test_the_smallest_cases_train_and_are_saved(layer, config, tmp_path):
    bare = copy.deepcopy(layer)
    model = stack(layer, config)
    x = TOKENS if isinstance(layer, nn.Embedding) else IMAGE.mT if isinstance(layer, nn.Linear) else IMAGE
    check_law(model, x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Holder(bare).double(), tmp_path / "0", adapter_name="0")
    close(loaded(x), model(x), 1e-12, "outputs of the saved and the loaded model")


def test_shared_tensors_of_a_base_without_values_are_refused_once_it_has_them(tmp_path):
    """Bases that files leave out are drawn where the base model is: on the meta device they were not."""
    bare = nn.Sequential(nn.Linear(4, 6))
    config = peft.VeraConfig(r=2, save_projection=False, target_modules=["0"])
    peft.get_peft_model(copy.deepcopy(bare), config).save_pretrained(tmp_path)
    late = peft.PeftModel.from_pretrained(copy.deepcopy(bare).to("meta"), tmp_path)
    late.base_model.model[0].base_layer = bare[0]
    with pytest.raises(StateError, match="base weights first"):
        late(torch.ones(1, 4))


def test_what_follows_from_a_seed_is_made_once_the_base_has_values(tmp_path):
    bare, x = nn.Sequential(nn.Linear(4, 6)), torch.ones(1, 4)
    config = peft.PsoftConfig(r=2, target_modules=["0"], init_weights=False)
    model = peft.get_peft_model(copy.deepcopy(bare), config)
    model.save_pretrained(tmp_path)
    late = peft.PeftModel.from_pretrained(copy.deepcopy(bare).to("meta"), tmp_path)
    rename_adapter(late, "default", "late")
    late.base_model.model[0].base_layer = bare[0].requires_grad_(False)
    close(late(x), model.eval()(x), 1e-6, "outputs of adapters loaded before and after the base weights")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_rows_are_those_of_the_dense_matrix_however_it_lies(dtype):
    down, up = torch.randn(3, 700, dtype=torch.float64), torch.randn(500, 3, dtype=torch.float64)
    weight = torch.randn(500, 700, dtype=torch.float64).to(dtype)
    wanted = torch.linalg.vector_norm(weight.double() + 0.3 * up @ down, dim=1)
    for lying in (weight, weight.mT.contiguous().mT):
        found = updates.row_norms(LowRank(down, up, 0.3), SimpleNamespace(weight=lying))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
