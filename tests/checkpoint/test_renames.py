"""Adapters of one release of a model's code on another: modules renamed, experts fused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig, PeftModel
from peft.checkpoint.renames import renamed
from peft.errors import BaseMismatchError, LoadError, PeftWarning
from peft.testing import train


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x)))


def tree(*paths: str) -> nn.Module:
    """A model with a list of two layers at each of the paths, run one after the other."""
    torch.manual_seed(0)
    model = nn.Module()
    lists = []
    for path in paths:
        place = model
        *parts, leaf = path.split(".")
        for part in parts:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        lists.append(nn.ModuleList([Layer(), Layer()]))
        place.add_module(leaf, lists[-1])

    def forward(x):
        for layers in lists:
            for layer in layers:
                x = layer(x)
        return x

    model.forward = forward
    return model


OLD = ("vision_tower.model.layers", "language_model.model.layers")
NEW = ("model.vision_tower.layers", "model.language_model.layers")


@pytest.mark.parametrize(("there", "here"), [(OLD, NEW), (NEW, OLD)])
def test_renamed_modules_are_paired_by_structure(there, here, tmp_path):
    model = PeftModel(tree(*there), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning, match="paired by structure"):
        loaded = PeftModel.from_pretrained(tree(*here), tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_another_base_is_noticed_under_other_names(tmp_path):
    PeftModel(tree(*OLD), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    other = tree(*NEW)
    with torch.no_grad():
        other.model.language_model.layers[0].q_proj.weight += 1
    with pytest.raises(BaseMismatchError, match="other values"):
        PeftModel.from_pretrained(other, tmp_path)


def test_what_is_ambiguous_is_not_paired(tmp_path):
    model = PeftModel(tree("a.layers", "b.layers"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="renamed"):
        PeftModel.from_pretrained(tree("c.layers", "d.layers"), tmp_path)


def test_other_shapes_and_rests_are_not_paired():
    assert renamed({"x.0.q": (2, 3)}, {"y.0.q": (3, 2)}) is None
    assert renamed({"x.0.q": (2, 3), "x.1.q": (2, 3)}, {"y.0.q": (2, 3)}) is None
    assert renamed({"x.q": (2, 3)}, {"y.q": (2, 3)}) is None
    assert renamed({"x.h.0.q": (2, 3)}, {"y.h.0.q": (2, 3)}) == {"y.h.0.q": "x.h.0.q"}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*s, bias=False) for s in ((4, 6), (6, 4), (4, 6)))

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Apart(nn.Module):
    """Experts as modules, as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, x):
        return x + sum(expert(x) * (number + 1) for number, expert in enumerate(self.experts))


class Stack(nn.Module):
    def __init__(self, apart: Apart) -> None:
        super().__init__()
        gate_up = [torch.cat([e.w1.weight, e.w3.weight]) for e in apart.experts]
        self.gate_up_proj = nn.Parameter(torch.stack(gate_up).detach())
        self.down_proj = nn.Parameter(torch.stack([e.w2.weight for e in apart.experts]).detach())

    def forward(self, x):
        y = 0
        for number in range(3):
            gate, up = (x @ self.gate_up_proj[number].T).chunk(2, dim=-1)
            y = y + (nn.functional.silu(gate) * up) @ self.down_proj[number].T * (number + 1)
        return y


class Fused(nn.Module):
    """The same experts in stacks, as they are now."""

    def __init__(self, apart: Apart) -> None:
        super().__init__()
        self.experts = Stack(apart)

    def forward(self, x):
        return x + self.experts(x)


def mixtures() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    blocks = [Apart(), Apart()]
    old, new = nn.Module(), nn.Module()
    old.model, new.model = nn.Module(), nn.Module()
    old.model.layers, new.model.layers = nn.ModuleList(), nn.ModuleList()
    for block in blocks:
        before, after = nn.Module(), nn.Module()
        before.q_proj = after.q_proj = nn.Linear(4, 4)
        before.block_sparse_moe, after.mlp = block, Fused(block)
        old.model.layers.append(before), new.model.layers.append(after)
    old.forward = lambda x: _run(x, [(b.q_proj, b.block_sparse_moe) for b in old.model.layers])
    new.forward = lambda x: _run(x, [(b.q_proj, b.mlp) for b in new.model.layers])
    return old, new


def _run(x, blocks):
    for first, second in blocks:
        x = second(first(x))
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
        {
            "target_modules": ["w1", "w2", "w3"],
            "use_rslora": True,
            "rank_pattern": {"w3": 3},
            "alpha_pattern": {"w1": 5},
        },
        {"target_modules": ["w3"]},
        {"target_modules": ["q_proj", "w2"], "lora_alpha": 3},
    ],
)
def test_adapters_of_single_experts_fit_stacks(options, tmp_path):
    old, new = mixtures()
    model = PeftModel(old, LoraConfig(r=2, **options))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new, tmp_path, check_base=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_some_experts_alone_fit_stacks(tmp_path):
    old, new = mixtures()
    model = PeftModel(old, LoraConfig(r=2, target_modules=r".*experts\.[01]\.w2"))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new, tmp_path, check_base=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_an_expert_without_its_tensors_is_an_error(tmp_path):
    old, new = mixtures()
    PeftModel(old, LoraConfig(r=2, target_modules=["w2"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".experts.1." not in name}, path)
    with pytest.raises(LoadError, match="incomplete"):
        PeftModel.from_pretrained(new, tmp_path, check_base=False)
    PeftModel.from_pretrained(new, tmp_path, check_base=False, strict=False)
