"""Base models whose weights accelerate keeps elsewhere and brings for each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peft
from peft import PeftModel, get_peft_model
from peft.errors import UnsupportedError
from tests.models import build

hooks = pytest.importorskip("accelerate.hooks")
cpu_offload: Any = pytest.importorskip("accelerate").cpu_offload
CONFIGS: dict[str, Any] = {
    "LoRA": lambda where: peft.LoraConfig(r=2, target_modules=where, init_lora_weights=False),
    "DoRA": lambda where: peft.LoraConfig(r=2, target_modules=where, init_lora_weights=False, use_dora=True),
    "HiRA": lambda where: peft.HiraConfig(r=2, target_modules=where, init_weights=False),
    "VeRA": lambda where: peft.VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "IA3": lambda where: peft.IA3Config(target_modules=where, feedforward_modules=[], init_ia3_weights=False),
}


def tiny_llama() -> Any:
    torch.manual_seed(1)
    return build("llama").eval()


IDS = torch.arange(6)[None]


def offloaded(model: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """An adapter in a folder, and what the model answers with it."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), CONFIGS[request.param](["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    return tmp_path, wanted


@pytest.mark.parametrize("grad", [False, True])
def test_an_adapter_is_loaded_onto_an_offloaded_model(saved, grad):
    path, wanted = saved
    model = PeftModel.from_pretrained(offloaded(tiny_llama()), path).eval()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(IDS).logits, wanted)


def test_a_model_with_adapters_is_offloaded(saved):
    path, wanted = saved
    model = offloaded(PeftModel.from_pretrained(tiny_llama(), path).eval())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted)


def test_a_new_adapter_has_values_and_trains():
    torch.manual_seed(0)
    model = get_peft_model(offloaded(tiny_llama()), CONFIGS["DoRA"](["q_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert not any(p.is_meta for p in trained)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_merging_says_what_to_do():
    base = tiny_llama()
    model: Any = get_peft_model(offloaded(base), CONFIGS["LoRA"](["q_proj"])).eval()
    with pytest.raises(UnsupportedError, match="remove_hook_from_submodules"):
        model.merge_and_unload()
    with torch.no_grad():
        wanted = model(IDS).logits
    hooks.remove_hook_from_submodules(model.get_base_model())
    merged: nn.Module = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ],
)
def test_an_offloaded_module_is_not_trained_whole(config):
    with pytest.raises(UnsupportedError, match="offloading"):
        get_peft_model(offloaded(tiny_llama()), config())
