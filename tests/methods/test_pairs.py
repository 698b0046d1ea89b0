"""Any two methods on one layer: each ordered pair of the registry, once, on one of a few kinds of layers."""

from __future__ import annotations

import copy
import itertools
import zlib

import pytest
import torch

import peft
from peft import registry
from peft.errors import ConfigError, TargetError
from peft.method import WeightMethod
from peft.testing import PLACES, close, merged, same, same_state, samples, state_of, train

KINDS = ("Linear, square, no bias", "Linear", "Conv2d, 1x1", "Embedding")
METHODS = sorted(
    name
    for name, method in registry.all_methods().items()
    if isinstance(method, WeightMethod) and method.copies is None
)
#: Orders matter to what composes, so a pair is tried in one order here and in the other on the next kind of layer.
PAIRS = [
    pair if zlib.crc32("".join(pair).encode()) % 2 else pair[::-1]
    for pair in itertools.combinations_with_replacement(METHODS, 2)
]


def stacked(first: str, second: str, kind: str) -> peft.PeftModel | None:
    """Adapters "one" and "two" on a layer, as if trained, both active; None where a method refuses the layer."""
    place = PLACES[kind]
    torch.manual_seed(0)
    model = place.build().double().requires_grad_(False)
    for number, method in enumerate((first, second)):
        name, config = ("one", "two")[number], place.target(samples(method)[0])
        try:
            if number:
                model.add_adapter(name, config)
            else:
                model = peft.PeftModel(model, config, name)
        except (TargetError, ConfigError):
            return None
        model.set_adapter(name)
        train(model, number)
    model.set_adapter(["one", "two"])
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("first", METHODS)
def test_every_pair_runs_as_it_merges(first):
    tried = 0
    for pair in (p for p in PAIRS if p[0] == first):
        kind = KINDS[zlib.crc32("+".join(pair).encode()) % len(KINDS)]
        model, x = stacked(*pair, kind), PLACES[kind].input(torch.float64)
        if model is None:
            continue
        tried += 1
        before, y = state_of(model), model(x)
        for name in ("two", "one"):
            model.base_model.merge_adapter([name])
            close(model(x), y, 1e-10, f"{pair} on {kind}: outputs before and after merging {name!r}")
        model.base_model.unmerge_adapter()
        same_state(state_of(model), before, f"{pair} on {kind}: before merging and after unmerging")
        close(merged(model)(x), y, 1e-10, f"{pair} on {kind}: outputs, running and merged")
    assert tried or first == METHODS[-1]


@torch.no_grad()
@pytest.mark.parametrize("first", METHODS)
def test_two_on_a_layer_are_saved_apart(first, tmp_path):
    second = METHODS[METHODS.index(first) - 3] if first != "LORA" else "ADALORA"
    for kind in ("Linear, square, no bias", "Embedding"):
        model, x = stacked(first, second, kind), PLACES[kind].input(torch.float64)
        if model is None:
            continue
        y = model(x)
        model.save_pretrained(tmp_path / kind)
        torch.manual_seed(0)
        bare = PLACES[kind].build().double()
        loaded = peft.PeftModel.from_pretrained(bare, tmp_path / kind / "one", adapter_name="one")
        loaded.load_adapter(tmp_path / kind / "two", "two")
        loaded.base_model.set_adapter(["one", "two"])
        close(loaded.eval()(x), y, 1e-12, f"{first} and {second} on {kind}: outputs, saved and loaded")


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding", "Parameter, 3-D"])
@pytest.mark.parametrize("pair", [("LORA", "ADALORA"), ("ADALORA", "LORA")], ids="-".join)
def test_lora_and_adalora_share_a_layer_though_their_tensors_share_names(pair, kind):
    """One holds `lora_A` as a layer with a weight, the other as a bare parameter; each keeps its names and dict."""
    model, x = stacked(*pair, kind), PLACES[kind].input(torch.float64)
    assert model is not None
    names = {name: {n for n, _ in model.named_parameters() if name in n.split(".")} for name in ("one", "two")}
    for name, method in zip(("one", "two"), pair, strict=True):
        alone = stacked(method, method, kind)
        assert names[name] == {n for n, _ in alone.named_parameters() if name in n.split(".")}
    held = model.base_model.model.layer._modules
    for entries in (held[n] for n in held if n.startswith("lora_") and len(held[n]) == 2):
        assert sorted(entries) == sorted(entries.keys()) == ["one", "two"]
        assert [v is entries[k] for k, v in entries.items()] == [True, True]
    model.set_adapter("two")
    y = model(x)
    model.delete_adapter("one")
    same(model(x), y, "outputs before and after the deletion of the other")
    assert not [n for n in model.state_dict() if "one" in n.split(".")]
    twin = copy.deepcopy(model)
    same(twin(x), y, "outputs of a model and its copy")
