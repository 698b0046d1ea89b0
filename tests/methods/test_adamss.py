"""AdaMSS: its groups are the reference's, and its schedule leaves as many as it was told."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import peft
from tests.methods.both import run

pytest.importorskip("sklearn")

GROUPS = """
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40))
    config = peft.AdamssConfig(target_modules=["0"], r=8, num_subspaces=4, **options)
    model = peft.get_peft_model(base, config)
    result = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
"""

TRAIN = """
    import zlib
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    model = peft.get_peft_model(base, peft.AdamssConfig(target_modules=["0", "2"], r=6, num_subspaces=4, **asa)).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    result = []
    for step in range(12):
        torch.manual_seed(step)
        optimizer.zero_grad()
        ((model(torch.randn(4, 16)) - torch.randn(4, 12)) ** 2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        result.append(sorted(n for n, p in trained.items() if p.requires_grad and "adamss_B" in n))
"""

ASA = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 2, "final_warmup": 10, "mask_interval": 2}


def adapted(**options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    config = peft.AdamssConfig(**{"target_modules": ["0", "2"], "r": 6, "num_subspaces": 4, **options})
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize(
    "options", [{}, {"subspace_rank": 8, "use_dynamic_rank": True, "svd_threshold": 0.3}], ids=["plain", "dynamic"]
)
def test_groups_and_ranks_are_those_of_the_reference(pair, options):
    ours, reference = (run(side, GROUPS, options=options) for side in (pair.ours, pair.reference))
    assert ours == reference


def test_the_groups_it_keeps_are_those_of_the_reference(pair):
    """Importances and schedule over a training run. The reference keeps one group less than its schedule says."""
    ours, reference = (run(side, TRAIN, asa=ASA) for side in (pair.ours, pair.reference))
    sizes = [len(kept) for kept in ours]
    assert sizes == [8] * 4 + [5] * 2 + [3] * 6
    for mine, theirs, size in zip(ours, reference, sizes, strict=True):
        assert len(theirs) == (size if size == 8 else size - 1)
        assert set(theirs) <= set(mine)


def test_a_rank_above_the_subspace_still_runs():
    model = adapted(r=2, subspace_rank=9)
    assert model(torch.randn(3, 16)).shape == (3, 12)


def test_groups_freeze_along_the_schedule():
    model = adapted(**ASA)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    training = []
    for step in range(14):
        optimizer.zero_grad()
        (model(torch.randn(4, 16)) - 1).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        training.append(sum(p.requires_grad for n, p in model.named_parameters() if "adamss_B" in n))
    # 3 + 5 (1 - (t - 2) / 8)³ at t = 4, 6, 8, 10
    assert training == [8] * 4 + [5] * 2 + [3] * 8


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        adapted()
