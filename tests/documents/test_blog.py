"""The third document, the announcement: mt0-large with LoRA, its numbers, saving, and loading for inference."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MT5Config, MT5ForConditionalGeneration

from peft import LoraConfig, TaskType, get_peft_model
from tests.documents import local_hub

TRAINING = """
from transformers import AutoModelForSeq2SeqLM
from peft import get_peft_model, LoraConfig, TaskType
model_name_or_path = "bigscience/mt0-large"
tokenizer_name_or_path = "bigscience/mt0-large"

peft_config = LoraConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
)

model = AutoModelForSeq2SeqLM.from_pretrained(model_name_or_path)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

model.save_pretrained("output_dir")
"""

INFERENCE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from peft import PeftModel, PeftConfig

peft_model_id = "smangrul/twitter_complaints_bigscience_T0_3B_LORA_SEQ_2_SEQ_LM"
config = PeftConfig.from_pretrained(peft_model_id)
model = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, peft_model_id)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)

model = model.to(device)
model.eval()
inputs = tokenizer("Tweet text : @HondaCustSvc Your customer service has been horrible during the recall process. I will never purchase a Honda again. Label :", return_tensors="pt")

with torch.no_grad():
    outputs = model.generate(input_ids=inputs["input_ids"].to(device), max_new_tokens=10)
    print(tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True)[0])
"""  # noqa: E501

TWEET = (
    "Tweet text : @HondaCustSvc Your customer service has been horrible during the recall process. "
    "I will never purchase a Honda again. Label :"
)


@pytest.mark.parametrize(
    ("tied", "total", "share"),
    [(False, 1_231_940_608, "0.1915"), (True, 975_825_920, "0.2418")],
    ids=["untied", "tied"],
)
def test_numbers_of_mt0_large(capsys, tied, total, share):
    # The public configuration of mT5 large; on the meta device it needs no memory.
    config = MT5Config(
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        vocab_size=250112,
    )
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
    if not tied:  # as in the document's day
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = get_peft_model(model, peft_config)
    assert model.get_nb_trainable_parameters() == (2_359_296, total)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (f"trainable params: 2,359,296 || all params: {total:,} || trainable%: {share}\n")


def test_training_snippet(tmp_path, monkeypatch, capsys):
    local_hub.mt0(tmp_path, TWEET)
    monkeypatch.chdir(tmp_path)
    exec(TRAINING, {})
    assert "trainable params: " in capsys.readouterr().out
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "output_dir").iterdir()}
    assert set(sizes) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    base = tmp_path / "bigscience/mt0-large/model.safetensors"
    assert sizes["adapter_model.safetensors"] < base.stat().st_size / 5


def test_inference_snippet(tmp_path, monkeypatch, capsys):
    local_hub.t0(tmp_path, TWEET, "complaint no complaint")
    monkeypatch.chdir(tmp_path)
    base = AutoModelForSeq2SeqLM.from_pretrained("bigscience/T0_3B")
    trained = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False)).eval()
    trained.save_pretrained("smangrul/twitter_complaints_bigscience_T0_3B_LORA_SEQ_2_SEQ_LM")
    capsys.readouterr()

    names = {"torch": torch, "device": "cpu"}
    exec(INFERENCE, names)
    printed = capsys.readouterr().out.rstrip("\n")
    ids = names["tokenizer"](TWEET, return_tensors="pt")["input_ids"]
    expected = trained.generate(input_ids=ids, max_new_tokens=10)
    assert printed == names["tokenizer"].batch_decode(expected.numpy(), skip_special_tokens=True)[0]
    assert torch.equal(names["outputs"], expected)
