"""Adapters through transformers' own methods (`model.add_adapter`, `load_adapter`, …), which call this library."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from tests import models

LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def model():
    return models.build("llama")


def _run(model) -> torch.Tensor:
    return models.run(model, models.example("llama"))


def test_add_disable_enable(model):
    base = _run(model)
    model.add_adapter(LoraConfig(**LORA))
    adapted = _run(model)
    assert not torch.equal(adapted, base)
    model.disable_adapters()
    assert torch.equal(_run(model), base)
    model.enable_adapters()
    assert torch.equal(_run(model), adapted)
    assert model.active_adapters() == ["default"]


def test_two_adapters(model):
    model.add_adapter(LoraConfig(**LORA), adapter_name="one")
    one = _run(model)
    model.add_adapter(LoraConfig(**LORA), adapter_name="two")
    model.set_adapter("two")
    assert not torch.equal(_run(model), one)
    model.set_adapter("one")
    assert torch.equal(_run(model), one)
    model.delete_adapter("two")
    assert torch.equal(_run(model), one)
    assert list(model.peft_config) == ["one"]


def test_save_and_load(model, tmp_path):
    model.add_adapter(LoraConfig(**LORA))
    expected = _run(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = models.build("llama")
    again.load_adapter(str(tmp_path))
    again.eval()
    torch.testing.assert_close(_run(again), expected)
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
    torch.testing.assert_close(_run(ours), expected)


def test_transformers_reads_what_we_save(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).eval()
    expected = _run(adapted)
    adapted.save_pretrained(tmp_path)
    again = models.build("llama")
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(_run(again.eval()), expected)


def test_auto_model_finds_the_base_of_an_adapter_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        torch.testing.assert_close(_run(loaded.eval()), _run(adapted))


def test_state_dict_of_an_adapter(model):
    model.add_adapter(LoraConfig(**LORA), adapter_name="given")
    state = model.get_adapter_state_dict("given")
    assert state.keys() == peft.get_peft_model_state_dict(model, adapter_name="given").keys()
