"""The second document: config, model, the three things shown of it, Trainer, saving, and loading for inference.

Its code blocks were lost on the way; the steps and the numbers are those that its text gives.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModelForSeq2SeqLM, TaskType, get_peft_model
from tests.documents import local_hub

TEXTS = ["never buying this again", "thank you all so much", "it broke on day one", "great service as always"]
LABELS = ["complaint", "no complaint", "complaint", "no complaint"]


def test_from_config_to_inference(tmp_path, monkeypatch, capsys):
    local_hub.mt0(tmp_path, *TEXTS, *LABELS)
    monkeypatch.chdir(tmp_path)

    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = AutoModelForSeq2SeqLM.from_pretrained("bigscience/mt0-large")
    base = model
    model = get_peft_model(model, peft_config)
    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert model.base_model.model is base
    capsys.readouterr()
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    share = 100 * trainable / total
    printed = capsys.readouterr().out.strip()
    assert printed == f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"

    tokenizer = AutoTokenizer.from_pretrained("bigscience/mt0-large")
    rows = [
        {**tokenizer(text), "labels": tokenizer(label)["input_ids"]} for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    training_args = TrainingArguments(
        output_dir="your-name/bigscience/mt0-large-lora",
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model),
    )
    trainer.train()
    assert (tmp_path / "your-name/bigscience/mt0-large-lora/checkpoint-2/adapter_model.safetensors").exists()

    model.save_pretrained("output_dir")
    assert {p.name for p in (tmp_path / "output_dir").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained("output_dir")
    assert isinstance(loaded, PeftModelForSeq2SeqLM)
    loaded.eval()
    model.eval()
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        outputs = loaded.generate(**inputs, max_new_tokens=5)
        expected = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(outputs, expected)
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)
