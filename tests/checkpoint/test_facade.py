"""`save_pretrained` on whole models: what it writes, what it says, and what a failure leaves."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model
from peft.checkpoint import tensors
from peft.errors import SaveError
from peft.testing import train


def llama(folder) -> LlamaForCausalLM:
    """A base model that lies in a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def names(folder) -> set[str]:
    return set(tensors.read(folder / "adapter_model.safetensors"))


EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


def test_untrained_embeddings_stay_out(tmp_path):
    model = get_peft_model(llama(tmp_path / "base"), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter")
    assert not any("embed_tokens.weight" in n or "base_layer" in n for n in names(tmp_path / "adapter"))


def test_resized_embeddings_are_saved_and_loaded(tmp_path):
    base = llama(tmp_path / "base")
    base.resize_token_embeddings(24)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert names(tmp_path / "adapter") >= EMBEDDINGS
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(24)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.tensor([[1, 22, 23]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_resized_embeddings_stay_out_when_told(tmp_path):
    base = llama(tmp_path / "base")
    base.resize_token_embeddings(24)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert not names(tmp_path / "adapter") & EMBEDDINGS


def test_sizes_are_announced(tmp_path, caplog):
    model = get_peft_model(llama(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    with caplog.at_level(logging.INFO, "peft"):
        model.save_pretrained(tmp_path / "adapter")
    size = os.path.getsize(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"2 tensors, {size:,} bytes" in caplog.text


def test_a_shard_is_refused_and_leaves_the_old_adapter(tmp_path):
    model = get_peft_model(llama(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    state = {n: torch.empty(0) for n in model.state_dict() if "lora_" in n}
    with pytest.raises(SaveError, match="gather first"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before


KILLED = """
    import os, sys, torch
    from peft import LoraConfig, PeftModel
    from peft.checkpoint import files

    folder, after = sys.argv[1], int(sys.argv[2])
    count = 0

    def counted(function):
        def run(*args, **kwargs):
            global count
            count += 1
            if count == after:
                os._exit(9)
            return function(*args, **kwargs)
        return run

    model = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), folder, is_trainable=True,
                                      check_base=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(2.0)
    for name in ("rename", "replace", "fsync", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    model.save_pretrained(folder)
"""


@pytest.mark.parametrize("after", [1, 4, 7, 9, 12])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(tmp_path, after):
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4))

    model = PeftModel(base(), LoraConfig(r=2, target_modules=["0"]))
    train(model)
    model.save_pretrained(tmp_path)
    old = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(after)], check=False)
    assert done.returncode in (0, 9)
    found = PeftModel.from_pretrained(base(), tmp_path, check_base=False).state_dict()
    new = {n: torch.full_like(t, 2.0) for n, t in old.items()}
    assert any(all(torch.equal(found[n], t) for n, t in one.items()) for one in (old, new))
