"""Methods whose layers share tensors: seeds mean what they mean to the reference, files hold what theirs hold."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import peft
from peft import registry
from peft.errors import PeftWarning, UnsupportedError
from peft.method import WeightMethod
from peft.testing import Holder, samples, train
from tests.methods.both import run

DRAW = """
    from torch import nn

    base = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    config = getattr(peft, kind)(target_modules=["0", "1"], **options)
    model = peft.get_peft_model(base, config)
    result = {n: t.tolist() for n, t in model.named_buffers() if any(n.endswith(f"{name}.default") for name in names)}
"""


def adapted(config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), config)


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("VeraConfig", {"r": 4, "projection_prng_key": 7}, ["vera_A", "vera_B"]),
        ("PveraConfig", {"r": 4, "projection_prng_key": 7}, ["pvera_A", "pvera_B"]),
        ("RandLoraConfig", {"r": 4, "projection_prng_key": 7}, ["randlora_A", "randlora_B"]),
        ("RandLoraConfig", {"r": 4, "sparse": True}, ["randlora_A", "randlora_B"]),
        ("RandLoraConfig", {"r": 4, "very_sparse": True}, ["randlora_A", "randlora_B"]),
        ("TinyLoraConfig", {"u": 4, "projection_seed": 7}, ["tinylora_P"]),
        ("UniLoraConfig", {"theta_d_length": 50, "proj_seed": 7}, ["unilora_indices_A", "unilora_scales_B"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_seeds_draw_what_the_reference_draws(pair, kind, options, names):
    ours, reference = (run(s, DRAW, kind=kind, options=options, names=names) for s in (pair.ours, pair.reference))
    assert reference
    assert ours.keys() == reference.keys()
    for name, values in reference.items():
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(values), rtol=1e-6, atol=1e-7)


def test_shared_tensors_are_one_tensor():
    model = adapted(peft.VeraConfig(r=4, target_modules=["0", "1"]))
    first, second = model.base_model.model
    assert first.vera_A["default"] is second.vera_A["default"]
    assert sum("vera_A" in name for name, _ in model.named_buffers()) == 1


def test_deleting_one_adapter_leaves_the_bank_of_the_other():
    model = adapted(peft.VBLoRAConfig(num_vectors=6, vector_length=4, target_modules=["0", "1"]))
    model.add_adapter("other", peft.VBLoRAConfig(num_vectors=5, vector_length=2, target_modules=["0"]))
    x = torch.randn(3, 12)
    before = model(x)
    model.delete_adapter("other")
    torch.testing.assert_close(model(x), before)
    assert list(model.base_model.vblora_vector_bank) == ["default"]


def test_topk_files_keep_the_output_and_refuse_training(tmp_path):
    config = peft.VBLoRAConfig(
        num_vectors=300, vector_length=4, topk=3, save_only_topk_weights=True, target_modules=["0", "1"]
    )
    model = adapted(config).eval()
    x = torch.randn(3, 12)
    expected = model(x)
    state = peft.get_peft_model_state_dict(model)
    index = state["base_model.model.0.vblora_logits_A_topk_indices"]
    assert index.dtype == torch.int16
    assert index.shape[-1] == 3
    assert state["base_model.model.0.vblora_logits_A_topk_weights"].shape[-1] == 2
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    loaded.set_requires_grad("default")
    loaded.train()
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        loaded(x)


def test_vectors_tied_over_all_layers_train_together():
    model = adapted(peft.TinyLoraConfig(u=4, weight_tying=1.0, target_modules=["0", "1"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["base_model.model.0.tinylora_v.default.0"]


def test_noise_of_pvera_ends_with_training():
    model = adapted(peft.PveraConfig(r=4, init_weights=False, target_modules=["0"]))
    x = torch.randn(3, 12)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_pvera_draws_the_same_noise_from_the_same_seed():
    config = {"r": 4, "init_weights": False, "generator_seed": 5, "target_modules": ["0"]}
    x = torch.randn(3, 12)
    one, two = (adapted(peft.PveraConfig(**config)).train() for _ in range(2))
    torch.manual_seed(1)
    first = one(x)
    torch.manual_seed(2)
    torch.testing.assert_close(two(x), first)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3, groups=2)], ids=str)
def test_pvera_draws_about_the_mean_on_every_layer(layer, monkeypatch):
    config = peft.PveraConfig(r=3, init_weights=False, target_modules=["layer"])
    model = peft.get_peft_model(Holder(copy.deepcopy(layer)), config).train()
    x = torch.randn(2, 4, 4)
    mean = model.eval()(x)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    torch.testing.assert_close(model.train()(x), mean)


def test_pvera_draws_alike_on_vectors_and_on_single_patches():
    outputs = []
    for layer in (nn.Linear(4, 6), nn.Conv1d(4, 6, 1)):
        torch.manual_seed(0)
        shape = layer.weight.shape
        layer.weight.data, layer.bias.data = torch.randn(6, 4).view(shape), torch.randn(6)
        config = peft.PveraConfig(r=3, init_weights=False, target_modules=["layer"])
        model = peft.get_peft_model(Holder(layer), config).train()
        torch.manual_seed(1)
        x = torch.randn(5, 4)
        outputs.append(model(x if len(shape) == 2 else x[:, :, None]).flatten(1))
    torch.testing.assert_close(*outputs)


def test_a_layer_alone_can_not_have_a_share_of_uni_lora():
    from peft.tuners.unilora import Linear

    with pytest.raises(NotImplementedError, match="get_peft_model"):
        Linear(nn.Linear(4, 3), "default", config=peft.UniLoraConfig())


WEIGHT = [
    config
    for name, method in registry.all_methods().items()
    if isinstance(method, WeightMethod) and method.copies is None and not registry.is_third_party(name)
    for config in samples(name)
]


def named(config):
    return f"{config.peft_type}-{samples(config.peft_type).index(config)}"


@pytest.mark.filterwarnings("ignore::peft.errors.PeftWarning")
@pytest.mark.parametrize("config", WEIGHT, ids=named)
def test_what_is_merged_meanwhile_does_not_show_in_a_new_adapter(config, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 24)), torch.randn(3, 8)
    config = replace(config, target_modules=["0", "1"])
    states, models = [], []
    for merged in (False, True):
        lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["0", "1"])
        model = peft.get_peft_model(copy.deepcopy(base), lora, "first").eval()
        train(model, seed=3, amount=1.0)
        if merged:
            model.merge_adapter()
        torch.manual_seed(1)
        model.add_adapter("second", copy.deepcopy(config))
        if merged:
            model.unmerge_adapter()
        model.set_adapter("second")
        states.append(peft.get_peft_model_state_dict(model, adapter_name="second"))
        models.append(model)
    plain, late = models
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), late.eval()(x))
        train(late, seed=4)
        late.save_pretrained(tmp_path, selected_adapters=["second"])
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second").eval()
        torch.testing.assert_close(loaded(x), late(x))


@pytest.mark.parametrize("config", WEIGHT, ids=named)
def test_scale_of_one_is_the_one_that_an_adapter_begins_with(config):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 12)), replace(config, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.set_scale("elsewhere", 0.0)
    if "scaling" not in registry.method(config.peft_type).settings:
        with pytest.raises(UnsupportedError, match=f"{config.peft_type.value} has no scaling"):
            layer.set_scale("default", 0.0)
        with pytest.warns(PeftWarning, match=f"{config.peft_type.value} has no scaling"):
            layer.scale_layer(0.5)
        layer.set_scale("default", 1.0)
        return
    first = layer.scaling["default"]
    layer.rename_adapter("default", "renamed")
    layer.set_adapter("renamed")
    for scale, change in ((0.5, layer.scale_layer), (1, lambda _: layer.unscale_layer())):
        change(scale)
        assert layer.scaling["renamed"] == first * scale
    layer.scaling["renamed"] = -1.0
    for scale in (0.0, 1.0, 3.0):
        layer.set_scale("renamed", scale)
        assert layer.scaling["renamed"] == first * scale


def test_scaling_a_layer_names_the_adapter_that_can_not_follow():
    model = adapted(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    model.add_adapter("turn", peft.OFTConfig(oft_block_size=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.set_adapter(["default", "turn"])
    with pytest.warns(PeftWarning, match="'turn' stays as strong as it is: OFT"):
        layer.scale_layer(0.5)
    assert layer.scaling["default"] == 1.5
