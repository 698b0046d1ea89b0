"""Files that lack some of an adapter: with strict=False, what is missing starts neutral, whatever the layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig, PeftModel


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.fc(self.embed(x))))


IDS = torch.arange(6)[None]


def saved(folder, lacking: str, **options) -> None:
    """An adapter of all layers, trained; its file lacks names with that word."""
    model = PeftModel(Tied(), LoraConfig(r=2, target_modules=["embed", "fc", "head"], **options))
    _perturb(model)
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if lacking not in name}, path)


def _perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("lacking", ["", "lora_embedding_B", "lora_A"])
def test_what_is_missing_is_neutral(tmp_path, init, lacking):
    saved(tmp_path, lacking, init_lora_weights=init)
    path = tmp_path / "adapter_model.safetensors"
    if not lacking:
        save_file({"base_model.model.fc.lora_A.weight": torch.zeros(2, 8)}, path)
    loaded = PeftModel.from_pretrained(Tied(), tmp_path, strict=False)
    held = load_file(path)
    whole = [n for n in ("embed", "fc") if sum(f".{n}." in name for name in held) == 2]
    alone = PeftModel(Tied(), LoraConfig(r=2, target_modules=whole or ["fc"]))
    if whole:
        alone.load_adapter(tmp_path, "default", strict=False)
    torch.testing.assert_close(loaded(IDS), alone(IDS))


def test_tied_layers_stay_tied_and_ranks_as_they_were(tmp_path):
    saved(tmp_path, "lora_embedding", rank_pattern={"fc": 5})
    save_file({"base_model.model.fc.lora_A.weight": torch.zeros(5, 8)}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(Tied(), tmp_path, strict=False, is_trainable=True)
    assert loaded.base_model.model.fc.lora_B["default"].weight.shape == (8, 5)
    _perturb(loaded)
    expected = loaded(IDS)
    merged = loaded.merge_and_unload()
    assert merged.head.weight is merged.embed.weight
    torch.testing.assert_close(merged(IDS), expected, atol=1e-3, rtol=1e-4)
