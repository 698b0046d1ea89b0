"""Weighted adapters and conversion on models: what the new adapter adds is what was promised, on every host."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig
from peft.combine.changes import adapted, dense_change
from peft.combine.files import combine_files
from peft.combine.terms import COMBINATION_TYPES, SUMS
from peft.errors import AdapterNameError, ConfigError, PeftWarning, UnsupportedError

TARGETS = ["emb", "lin", "conv", "attn"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 12))

    def forward(self, x):
        return torch.einsum("btn,emn->btm", x, self.stack)


class Zoo(nn.Module):
    """One layer of each kind: embedding, linear, grouped convolution, attention, expert stack."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 6)
        self.lin = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 12, 3, groups=4, padding=1)
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.moe = Experts()

    def forward(self, ids):
        h = self.conv(self.lin(self.emb(ids)).mT).mT
        return self.moe(self.attn(h, h, h)[0])


IDS = torch.arange(14).view(2, 7)
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "target_parameters": ["moe.stack"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["lin", "conv"]},
    "patterns": {
        "r": 4,
        "rank_pattern": {"lin": 2},
        "alpha_pattern": {"conv": 7},
        "target_modules": ["lin", "conv", "emb"],
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": ["lin", "emb"]},
}


def noise(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g, dtype=parameter.dtype) / 3)


def zoo(*names, configs=CONFIGS):
    torch.manual_seed(0)
    first, *others = names
    model = peft.get_peft_model(Zoo().double(), LoraConfig(**configs[first]), adapter_name=first)
    for name in others:
        model.add_adapter(name, LoraConfig(**configs[name]))
    noise(model)
    return model.eval()


def changes(model, name):
    return {
        key: dense_change(layer, name)
        for _, key, layer in adapted(model.base_model.model)
        if name in layer.available_adapters
    }


def expected(model, weights):
    total = {}
    for name, weight in weights.items():
        for key, delta in changes(model, name).items():
            total[key] = total.get(key, 0) + weight * delta
    return total


@pytest.mark.parametrize("kind", SUMS)
def test_the_new_adapter_is_the_sum_on_every_host(kind):
    model = zoo("plain", "rslora", "patterns")
    model.base_model.model.lin.scaling["rslora"] *= 0.5
    weights = {"plain": 0.7, "rslora": -1.5, "patterns": 0.3}
    report = model.add_weighted_adapter(list(weights), list(weights.values()), "sum", kind)
    new = changes(model, "sum")
    assert report.error < 1e-10
    for key, delta in expected(model, weights).items():
        assert torch.allclose(new[key], delta, atol=1e-10), key
    assert set(new) == {"emb", "lin", "conv", "attn", "attn.out_proj", "moe.stack"}


def test_dora_takes_part_as_what_merging_it_does():
    model = zoo("plain", "dora")
    weights = {"plain": 0.5, "dora": -2.0}
    exact = model.add_weighted_adapter(list(weights), list(weights.values()), "sum", svd_rank=20)
    assert exact.error < 1e-10
    for key, delta in expected(model, weights).items():
        assert torch.allclose(changes(model, "sum")[key], delta, atol=1e-10), key
    assert not model.peft_config["sum"].use_dora
    cut = model.add_weighted_adapter(list(weights), list(weights.values()), "cut", svd_rank=3)
    delta = expected(model, weights)["lin"]
    measured = float((changes(model, "cut")["lin"] - delta).norm() / delta.norm())
    assert cut.errors["lin"] == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
def test_one_adapter_of_weight_one_runs_as_itself(name):
    model = zoo(name)
    output = model(IDS)
    model.add_weighted_adapter([name], [1.0], "same", "linear")
    model.set_adapter("same")
    assert torch.allclose(model(IDS), output, atol=1e-10)


def test_biases_take_part():
    config = {"r": 2, "lora_bias": True, "target_modules": ["lin"]}
    model = zoo("one", "two", configs={"one": {**config, "lora_alpha": 6}, "two": {"r": 3, "target_modules": ["lin"]}})
    model.base_model.set_adapter(["one", "two"])
    both = model(IDS)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(model(IDS), both, atol=1e-10)
    with pytest.warns(PeftWarning, match="leaves out the biases"):
        model.add_weighted_adapter(["one"], [1.0], "theirs", "linear", reference=True)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_every_type_on_every_host_runs_saves_and_loads(tmp_path, kind):
    model = zoo("plain", "patterns")
    options = {} if kind in SUMS else {"density": 0.5, "generator": torch.Generator().manual_seed(0)}
    model.add_weighted_adapter(["plain", "patterns"], [1.0, -0.5], "new", kind, svd_rank=3, **options)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Zoo().double(), tmp_path / "new").eval()
    saved, loaded = (peft.get_peft_model_state_dict(m, adapter_name=n) for m, n in ((model, "new"), (again, "default")))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert torch.allclose(again(IDS), model(IDS))


@pytest.mark.parametrize("kind", ["svd", "cat", "magnitude_prune", "ties"])
def test_files_and_models_agree(tmp_path, kind):
    deep = {"rank_pattern": {"moe.stack": 3, "attn.out_proj": 2}, "alpha_pattern": {"out_proj": 5, "stack": 9}}
    deep["allow_unmatched"] = True
    model = zoo("plain", "patterns", configs={**CONFIGS, "plain": {**CONFIGS["plain"], **deep}})
    model.save_pretrained(tmp_path)
    options = {} if kind in SUMS else {"density": 0.5}
    model.add_weighted_adapter(["plain", "patterns"], [1.0, -0.5], "new", kind, **options)
    places = [tmp_path / "plain", tmp_path / "patterns"]
    combine_files(places, [1.0, -0.5], tmp_path / "new", kind, **options)
    model.load_adapter(tmp_path / "new", "from_files")
    new = changes(model, "new")
    for key, delta in changes(model, "from_files").items():
        assert torch.allclose(delta, new[key], atol=1e-10), key


def test_nothing_else_changes():
    model = zoo("plain", "rslora")
    model.set_adapter("plain")
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    output, state = model(IDS), torch.get_rng_state()
    model.add_weighted_adapter(["rslora", "plain"], [1.0, 1.0], "sum")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].requires_grad == trains for n, (p, trains) in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.active_adapter == "plain"
    assert torch.equal(model(IDS), output)


REFUSED = {
    "unknown": (["plian"], [1.0], "new", {}, AdapterNameError, "Did you mean 'plain'"),
    "taken": (["plain"], [1.0], "rslora", {}, AdapterNameError, "already"),
    "weights": (["plain"], [1.0, 2.0], "new", {}, ConfigError, "one weight per adapter"),
    "type": (["plain"], [1.0], "new", {"combination_type": "liner"}, ConfigError, "Did you mean 'linear'"),
    "density": (["plain"], [1.0], "new", {"combination_type": "ties"}, ConfigError, "needs `density`"),
    "bias": (["plain", "biased"], [1.0, 1.0], "new", {}, UnsupportedError, "lora_bias"),
    "dora": (["dora"], [1.0], "new", {"reference": True}, UnsupportedError, "DoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(name):
    adapters, weights, new, options, error, message = REFUSED[name]
    configs = {**CONFIGS, "biased": {"r": 2, "lora_bias": True, "target_modules": ["lin"]}}
    model = zoo("plain", "rslora", "biased", "dora", configs=configs)
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(adapters, weights, new, **options)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["plain", "rslora", "biased", "dora"]


def test_rank_and_alpha_patterns_reach_only_their_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.inner = nn.Sequential()
            self.inner.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(self.lin(x))

    model = peft.get_peft_model(Twice(), LoraConfig(r=2, target_modules=["lin"]), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["inner.lin"]))
    noise(model)
    report = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert report.ranks == {"lin": 2, "inner.lin": 4}
    layers = {key: layer for _, key, layer in adapted(model.base_model.model)}
    assert {key: layer.r["sum"] for key, layer in layers.items()} == report.ranks
    assert {layer.scaling["sum"] for layer in layers.values()} == {1.0}


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_at_full_rank_is_the_adapter(tmp_path, name):
    model = zoo(name)
    report = peft.save_as_lora(tmp_path, model, None, name)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Zoo().double(), tmp_path).eval()
    assert report.error < 1e-10
    assert torch.allclose(again(IDS), model(IDS), atol=1e-10)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"], config["use_rslora"]) == ("LORA", False, False)


@pytest.mark.parametrize("rank", [2, 0.9])
def test_conversion_says_what_it_loses(rank):
    model = zoo("dora")
    (config, tensors), report = (found := peft.convert_to_lora(model, rank, "dora")), found.report
    A, B = (tensors[f"base_model.model.lin.lora_{x}.weight"] for x in "AB")
    delta = changes(model, "dora")["lin"][0]
    assert report.errors["lin"] == pytest.approx(float((B @ A - delta).norm() / delta.norm()), rel=1e-6)
    if isinstance(rank, float):
        assert report.errors["lin"] ** 2 <= 1 - rank
    assert config.rank_pattern.get("lin", config.r) == A.shape[0] == report.ranks["lin"]


EXTRAS = {
    "a whole module": {"modules_to_save": ["moe"]},
    "rows of an embedding": {"trainable_token_indices": {"emb": [1, 3]}},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_conversion_hands_on_what_else_was_trained(tmp_path, name):
    model = zoo("one", configs={"one": {"r": 2, "use_dora": True, "target_modules": ["lin"], **EXTRAS[name]}})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    peft.save_as_lora(tmp_path, model, None, "one")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Zoo().double(), tmp_path).eval()
    assert torch.allclose(again(IDS), model(IDS), atol=1e-10)


def test_conversion_refuses_what_is_no_change_of_a_weight():
    with pytest.raises(ConfigError, match="trains biases"):
        peft.convert_to_lora(peft.get_peft_model(Zoo(), LoraConfig(target_modules=["lin"], bias="all")), 2)
    with pytest.raises(AdapterNameError):
        peft.convert_to_lora(zoo("plain"), 2, "other")
    with pytest.raises(ConfigError, match="rank is an integer"):
        peft.convert_to_lora(zoo("plain"), 0, "plain")
