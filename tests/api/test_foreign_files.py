"""Adapter files for and from other programs: serving engines that read ours, training tools that wrote theirs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import peft
from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from tests import models

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture
def adapted():
    return get_peft_model(models.build("llama"), LoraConfig(**LORA, target_modules=["q_proj", "down_proj"])).eval()


def _output(model) -> torch.Tensor:
    return models.run(model, models.example("llama"))


class TestReaders:
    """What vLLM, SGLang, text-generation-inference, llama.cpp and ollama look for in an adapter folder."""

    @pytest.fixture
    def config(self, adapted, tmp_path) -> dict:
        adapted.save_pretrained(tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())

    def test_config(self, config):
        assert config["peft_type"] == "LORA"
        assert isinstance(config["target_modules"], list)
        assert type(config["r"]) is int
        assert type(config["lora_alpha"]) is int, "ollama decodes it into an unsigned integer"
        assert config["bias"] == "none"
        assert config["modules_to_save"] is None
        assert config["use_dora"] is False
        assert config["inference_mode"] is True
        assert list(config) == sorted(config)

    def test_names_of_tensors(self, config, tmp_path):
        names = peft.load_peft_weights(str(tmp_path), device="cpu").keys()
        pattern = re.compile(r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")
        assert names
        assert all(pattern.fullmatch(name) for name in names)

    def test_shapes_of_tensors(self, config, tmp_path):
        tensors = peft.load_peft_weights(str(tmp_path), device="cpu")
        assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 128)
        assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (64, 4)
        assert all(tensor.is_contiguous() for tensor in tensors.values())


class TestWriters:
    """Folders as other tools write them."""

    def _write(self, adapted, place, config: dict) -> None:
        save_file(peft.get_peft_model_state_dict(adapted), place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))

    MINIMAL = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "peft_type": "LORA"}

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"base_model_name_or_path": "somewhere/else"},
            {"task_type": None, "bias": "none", "inference_mode": False},
            {"task_type": "CAUSAL_LM", "peft_version": "0.5.0", "revision": None},
        ],
        ids=["torchtune", "torchtune with base", "verl", "old"],
    )
    def test_few_fields(self, adapted, tmp_path, more):
        self._write(adapted, tmp_path, {**self.MINIMAL, **more})
        loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
        torch.testing.assert_close(_output(loaded), _output(adapted))

    def test_all_linear(self, adapted, tmp_path):
        everything = get_peft_model(models.build("llama"), LoraConfig(**LORA, target_modules="all-linear")).eval()
        self._write(everything, tmp_path, {**self.MINIMAL, "target_modules": "all-linear"})
        loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
        torch.testing.assert_close(_output(loaded), _output(everything))

    def test_fields_of_a_later_version_are_named_and_left_out(self, adapted, tmp_path):
        self._write(adapted, tmp_path, {**self.MINIMAL, "peft_version": "99.0", "from_the_future": 1})
        with pytest.warns(PeftWarning, match="from_the_future"):
            loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
        torch.testing.assert_close(_output(loaded), _output(adapted))

    def test_old_weights_file(self, adapted, tmp_path):
        torch.save(peft.get_peft_model_state_dict(adapted), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_config.json").write_text(json.dumps(self.MINIMAL))
        loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
        torch.testing.assert_close(_output(loaded), _output(adapted))
