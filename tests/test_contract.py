"""Every registered weight method on every kind of layer, and random stacks of them, held to the contract."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft import registry
from peft.config import PeftConfig
from peft.errors import ConfigError, TargetError, UnsupportedError
from peft.method import WeightMethod
from peft.model import PeftModel
from peft.testing import CHECKS, PLACES, TOLERANCE, check_method, close, merged, samples, train

WEIGHT_METHODS = [name for name, method in registry.all_methods().items() if isinstance(method, WeightMethod)]
SAMPLES = {name: samples(name) for name in WEIGHT_METHODS}
#: Further variants of a method go over fewer kinds of layers, and compilation, which takes seconds, over one.
FEW_PLACES = ("two Linears", "Conv2d, groups", "Embedding")
QUICK = [name for name in CHECKS if name != "compile"]


def _cells():
    for method, configs in SAMPLES.items():
        for number, config in enumerate(configs):
            for place in PLACES if number == 0 else FEW_PLACES:
                checks = list(CHECKS) if place == "two Linears" else QUICK
                yield pytest.param(config, place, checks, id=f"{method}-{number}-{place}")


@pytest.mark.parametrize(("config", "place", "checks"), list(_cells()))
def test_contract(config, place, checks):
    report = check_method(config, hosts=[place], checks=checks)
    for cell in report.cells:
        assert not cell.refused or len(cell.refused) > 20, "a refusal says why"


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_each_method_works_somewhere(method):
    for config in SAMPLES[method]:
        assert check_method(config, checks=["names"]).supported


def _put(model: PeftModel | torch.nn.Module, name: str, config: PeftConfig):
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return PeftModel(model, config, name)


@st.composite
def stacks(draw):
    place = draw(st.sampled_from(list(PLACES)))
    # Copies of modules (LN tuning) are active one at a time.
    every = [c for name, cs in SAMPLES.items() for c in cs if registry.method(name).copies is None]
    chosen = draw(st.lists(st.sampled_from(every), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(chosen))))
    first = draw(st.sets(st.sampled_from(range(len(chosen)))))
    return place, chosen, [f"a{i}" for i in order], [f"a{i}" for i in sorted(first)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(stack=stacks())
def test_any_stack_runs_as_it_merges(dtype, stack):
    """Random methods in a random order on a random kind of layer, some merged first."""
    name, chosen, order, first = stack
    place = PLACES[name]
    torch.manual_seed(0)
    model = place.build().to(dtype)
    there = set()
    for number, config in enumerate(chosen):
        try:
            model = _put(model, f"a{number}", place.target(copy.deepcopy(config)))
        except (TargetError, ConfigError, UnsupportedError):
            continue
        if not registry.method(config.peft_type.value).mergeable:
            model.delete_adapter(f"a{number}") if number else None
            continue
        model.set_adapter(f"a{number}")
        train(model, number)
        there.add(f"a{number}")
    order = [n for n in order if n in there]
    if not order:
        return
    model.eval().set_adapter(order)
    x, tolerance = place.input(dtype), 10 * TOLERANCE[dtype]
    with torch.no_grad():
        y = model(x)
        close(merged(model)(x), y, tolerance, "running and merging")
        part = [n for n in first if n in there]
        if part:
            model.base_model.merge_adapter(part)
            close(model(x), y, tolerance, f"before and after merging {part}")
            model.base_model.unmerge_adapter()
            assert torch.equal(model(x), y)
