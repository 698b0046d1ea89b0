"""Every method on every quantiser's layer: as on a plain layer that holds the dequantised weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft import registry
from peft.errors import ConfigError, TargetError
from peft.hosts import host_class
from peft.method import WeightMethod
from peft.model import PeftModel
from peft.testing import PLACES, Holder, close, samples, train
from tests.quantised.kit import PARAMS, WRITABLE, batch, quantised

METHODS = [n for n, m in registry.all_methods().items() if isinstance(m, WeightMethod) and m.copies is None]
CONFIGS = [pytest.param(PLACES["Linear"].target(c), id=f"{m}-{i}") for m in METHODS for i, c in enumerate(samples(m))]


def adapted(config: Any, layer: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    try:
        model = PeftModel(Holder(layer), copy.deepcopy(config))
    except (ConfigError, TargetError) as refused:
        pytest.skip(f"refused: {refused}")
    train(model, 2)
    return model.eval()


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the input, and those of what trains."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    into = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    return y.detach(), *torch.autograd.grad(y, [x, *trained], into)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("q", PARAMS)
def test_runs_and_trains_as_on_the_dequantised_weight(q, config):
    layer = quantised(q)
    host: Any = host_class(layer)
    weight, bias = host(layer).weight(), host(layer).bias()
    model = adapted(config, layer)
    twin = nn.Linear(weight.shape[1], weight.shape[0])
    twin.weight.data.copy_(weight), twin.bias.data.copy_(bias)
    other = adapted(config, twin)
    for (_, p), (_, o) in zip(trained(model), trained(other), strict=True):
        o.data.copy_(p.data)  # where the start follows from W, it does by rounding
    other.base_model.model.load_state_dict(_buffers(model), strict=False)
    names = ["output", "gradient of the input", *(n for n, _ in trained(model))]
    for name, found, wanted in zip(names, step(model, batch()), step(other, batch()), strict=True):
        assert found.dtype == wanted.dtype
        if wanted.norm() > 1e-6:
            close(found, wanted, max(2e-4, 4 * q.noise), name)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _buffers(model: PeftModel) -> dict[str, Tensor]:
    return {n: b for n, b in model.base_model.model.named_buffers() if "base_layer" not in n}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("q", WRITABLE)
def test_merging_packs_the_merged_weight_and_unmerging_is_exact(q, config):
    model = adapted(config, quantised(q))
    layer, x = model.base_model.model.layer, batch()
    if not registry.method(config.peft_type.value).mergeable:
        pytest.skip("the method has no weight to merge")
    before = dict(layer.base_layer._parameters)
    with torch.no_grad():
        model(x)  # the first call in evaluation mode packs 4-bit weights anew, and rounds their scales
        y, (weight, bias) = model(x), layer.effective()
        model.merge_adapter(safe_merge=True)
        found = model(x)
        assert type(layer.base_layer._parameters[layer.host.parameter]) is type(before[layer.host.parameter])
        fresh = quantised(q, weight=weight).eval()
        close(found, fresh(x) - host_bias(fresh) + (0 if bias is None else bias), max(1e-4, q.noise), "merged output")
        model.unmerge_adapter()
        assert torch.equal(model(x), y)
    assert all(layer.base_layer._parameters[name] is old for name, old in before.items())


def host_bias(layer: nn.Module) -> Tensor:
    return host_class(layer)(layer).bias()  # type: ignore[misc]


@pytest.mark.parametrize("q", PARAMS)
def test_the_weight_is_what_the_layer_applies(q):
    layer = quantised(q)
    host = host_class(layer)(layer)  # type: ignore[misc]
    assert (host.out_features, host.in_features) == host.weight().shape == (96, 64)
    assert host.backend == q.backend
    close(F.linear(batch(), host.weight(), host.bias()), layer(batch()), q.noise, "weight and layer")
