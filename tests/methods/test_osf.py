"""OSF: nothing that is trained touches the frozen directions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from tests.methods.both import run

TRAIN = """
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    model = peft.get_peft_model(base, peft.OSFConfig(target_modules=["0", "2"], **options)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        ((model(torch.randn(4, 12)) - torch.randn(4, 6)) ** 2).mean().backward()
        optimizer.step()
    sizes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    result = (sizes, model.eval()(torch.ones(1, 12)).tolist())
"""


@pytest.mark.parametrize(
    "options",
    [
        {"effective_rank": 3},
        {"effective_rank": 0.3, "rank_pattern": {"0": 5}},
        {"target_svd_config": {"0": 2, "0.weight": 2}},
    ],
    ids=["number", "pattern", "target_svd_config"],
)
def test_it_trains_as_the_reference_does(pair, options):
    """The same steps, so the same projections of gradients; and the same ranks, whatever options say them."""
    ours, reference = (run(side, TRAIN, options=options) for side in (pair.ours, pair.reference))
    assert ours[0] == reference[0]
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(reference[1]), rtol=1e-4, atol=1e-5)


def test_an_option_without_effect_says_so():
    with pytest.warns(peft.PeftWarning, match="rank_pattern"):
        peft.OSFConfig(target_svd_config={"0": 2})


@pytest.mark.parametrize("rank", [1.0, 50])
def test_a_layer_may_be_frozen_whole(tmp_path, rank):
    """A share of one is not a rank of one once it was in a file."""
    model = adapted(effective_rank=rank)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)), tmp_path)
    assert loaded.base_model.model[0].effective_rank == {"default": 8}


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
    for rank in (None, 3, 0.5):
        layer = adapted(effective_rank=rank).base_model.model[0]
        sizes[rank] = len(layer.osf_svd_params["default"]["S_low"])
    assert sizes == {None: 4, 3: 5, 0.5: 4}
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
