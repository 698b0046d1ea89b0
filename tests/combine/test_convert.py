"""Any change as factors: exact where the rank is low, the best cut elsewhere, and layouts that come back."""

from __future__ import annotations

import pytest
import torch

from peft.combine.convert import to_factors
from peft.combine.factored import Factors
from peft.combine.layouts import Layout
from peft.errors import ConfigError
from peft.operators import Dense, LowRank


def low_rank():
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 16, generator=g), torch.randn(12, 3, generator=g)
    return LowRank(down=down, up=up, scale=2.0)


@pytest.mark.parametrize("as_", ["operator", "dense operator", "tensor"])
def test_a_low_rank_change_is_exact(as_):
    op = low_rank()
    change = {"operator": op, "dense operator": Dense(op.dense()), "tensor": op.dense()}[as_]
    factors, error = to_factors(change)
    assert factors.rank == 3
    assert error < 1e-6
    assert torch.allclose(factors.dense()[0], op.dense(), atol=1e-5)


def test_a_known_low_rank_is_never_made_dense(monkeypatch):
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("made dense"))
    assert to_factors(low_rank(), 2)[0].rank == 2


@pytest.mark.parametrize("rank", [2, 0.9, 1.0])
def test_both_ways_make_the_same_cut(rank):
    one, one_error = to_factors(low_rank(), rank)
    two, two_error = to_factors(low_rank().dense(), rank)
    assert one.rank == two.rank
    assert torch.allclose(one.dense(), two.dense(), atol=1e-4)
    assert one_error == pytest.approx(two_error, abs=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "rank", "change"),
    [
        ((4, 10), (12, 4), None, (1, 12, 10)),
        ((4, 6, 3, 3), (12, 4, 1, 1), None, (1, 12, 54)),
        ((4, 8, 3), (12, 1, 1), None, (4, 3, 24)),
        ((12, 6), (8, 12), 4, (3, 8, 6)),
    ],
    ids=["linear", "conv2d", "grouped conv1d", "experts"],
)
def test_layouts_come_back(a, b, rank, change):
    A, B = torch.randn(a), torch.randn(b)
    layout = Layout.of(A, B, rank)
    factors = layout.pack(A, B)
    assert factors.shape == change
    assert layout.rank_of(factors) == 4
    again = layout.unpack(factors)
    assert torch.equal(again[0], A)
    assert torch.equal(again[1], B)


def test_experts_are_those_of_the_reference(reference):
    module = "type('M', (torch.nn.Module,), {'forward': lambda self, x: x})()"
    expression = f"""(lambda m: (
        setattr(m, 'w', {module}), m.w.register_parameter('p', torch.nn.Parameter(torch.zeros(3, 8, 6))),
        (lambda q: (
            [torch.nn.init.normal_(p) for n, p in q.named_parameters() if 'lora_' in n],
            q.base_model.model.w.lora_A.default.weight.detach(), q.base_model.model.w.lora_B.default.weight.detach(),
            q.base_model.model.w.get_delta_weight('default').detach(),
        ))(peft.get_peft_model(m, peft.LoraConfig(r=4, lora_alpha=4, target_modules=[], target_parameters=['w.p']))),
    )[-1])({module})"""
    _, A, B, delta = reference.ask("call", expression)
    assert torch.allclose(Layout.of(A, B, 4).pack(A, B).dense(), delta, atol=1e-5)


def test_tensors_that_are_no_layer_are_named():
    with pytest.raises(ConfigError, match="whole number of experts"):
        Layout.of(torch.zeros(10, 6), torch.zeros(8, 10), 4)
    with pytest.raises(ConfigError, match="do not multiply"):
        Layout.of(torch.zeros(4, 6), torch.zeros(8, 3)).pack(torch.zeros(4, 6), torch.zeros(8, 3))


def test_factors_of_one_block_are_two_dimensional_tensors():
    assert Factors(torch.zeros(2, 5), torch.zeros(4, 2)).shape == (1, 4, 5)
