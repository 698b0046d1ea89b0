"""OSF: nothing that is trained touches the frozen directions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft
from peft.methods.osf import Retrained
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


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_gradients_are_projected_the_same_in_all_forms(tokens):
    """Through tokens or matrices, and whichever of both is smaller."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64))[0] for n in (7, 9))
    up, s, down = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (4,), (4, 9)))
    op = Retrained(up, s, down, u, torch.rand(6, dtype=torch.float64), v.mT)
    x = torch.randn(tokens, 9, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, 7, dtype=torch.float64)
    back, *free = torch.autograd.grad(
        x @ (up * s @ down - u[:, 2:] * op.d[2:] @ v[:, 2:].mT).mT, (x, up, s, down), grad
    )
    off_u, off_v = (torch.eye(len(q), dtype=torch.float64) - q[:, :2] @ q[:, :2].mT for q in (u, v))
    wanted = off_u @ free[0], free[1], free[2] @ off_v
    near, apart = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12), (up, s, down)
    near(torch.autograd.grad(op.apply(x), (x, *apart), grad), (back, *wanted))
    near(torch.autograd.grad(F.linear(x, op.dense()), (x, *apart), grad), (back, *wanted))
    pulled, on_the_way, found = op.pull(x, grad, True)
    near((pulled, *torch.autograd.grad(on_the_way, apart, found)), (back, *wanted))
    near(op.pull_dense(grad.mT @ x), (apart, wanted))
    near(
        torch.func.grad(lambda *t: (replace(op, up=t[0], down=t[1]).apply(x) * grad).sum(), (0, 1))(up, down),
        wanted[::2],
    )
