"""Trained rows around an embedding that other adapters change too: two layers around one weight, tied to a third."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel
from peft.errors import BaseMismatchError

IDS = torch.arange(12)[None]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


CONFIGS = {
    "whole": LoraConfig(r=2, target_modules=["embed"]),
    "rows": LoraConfig(r=2, target_modules=["head"], trainable_token_indices={"embed": [1, 3]}),
}


def model() -> PeftModel:
    first, second = CONFIGS
    made = PeftModel(Tied().double(), CONFIGS[first], first)
    made.add_adapter(second, CONFIGS[second])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(f".{adapter}" in name for adapter in CONFIGS):
                parameter.add_(torch.randn_like(parameter))
    return made.eval()


def outputs(made: PeftModel) -> dict[tuple[str, ...], torch.Tensor]:
    found = {}
    with torch.no_grad():
        for names in ((), ("whole",), ("rows",), ("whole", "rows"), ("rows", "whole")):
            with made.use(*names) if names else made.disable_adapter():
                found[names] = made(IDS)
    return found


@pytest.mark.parametrize("active", [["whole"], ["rows"], ["whole", "rows"], ["rows", "whole"]])
@pytest.mark.parametrize("merges", [*itertools.permutations(CONFIGS), ("whole",), ("rows",), (None,)])
def test_no_merge_changes_any_output(active, merges):
    made = model()
    made.set_adapter(active)
    before, weight = outputs(made), Tied().double().embed.weight
    torch.testing.assert_close(before["whole", "rows"], before["rows", "whole"])  # rows are what is left
    for name in merges:
        made.base_model.merge_adapter(None if name is None else [name])
        for names, now in outputs(made).items():
            torch.testing.assert_close(now, before[names])
    made.base_model.unmerge_adapter()
    assert torch.equal(made.base_model.model.head.get_base_layer().weight, weight)
    assert all(torch.equal(now, before[names]) for names, now in outputs(made).items())


@pytest.mark.parametrize("first", CONFIGS)
def test_what_was_merged_before_stays_when_all_is_unloaded(first):
    made = model()
    made.set_adapter(list(CONFIGS))
    with torch.no_grad():
        expected = made(IDS)
        made.base_model.merge_adapter([first])
        torch.testing.assert_close(made.merge_and_unload()(IDS), expected)


@pytest.mark.parametrize("target", ["embed", "head"])
def test_an_adapter_joins_an_embedding_whose_rows_train(target, tmp_path):
    made = PeftModel(Tied().double(), CONFIGS["rows"], "rows")
    made.add_adapter("new", LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    made.set_adapter("new")
    with torch.no_grad():
        expected = made.eval()(IDS)
        assert not torch.equal(expected, Tied().double()(IDS))
        made.save_pretrained(tmp_path)
        alone = PeftModel.from_pretrained(Tied().double(), tmp_path / "new")  # without rows around the layer
        torch.testing.assert_close(alone(IDS), expected)
        alone.save_pretrained(tmp_path / "alone")
        made.load_adapter(tmp_path / "alone", "again")
        with made.use("again"):
            torch.testing.assert_close(made(IDS), expected)
        assert made.merge_and_unload()(IDS).allclose(expected)


@pytest.mark.parametrize("merged", [["whole"], ["rows"], ["whole", "rows"]])
def test_the_base_is_known_again_whatever_is_merged(merged, tmp_path):
    made = model()
    made.base_model.merge_adapter(merged)
    made.save_pretrained(tmp_path)
    for name in CONFIGS:
        PeftModel.from_pretrained(Tied().double(), tmp_path / name)
        made.load_adapter(tmp_path / name, f"{name}_again")
    other = Tied().double()
    with torch.no_grad():
        other.embed.weight.add_(1)
    for name in CONFIGS:
        with pytest.raises(BaseMismatchError):
            PeftModel.from_pretrained(other, tmp_path / name)
