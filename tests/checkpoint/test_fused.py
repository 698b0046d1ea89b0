"""Adapters of weights that another release holds in other pieces: experts as stacks or apart, q, k and v as one."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.checkpoint.fused import Layout, convert
from peft.errors import LoadError
from peft.testing import train
from tests.checkpoint.test_renames import mixtures

PREFIX = "base_model.model."


# ---------------------------------------------------------------- the law: every row of ΔW stays what it was


def factors(name: str, numbers: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    path, count = name.removesuffix(".weight"), numbers.shape[0]
    path = path if name.endswith(".weight") else path.rpartition(".")[0]
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(count * rank, 3),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(numbers.shape[1], count * rank),
    }


def delta_by_row(config, state, weights) -> dict[int, torch.Tensor]:
    """ΔW's row of each number."""
    found = {}
    for name, numbers in weights.items():
        path = name.removesuffix(".weight")
        place = path if name.endswith(".weight") else path.rpartition(".")[0]
        if f"{PREFIX}{place}.lora_A.weight" not in state:
            continue
        a, b = (state[f"{PREFIX}{place}.lora_{x}.weight"] for x in "AB")
        count = numbers.shape[0]
        rank = a.shape[0] // count
        said, alpha = config.rank_pattern.get(path, config.r), config.alpha_pattern.get(path, config.lora_alpha)
        assert said == rank
        delta = torch.einsum("ore,eri->eoi", b.view(-1, rank, count), a.view(count, rank, -1)) * alpha / rank
        found.update({int(n): row for n, row in zip(numbers.flatten(), delta.flatten(0, 1), strict=True)})
    return found


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_rows_keep_their_change(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    count, size = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4]))
    stack = {"m.experts.both": torch.arange(count * 2 * size).view(count, 2 * size)}
    order = torch.randperm(2 * size)  # whatever order a release's code has chosen
    apart = {
        f"m.experts.{e}.{name}.weight": stack["m.experts.both"][e, rows][None]
        for e in range(count)
        for name, rows in (("one", order[:size]), ("two", order[size:]))
    }
    together = data.draw(st.booleans()) and count > 1
    there, here = (stack, apart) if together else (apart, stack)
    used = [name for name in there if together or ".one." in name or data.draw(st.booleans())]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["one", "two"])
    config.target_parameters = ["m.experts.both"] if together else None
    state = {k: t for name in used for k, t in factors(name, there[name], 2).items()}
    changed, moved = convert(config, state, Layout(there, here), strict=False)
    paths = {path: path for name in here for path in [name.removesuffix(".weight")]}
    for table in ("rank_pattern", "alpha_pattern"):  # entries stand for the paths that they match
        entries = getattr(changed, table)
        setattr(changed, table, {p: v for p in paths for e, v in entries.items() if p == e or p.endswith("." + e)})
    before, after = delta_by_row(config, state, there), delta_by_row(changed, moved, here)
    for number, row in after.items():
        torch.testing.assert_close(row, before.get(number, torch.zeros(3)))
    assert before.keys() <= after.keys()


def test_what_did_not_move_is_left_alone():
    weights = {"a.weight": torch.arange(4)[None], "b.weight": torch.arange(4, 8)[None]}
    state = factors("a.weight", weights["a.weight"], 2)
    assert convert(LoraConfig(r=2, target_modules=["a"]), state, Layout(weights, dict(weights))) is None


# ---------------------------------------------------------------- experts by their names, without transformers


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_adapters_of_stacks_fit_single_experts(targets, tmp_path):
    old, new = mixtures()
    model = PeftModel(new, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(old, tmp_path, check_base=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.peft_config["default"].target_parameters is None


def test_ranks_come_back_after_both_ways(tmp_path):
    old, new = mixtures()
    model = PeftModel(old, LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]))
    train(model)
    model.save_pretrained(tmp_path / "old")
    PeftModel.from_pretrained(new, tmp_path / "old", check_base=False).save_pretrained(tmp_path / "new")
    back = PeftModel.from_pretrained(mixtures()[0], tmp_path / "new", check_base=False)
    assert (back.peft_config["default"].rank_pattern, back.peft_config["default"].r) == ({}, 2)
    x = torch.randn(3, 4)
    torch.testing.assert_close(back(x), model(x))


def test_other_methods_say_what_to_do(tmp_path):
    old, new = mixtures()
    PeftModel(old, LoraConfig(r=2, target_modules=["w1"], use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(LoadError, match="save_as_lora"):
        PeftModel.from_pretrained(new, tmp_path / "dora", check_base=False)
    PeftModel(mixtures()[0], IA3Config(target_modules=["w2"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(LoadError, match="only LoRA"):
        PeftModel.from_pretrained(new, tmp_path / "ia3", check_base=False)


# ---------------------------------------------------------------- layers that the caller says are fused


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(4, 10)
        else:
            self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.qkv(x) if hasattr(self, "qkv") else torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    apart, one = nn.Sequential(Attention(False), nn.Linear(10, 4)), nn.Sequential(Attention(True), nn.Linear(10, 4))
    state = apart.state_dict()
    for end in ("weight", "bias"):
        state[f"0.qkv.{end}"] = torch.cat([state.pop(f"0.{name}.{end}") for name in "qkv"])
    one.load_state_dict(state)
    return apart, one


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "rank_pattern": {"q(kv)?": 3}}])
def test_fused_layers_both_ways(options, tmp_path):
    apart, one = pair()
    for model, other, names in ((apart, one, list("qkv")), (pair()[1], pair()[0], ["qkv"])):
        tuned = PeftModel(model, LoraConfig(r=2, target_modules=[*names, "1"], **options))
        train(tuned)
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(other, tmp_path, check_base=False, fused={"qkv": list("qkv")})
        x = torch.randn(3, 4)
        torch.testing.assert_close(loaded(x), tuned(x))


def test_fused_layers_of_which_some_are_adapted(tmp_path):
    apart, one = pair()
    tuned = PeftModel(apart, LoraConfig(r=2, target_modules=["q", "v"]))
    train(tuned)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one, tmp_path, check_base=False, fused={"qkv": list("qkv")})
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), tuned(x))


def test_sizes_that_nothing_tells_are_an_error(tmp_path):
    apart, one = pair()
    PeftModel(apart, LoraConfig(r=2, target_modules=["k"])).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="not adapted"):
        PeftModel.from_pretrained(one, tmp_path, check_base=False, fused={"qkv": list("qkv")})


def test_what_is_fused_is_never_guessed(tmp_path):
    apart, one = pair()
    PeftModel(apart, LoraConfig(r=2, target_modules=list("qkv"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not found|does not fit"):
        PeftModel.from_pretrained(one, tmp_path, check_base=False)


# ---------------------------------------------------------------- transformers' own conversions


SMALL = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTURES = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "decoder_sparse_step": 1,
    },
}
LAYERS = {
    "mixtral": ("block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(params=MIXTURES)
def mixture(request):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SMALL, **MIXTURES[request.param])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return request.param, model


def write_as_4_57(folder, kind, model) -> dict[str, torch.Tensor]:
    """A file as transformers 4.57 and HF PEFT write it for experts that are modules; returns the change of stacks."""
    place, (gate, up, down) = LAYERS[kind]
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    torch.manual_seed(1)
    state, change = {}, {}
    for name, stack in stacks.items():
        layer = name.split(".mlp.")[0]
        parts = (gate, up) if name.endswith("gate_up_proj") else (down,)
        blocks = []
        for e in range(len(stack)):
            rows = []
            for part in parts:
                a = torch.randn(2, stack.shape[2])
                b = torch.randn(stack.shape[1] // len(parts), 2) / 10
                path = f"{PREFIX}{layer}.{place.format(e)}{part}"
                state |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
                rows.append(b @ a * 3)
            blocks.append(torch.cat(rows))
        change[name] = torch.stack(blocks)
    for name, module in model.named_modules():
        if "shared_expert." in name and isinstance(module, nn.Linear):
            for end, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                state[f"{PREFIX}{name}.lora_{end}.weight"] = torch.randn(shape)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [gate, up, down]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return change


def test_experts_of_the_last_major_release(mixture, tmp_path):
    kind, base = mixture
    before = {n: p.detach().clone() for n, p in base.named_parameters() if p.dim() == 3}
    change = write_as_4_57(tmp_path, kind, base)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for name, expected in change.items():
        torch.testing.assert_close(merged.get_parameter(name) - before[name], expected, atol=1e-5, rtol=1e-4)


def test_original_format_is_what_was_read(mixture, tmp_path):
    kind, base = mixture
    write_as_4_57(tmp_path / "old", kind, base)
    model = PeftModel.from_pretrained(base, tmp_path / "old")
    model.save_pretrained(tmp_path / "new", save_original_format=True)
    old, new = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("old", "new"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (sorted(config["target_modules"]), config["r"], config["rank_pattern"]) == (sorted(LAYERS[kind][1]), 2, {})


def test_fused_layers_that_transformers_splits_now(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    base = transformers.Dinov2Model(config).eval()
    names = ["q_proj", "gate_proj", "up_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=names, use_dora=True))
    train_parameters(model)
    x = torch.randn(1, 3, 28, 28)
    expected = model(x).last_hidden_state
    model.save_pretrained(tmp_path, save_original_format=True)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".mlp.weights_in.lora_A" in name for name in held)
    assert not any("gate_proj" in name for name in held)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(loaded(x).last_hidden_state, expected)


def train_parameters(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)


def test_transformers_own_loading_stacks_experts(mixture, tmp_path):
    kind, base = mixture
    before = {n: p.detach().clone() for n, p in base.named_parameters() if p.dim() == 3}
    change = write_as_4_57(tmp_path / "old", kind, base)
    base.load_adapter(str(tmp_path / "old"))
    for name, module in base.named_modules():
        if name.endswith((".experts", ".experts.base_layer")) and hasattr(module, "merge"):
            module.merge()
    for name, expected in change.items():
        path, _, leaf = name.rpartition(".")
        now = base.get_submodule(path).get_base_layer()._parameters[leaf]
        torch.testing.assert_close(now - before[name], expected, atol=1e-5, rtol=1e-4)
    assert base.peft_config["default"].target_modules == (set(LAYERS[kind][1]) if kind == "qwen2_moe" else set())


def test_transformers_own_loading_says_what_it_cannot_stack(mixture, tmp_path):
    kind, base = mixture
    write_as_4_57(tmp_path, kind, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = LAYERS[kind][1][:1]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"PeftModel\.from_pretrained"):
        base.load_adapter(str(tmp_path))


def test_transformers_own_loading_leaves_nothing_random(mixture, tmp_path):
    _, base = mixture
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = base(ids).logits
        model = PeftModel(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path)
        base = model.unload()
        path = tmp_path / "adapter_model.safetensors"
        save_file({name.replace("q_proj", "query"): t for name, t in load_file(path).items()}, path)
        base.load_adapter(str(tmp_path))  # transformers reports the names, and goes on
        torch.testing.assert_close(base(ids).logits, expected)
