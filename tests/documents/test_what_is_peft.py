"""The first document: LoRA on GPT-2, its code as it stands there."""

from __future__ import annotations

import torch

from tests.documents import local_hub

CODE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import get_peft_model, LoraConfig
import os
model_name = "gpt2"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)
# Configure LoRA parameters
lora_config = LoraConfig(
    r=8, # rank of LoRA matrices
    lora_alpha=32, # scaling factor
    target_modules=["c_attn"], # modules to apply LoRA
    lora_dropout=0.1,
    bias="none"
)
# Wrap model with PEFT LoRA
peft_model = get_peft_model(model, lora_config)
# Now only LoRA parameters are trainable
for name, param in peft_model.named_parameters():
    print(f"{name}: {param.requires_grad}")
# Example input
inputs = tokenizer("Hello, PEFT!", return_tensors="pt")
outputs = peft_model(**inputs)
print(outputs.logits.shape)
"""


def test_code_prints_what_the_document_says(tmp_path, monkeypatch, capsys):
    local_hub.gpt2(tmp_path, "Hello, PEFT!")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict = {}
    exec(CODE, names)
    *parameters, shape = capsys.readouterr().out.splitlines()

    trainable = dict(line.rsplit(": ", 1) for line in parameters)
    assert {name for name, flag in trainable.items() if flag == "True"} == {
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{side}.default.weight"
        for layer in (0, 1)
        for side in "AB"
    }
    assert trainable["base_model.model.transformer.wte.weight"] == "False"
    assert trainable["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"] == "False"
    assert shape == "torch.Size([1, 4, 50257])"
    assert torch.isfinite(names["outputs"].logits).all()
