"""Trainer, accelerate and TRL: learning, both kinds of gradient checkpointing, bf16, resuming."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tests.training.task import (
    RATE,
    STEPS,
    adapted,
    assert_learned,
    assert_same,
    base_model,
    batches,
    optimizer_of,
    rows,
    weights,
)


def _arguments(directory, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate remembers the precision of the first `Accelerator` of a process; each test here is its own first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["plain", "reentrant", "non_reentrant", "bf16", "accumulation"],
)
def test_trainer_learns(tmp_path, options):
    trainer = Trainer(model=adapted(), args=_arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    assert_learned(_losses(trainer))


def test_trainer_resumes_as_if_it_had_never_stopped(tmp_path):
    options = {"lora_dropout": 0.1, "modules_to_save": ["norm"]}
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = Trainer(model=adapted(**options), args=_arguments(tmp_path / "whole", **saving), train_dataset=rows())
    whole.train()

    resumed = Trainer(model=adapted(**options), args=_arguments(tmp_path / "two", **saving), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(whole.model))


def test_trainer_writes_adapters_only_and_finds_the_best(tmp_path):
    arguments = _arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer = Trainer(model=adapted(), args=arguments, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    best = PeftModel.from_pretrained(base_model(), trainer.state.best_model_checkpoint)
    assert_same(get_peft_model_state_dict(best), get_peft_model_state_dict(trainer.model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_learns(precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = adapted()
    model, optimizer, loader = accelerator.prepare(
        model, optimizer_of(model), DataLoader(rows(), batch_size=4, shuffle=False)
    )
    losses = []
    for _ in range(STEPS // 2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert_learned(losses)
    accelerator.free_memory()


def test_accelerate_resumes_as_if_it_had_never_stopped(tmp_path):
    def steps(accelerator, model, optimizer, data):
        for batch in data:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    def prepared():
        accelerator = Accelerator(cpu=True)
        model = adapted(lora_dropout=0.1)
        return accelerator, *accelerator.prepare(model, optimizer_of(model))

    data = batches(6)
    accelerator, whole, optimizer = prepared()
    steps(accelerator, whole, optimizer, data[:3])
    accelerator.save_state(str(tmp_path))
    steps(accelerator, whole, optimizer, data[3:])
    accelerator.free_memory()

    accelerator, resumed, optimizer = prepared()
    accelerator.load_state(str(tmp_path))
    steps(accelerator, resumed, optimizer, data[3:])
    assert_same(weights(accelerator.unwrap_model(resumed)), weights(whole))
    accelerator.free_memory()


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.documents.local_hub import tokenizer

    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    arguments = trl.SFTConfig(
        **{
            name: value
            for name, value in _arguments(tmp_path).to_dict().items()
            if name in {"output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "save_strategy"}
        },
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        bf16=False,
    )
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        model=base_model(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer("a b c"),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert_learned(_losses(trainer))
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
