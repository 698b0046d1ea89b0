"""The reference, safetensors and torch read what we write; we read what they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from peft.checkpoint import files, fingerprint, tensors
from tests.reference.install import ensure_reference

REFERENCE = """
import sys, torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
ours, theirs = sys.argv[1:]
def base():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 6)})
model = PeftModel.from_pretrained(base(), ours)
layer = model.base_model.model["q_proj"]
assert (layer.lora_A["default"].weight == 2).all() and (layer.lora_B["default"].weight == 3).all()
assert len(load_peft_weights(ours, device="cpu")) == 2
model.save_pretrained(theirs)
model.save_pretrained(theirs + "-bin", safe_serialization=False)
"""


def test_the_reference_reads_and_writes_the_same_files(tmp_path: Path) -> None:
    base = {"q_proj.weight": torch.randn(6, 4)}
    named = {
        "base_model.model.q_proj.lora_A.weight": torch.full((2, 4), 2.0),
        "base_model.model.q_proj.lora_B.weight": torch.full((6, 2), 3.0),
    }
    metadata = {fingerprint.METADATA_KEY: fingerprint.encode(fingerprint.sketch(base, {}))}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    files.save(ours, {files.CONFIG_NAME: json.dumps(config), files.SAFETENSORS_NAME: tensors.encode(named, metadata)})
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(ours), str(theirs)],
        env={**os.environ, "PYTHONPATH": str(ensure_reference()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder in (theirs, tmp_path / "theirs-bin"):
        found = tensors.read(files.locate(folder))
        assert found.keys() == named.keys()
        assert all(torch.equal(found[name], named[name]) for name in named)
        assert files.read_config(files.locate(folder, files.CONFIG_NAME))["r"] == 2


def test_safetensors_writes_the_same_bytes(tmp_path: Path) -> None:
    named = {"b": torch.randn(3, 5), "a": torch.randn(2).half(), "c": torch.arange(3), "d": torch.tensor([True])}
    with open(tmp_path / "ours.safetensors", "wb") as file:
        tensors.encode(named).write(file)
    safetensors.torch.save_file(named, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_torch_reads_our_pickles(tmp_path: Path) -> None:
    named = {"a": torch.randn(2, 3)}
    files.save(tmp_path, {files.BIN_NAME: tensors.encode(named, pickled=True)})
    found = torch.load(tmp_path / files.BIN_NAME, weights_only=True)
    assert torch.equal(found["a"], named["a"])
