"""OSF: nothing that is trained touches the frozen directions."""

from __future__ import annotations

import torch
from torch import nn

import peft


def adapted(dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 8)).to(dtype), peft.OSFConfig(target_modules=["0"], **options)
    )


def test_gradients_are_orthogonal_to_the_frozen_directions():
    model = adapted(torch.float64, effective_rank=3)
    model(torch.randn(5, 12, dtype=torch.float64)).square().sum().backward()
    layer = model.base_model.model[0]
    parts = layer.osf_svd_params["default"]
    u, v = layer.osf_U["default"][:, :3], layer.osf_V["default"][:3]
    assert parts["U_low"].grad.abs().max() > 1e-3
    assert (u.mT @ parts["U_low"].grad).abs().max() < 1e-12
    assert (parts["V_low"].grad @ v.mT).abs().max() < 1e-12


def test_shares_and_patterns_count_triplets():
    sizes = {}
    for rank in (None, 3, 0.5, 1.0, 50):
        layer = adapted(effective_rank=rank).base_model.model[0]
        sizes[rank] = len(layer.osf_svd_params["default"]["S_low"])
    assert sizes == {None: 4, 3: 5, 0.5: 4, 1.0: 0, 50: 0}
    layer = adapted(effective_rank=3, rank_pattern={"0": 2}).base_model.model[0]
    assert len(layer.osf_svd_params["default"]["S_low"]) == 6


def test_a_merge_is_taken_back_exactly():
    model = adapted()
    before = model.base_model.model[0].base_layer.weight.clone()
    with torch.no_grad():
        model.base_model.model[0].osf_svd_params["default"]["S_low"].add_(0.1)
    x = torch.randn(3, 12)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)
