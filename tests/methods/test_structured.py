"""LoHa, LoKr, C3A, WaveFT: what the shared suites don't see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft
from peft.errors import ConfigError, PeftWarning, TargetError
from peft.methods import _wavelets
from peft.methods._sizes import divisors, nearest_divisor
from peft.methods.lokr import factorization


def one(layer: nn.Module, config, **options):
    """An adapted model of one layer, and that layer."""
    config.target_modules = {"0"}
    model = peft.get_peft_model(nn.Sequential(layer), config, **options)
    return model, model.base_model.model[0]


@given(st.integers(1, 500), st.integers(-1, 40).filter(bool))
def test_factorization(dimension, factor):
    small, large = factorization(dimension, factor)
    assert small * large == dimension
    if factor > 0 and dimension % factor == 0:
        assert small == factor
    else:
        fits = [n for n in divisors(dimension) if n * n <= dimension and (factor < 0 or n <= factor)]
        assert small == max(fits)


@given(st.integers(1, 300), st.integers(1, 300))
def test_nearest_divisor(size, wanted):
    found = nearest_divisor(size, wanted)
    assert size % found == 0
    assert all(abs(found - wanted) <= abs(n - wanted) for n in divisors(size))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (peft.LoHaConfig(r=2, init_weights=False, rank_dropout=0.5), "scaled"),
        (peft.LoKrConfig(r=2, init_weights=False, rank_dropout=0.5), "as they were"),
        (peft.LoKrConfig(r=2, init_weights=False, rank_dropout=0.5, rank_dropout_scale=True), "scaled"),
    ],
)
def test_rank_dropout_drops_rows_of_the_update(config, kept):
    _, layer = one(nn.Linear(6, 40), config)
    x = torch.randn(3, 6)
    base, full = layer.base_layer(x), layer.eval()(x)
    ratio = (layer.train()(x) - base) / (full - base)
    assert torch.allclose(ratio[0], ratio[1], atol=1e-3), "one mask for the whole batch"
    rows = ratio[0].round(decimals=3)
    alive = (rows != 0).float().mean()
    assert 0 < alive < 1
    expected = 1 / alive if kept == "scaled" else torch.tensor(1.0)
    assert torch.allclose(rows[rows != 0], expected, atol=2e-3)


def test_module_dropout_drops_all_or_nothing():
    _, layer = one(nn.Linear(6, 5), peft.LoHaConfig(r=2, init_weights=False, module_dropout=0.5))
    x = torch.randn(2, 6)
    base, full = layer.base_layer(x), layer.eval()(x)
    layer.train()
    seen = {(bool((y == base).all()), bool(torch.allclose(y, full))) for y in (layer(x) for _ in range(40))}
    assert seen == {(True, False), (False, True)}


def test_merging_in_training_mode_knows_no_dropout():
    model, layer = one(nn.Linear(6, 5), peft.LoKrConfig(r=2, init_weights=False, rank_dropout=0.9, module_dropout=0.9))
    x = torch.randn(2, 6)
    expected = layer.eval()(x)
    assert torch.allclose(model.train().merge_and_unload()(x), expected, atol=1e-6)


def test_a_block_that_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(TargetError, match="nearest that does is 4"):
        one(nn.Linear(12, 8), peft.C3AConfig(block_size=5))


def test_two_active_c3a_adapters_add():
    config = peft.C3AConfig(block_size=2)
    model, layer = one(nn.Linear(4, 6), config)
    model.add_adapter("other", peft.C3AConfig(block_size=1, target_modules={"0"}))
    x = torch.randn(2, 4)
    base, deltas = layer.base_layer(x), []
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        deltas.append(layer(x) - base)
    assert torch.allclose(deltas[0] + deltas[1], deltas[2], atol=1e-6)


@pytest.mark.parametrize("name", _wavelets.NAMES)
def test_filters_are_orthonormal_wavelets(name):
    low, high = _wavelets.filters(name)
    size = low.shape[0]
    bank = torch.stack([torch.cat((torch.zeros(2 * k), f, torch.zeros(2 * (size // 2 - 1 - k)))) for f in (low, high)
                        for k in range(size // 2)]).double()  # fmt: skip
    # Printed tables of long filters have fewer exact digits.
    tolerance = {"db": 1e-9, "sy": 1e-9, "co": 1e-6}[name[:2]]
    assert torch.allclose(bank @ bank.T, torch.eye(size, dtype=torch.float64), atol=tolerance)
    order = int(name.lstrip("dbsymcoif"))
    place = torch.linspace(-1, 1, size, dtype=torch.float64)
    moments = torch.stack([(high * place**k).sum() for k in range(min(order, 6))])
    assert moments.abs().max() < 1e-6, "vanishing moments"


def test_unknown_wavelet_names_the_nearest():
    with pytest.raises(ConfigError, match="sym12"):
        peft.WaveFTConfig(wavelet_family="symm12")


def test_proportional_wavelets_share_out_by_size_and_say_that_patterns_do_not_count():
    with pytest.warns(PeftWarning, match="n_frequency_pattern"):
        config = peft.WaveFTConfig(
            n_frequency=9, proportional_parameters=True, n_frequency_pattern={"0": 1}, target_modules=["0", "1"]
        )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)), config)
    assert [m.waveft_spectrum["default"].shape[0] for m in model.base_model.model] == [6, 12]


def test_frequencies_without_a_seed_are_refused():
    with pytest.raises(ConfigError, match="random_loc_seed"):
        peft.FourierFTConfig(random_loc_seed=None)
