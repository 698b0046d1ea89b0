"""OFT, BOFT, HRA, RoAd, (IA)³: rotations and scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peft
from peft.errors import ConfigError, PeftWarning, TargetError
from tests import models
from tests.methods.test_structured import one


def rotation(layer, dtype=torch.float64) -> torch.Tensor:
    """R of W R, for a layer with W = I."""
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.eye(*layer.base_layer.weight.shape))
    return layer.effective(("default",))[0]


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, init_weights=False),
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3),
        peft.HRAConfig(r=4, init_weights=False),
        peft.HRAConfig(r=3, apply_GS=True),
    ],
    ids=["OFT", "BOFT", "HRA", "HRA with GS"],
)
def test_rotations_are_orthogonal(config):
    _, layer = one(nn.Linear(8, 8).double(), config)
    for name, parameter in layer.named_parameters():
        if "_R" in name:
            parameter.data.normal_()
    turned = rotation(layer)
    assert torch.allclose(turned @ turned.T, torch.eye(8, dtype=torch.float64), atol=1e-12)


def test_constrained_oft_stays_in_its_ball_and_training_moves_the_parameter_back():
    config = peft.OFTConfig(oft_block_size=4, coft=True, eps=1e-2, init_weights=False)
    _, layer = one(nn.Linear(8, 5), config)
    packed = layer.oft_R["default"].weight
    bound, x = 1e-2 / math.sqrt(2) / math.sqrt(2), torch.randn(2, 8)  # eps / sqrt(blocks), of which |packed| is 1 / √2
    before = packed.detach().clone()
    y = layer.eval()(x)
    assert torch.equal(packed, before)
    layer.train()(x).sum().backward()
    assert torch.allclose(packed.norm(dim=1), torch.full((2,), bound))
    assert packed.grad.abs().sum() > 0
    assert torch.allclose(layer.eval()(x), y, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False),
        peft.BOFTConfig(boft_block_size=2, boft_dropout=0.5),
    ],
    ids=["OFT", "BOFT"],
)
def test_dropout_of_rotations_leaves_blocks_unturned(config):
    _, layer = one(nn.Linear(40, 40, bias=False), config)
    rotation(layer)
    for name, parameter in layer.named_parameters():
        if "_R" in name:
            parameter.data.normal_()
    x = torch.ones(1, 40)
    turned = layer.eval()(x).view(20, 2)
    blocks = layer.train()(x).view(20, 2)
    still = (blocks == 1).all(1)
    assert 0 < still.sum() < 20
    assert torch.allclose(blocks[~still], turned[~still], atol=1e-5)


def test_sizes_that_do_not_divide_are_replaced_aloud():
    with pytest.warns(PeftWarning, match="oft_block_size = 4 does not divide the 30 features of '0'; 3 is used"):
        _, layer = one(nn.Linear(30, 5), peft.OFTConfig(oft_block_size=4))
    assert layer.r["default"] == 10
    with pytest.warns(PeftWarning, match="nothing is trained there"):
        one(nn.Linear(13, 5), peft.OFTConfig(oft_block_size=3))


def test_an_adapter_with_nothing_to_train_on_some_layer_is_saved(tmp_path):
    config = peft.OFTConfig(oft_block_size=3)
    with pytest.warns(PeftWarning):
        model, _ = one(nn.Linear(13, 5), config)
    model.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning):
        again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(13, 5)), tmp_path, check_base=False)
    assert again.base_model.model[0].oft_R["default"].weight.shape == (13, 0)


def test_butterfly_factors_have_their_limits():
    with pytest.raises(TargetError, match="4 blocks of size 2 allow 3 at most"):
        one(nn.Linear(8, 5), peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=4))


def test_boft_reads_files_with_fewer_factors():
    model, layer = one(nn.Linear(8, 5), peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2))
    single, other = one(nn.Linear(8, 5), peft.BOFTConfig(boft_block_size=2, init_weights=False))
    layer.base_layer.load_state_dict(other.base_layer.state_dict())
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(single))
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), other(x), atol=1e-6)


def test_gram_schmidt_reflects_the_span_and_has_gradients_at_the_start():
    _, layer = one(nn.Linear(6, 6).double(), peft.HRAConfig(r=2, apply_GS=True))
    u = layer.hra_u["default"]
    span = u @ torch.linalg.pinv(u)
    assert torch.allclose(rotation(layer), torch.eye(6, dtype=torch.float64) - 2 * span, atol=1e-12)
    layer(torch.randn(2, 6, dtype=torch.float64)).square().sum().backward()
    assert u.grad.isfinite().all()


def test_odd_reflections_warn():
    with pytest.warns(PeftWarning, match="odd"):
        peft.HRAConfig(r=3)


@pytest.mark.parametrize("group", [0, 3])
def test_groups_of_pairs_are_even(group):
    with pytest.raises(ConfigError, match="group_size"):
        peft.RoadConfig(group_size=group)


@pytest.mark.parametrize(
    ("name", "scaled"), [("llama", {"k_proj": False, "v_proj": False, "down_proj": True}), ("bert", None)]
)
def test_ia3_knows_architectures(name, scaled):
    model = peft.get_peft_model(models.build(name), peft.IA3Config())
    found = {
        key.rpartition(".")[2]: module.is_feedforward["default"]
        for key, module in model.named_modules()
        if hasattr(module, "is_feedforward")
    }
    assert found
    assert any(found.values())
    assert scaled is None or found == scaled


def test_ia3_asks_for_feedforward_modules_where_it_knows_none():
    with pytest.raises(ConfigError, match="feedforward_modules"):
        one(nn.Linear(4, 4), peft.IA3Config())
    with pytest.raises(ConfigError, match="subset"):
        peft.IA3Config(target_modules=["a"], feedforward_modules=["b"])


@pytest.mark.parametrize("groups", [1, 2])
def test_ia3_scales_channels_before_a_convolution(groups):
    config = peft.IA3Config(feedforward_modules=["0"], init_ia3_weights=False)
    _, layer = one(nn.Conv2d(4, 6, 3, groups=groups), config)
    x, factors = torch.randn(2, 4, 5, 5), layer.ia3_l["default"]
    assert factors.shape == (1, 4, 1, 1)
    assert torch.allclose(layer(x), layer.base_layer(x * factors), atol=1e-5)
