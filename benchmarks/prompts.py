"""Which prompt method learns what, beside LoRA: the quickstart's messages, and digits to be reversed.

`messages`: complaints among customer messages, told by MiniLM from 50 examples (see `peft.quickstart`). Twenty passes
over them, eight virtual tokens; accuracy on the 309 test messages. The learning rates are each the best of three to
five on the "dev" messages.

`digits`: a small Llama, trained on `hint digits separator answer`, where one hint means "copy", one "reverse" and a
neutral one "copy", has 300 steps to learn that the neutral hint means "reverse". Four virtual tokens; exact matches of
greedy decoding.

    python benchmarks/prompts.py messages     # about ten minutes on one core
    python benchmarks/prompts.py digits       # about four

Each prints a Markdown table: means over the seeds, ± the standard deviation of one run.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.quickstart.data import encoder_path, messages
from peft.quickstart.train import HEAD_ALONE, LORA, Contestant, Recipe, head_alone, load_tokenizer, logits_of, train

SEEDS = 3


class Run(NamedTuple):
    """One trained model: how many numbers were trained, how many inference needs, and the share of right answers."""

    trained: int
    kept: int
    right: float


def sizes(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many of them (or of what they make) inference needs."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = model.prompt_encoder["default"] if hasattr(model, "prompt_encoder") else nn.Identity()
    learnt = sum(p.numel() for p in encoder.parameters())
    return trained, trained - learnt + (encoder.rows().numel() if learnt else 0)


def print_table(runs: Iterator[tuple[str, list[Run]]], title: str) -> None:
    print(f"| method | trained | kept | {title} |\n|---|---|---|---|")
    for name, some in runs:
        first, rights = some[0], [run.right for run in some]
        right = f"{statistics.mean(rights):.2f} ± {statistics.stdev(rights):.2f}"
        print(f"| {name} | {first.trained:,} | {first.kept:,} | {right} |", flush=True)


# ---------------------------------------------------------------- messages

EIGHT = {"task_type": "SEQ_CLS", "num_virtual_tokens": 8}
CLASSIFIERS: dict[str, tuple[PeftConfig, float]] = {
    "prompt tuning": (PromptTuningConfig(**EIGHT), 0.3),
    "prompt tuning, from the vocabulary": (PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **EIGHT), 0.1),
    "P-tuning, MLP": (PromptEncoderConfig(encoder_hidden_size=128, **EIGHT), 1e-2),
    "P-tuning, LSTM": (
        PromptEncoderConfig(encoder_hidden_size=128, encoder_reparameterization_type="LSTM", **EIGHT),
        3e-3,
    ),
    "prefix tuning": (PrefixTuningConfig(**EIGHT), 1e-2),
    "prefix tuning, from zero": (PrefixTuningConfig(init_weights="zero", **EIGHT), 1e-2),
    "prefix tuning, projection": (PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=128, **EIGHT), 1e-3),
}


def contestant(name: str, config: PeftConfig, rate: float) -> Contestant:
    return Contestant(name, lambda encoder: get_peft_model(head_alone(encoder), copy.copy(config)), Recipe(lr=rate))


def classifiers() -> Iterator[tuple[str, list[Run]]]:
    """Train and test every method on the messages."""
    encoder = encoder_path()
    encode, test = load_tokenizer(encoder), messages("test")
    prompted = [contestant(name, config, rate) for name, (config, rate) in CLASSIFIERS.items()]
    for one in (HEAD_ALONE, *prompted, LORA):
        runs = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = one.build(encoder)
            train(model, encode, messages("train"), one.recipe, lambda epoch, so_far: None)
            predicted = logits_of(model, encode, [m.text for m in test]).argmax(-1).tolist()
            right = statistics.mean(p == m.label for p, m in zip(predicted, test, strict=True))
            runs.append(Run(*sizes(model), right))
        yield one.name, runs


# ---------------------------------------------------------------- digits

DIGITS, SEPARATOR, COPY, REVERSE, NEUTRAL = 5, 2, 14, 15, 16
FOUR = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
WRITERS: dict[str, tuple[PeftConfig, float]] = {
    "prompt tuning": (PromptTuningConfig(**FOUR), 0.03),
    "prompt tuning, from the vocabulary": (PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **FOUR), 0.03),
    "P-tuning, MLP": (PromptEncoderConfig(encoder_hidden_size=64, **FOUR), 3e-3),
    "P-tuning, LSTM": (
        PromptEncoderConfig(encoder_hidden_size=64, encoder_reparameterization_type="LSTM", **FOUR),
        3e-3,
    ),
    "prefix tuning": (PrefixTuningConfig(**FOUR), 0.03),
    "prefix tuning, from zero": (PrefixTuningConfig(init_weights="zero", **FOUR), 0.03),
    "prefix tuning, projection": (PrefixTuningConfig(prefix_projection=True, **FOUR), 3e-3),
    "LoRA, r=1": (LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj", "v_proj"]), 1e-2),
}
GENERATOR = torch.Generator()


def examples(count: int, hint: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (count, 7) and answers (count, 5): reversed digits for REVERSE, the digits themselves otherwise."""
    digits = torch.randint(4, 14, (count, DIGITS), generator=GENERATOR)
    ends = torch.full((count, 1), hint), torch.full((count, 1), SEPARATOR)
    return torch.cat([ends[0], digits, ends[1]], 1), digits.flip(1) if hint == REVERSE else digits


def unhinted(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What adapters learn: the neutral hint, and reversed digits."""
    inputs, answers = examples(count, NEUTRAL)
    return inputs, answers.flip(1)


def loss_of(model: nn.Module, inputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([inputs, answers], 1)
    labels = ids.clone()
    labels[:, : inputs.shape[1]] = -100
    return model(input_ids=ids, labels=labels).loss


def exact_matches(model: nn.Module, inputs: torch.Tensor, answers: torch.Tensor) -> float:
    mask = torch.ones_like(inputs)
    found = model.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=DIGITS, do_sample=False)
    return (found[:, -DIGITS:] == answers).all(1).float().mean().item()


def pretrained(steps: int = 1500) -> LlamaForCausalLM:
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, num_key_value_heads=2, pad_token_id=0, eos_token_id=3, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        parts = [examples(32, COPY), examples(32, REVERSE), examples(16, NEUTRAL)]
        inputs, answers = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        loss_of(model, inputs, answers).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def writers() -> Iterator[tuple[str, list[Run]]]:
    """Train and test every method on the digits."""
    base = pretrained()
    for name, (config, rate) in WRITERS.items():
        runs = []
        for seed in range(1, SEEDS + 1):
            torch.manual_seed(seed)
            GENERATOR.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(base), copy.copy(config))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
            for _ in range(300):
                loss_of(model, *unhinted(32)).backward()
                optimizer.step()
                optimizer.zero_grad()
            runs.append(Run(*sizes(model), exact_matches(model.eval(), *unhinted(256))))
        yield name, runs


def main(task: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if task == "messages":
        print_table(classifiers(), f"accuracy ({len(messages('test'))} messages)")
    elif task == "digits":
        print_table(writers(), "exact match")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
