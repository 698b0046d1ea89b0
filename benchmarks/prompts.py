"""Which prompt method learns what: a small Llama that copies digits is taught to reverse them, without a hint.

The base model is trained on `hint digits sep answer`, where one hint means "copy", one "reverse" and a neutral one
"copy". Every method then has 300 steps to make the neutral hint mean "reverse". Prints exact matches of greedy
decoding.

    python benchmarks/prompts.py
"""

from __future__ import annotations

import copy
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

DIGITS, SEPARATOR, COPY, REVERSE, NEUTRAL = 5, 2, 14, 15, 16
SIZES = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
METHODS = {
    "prompt tuning": (PromptTuningConfig(**SIZES), 0.03),
    "prompt tuning, from the vocabulary": (PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **SIZES), 0.03),
    "P-tuning, MLP": (PromptEncoderConfig(encoder_hidden_size=64, **SIZES), 3e-3),
    "P-tuning, LSTM": (
        PromptEncoderConfig(encoder_hidden_size=64, encoder_reparameterization_type="LSTM", **SIZES),
        3e-3,
    ),
    "prefix tuning": (PrefixTuningConfig(**SIZES), 0.03),
    "prefix tuning, from zero": (PrefixTuningConfig(init_weights="zero", **SIZES), 0.03),
    "prefix tuning, projection": (PrefixTuningConfig(prefix_projection=True, **SIZES), 3e-3),
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


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([inputs, answers], 1)
    labels = ids.clone()
    labels[:, : inputs.shape[1]] = -100
    return model(input_ids=ids, labels=labels).loss


def accuracy(model: torch.nn.Module, inputs: torch.Tensor, answers: torch.Tensor) -> float:
    mask = torch.ones_like(inputs)
    found = model.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=DIGITS, do_sample=False)
    return (found[:, -DIGITS:] == answers).all(1).float().mean().item()


def pretrained(steps: int = 1500) -> LlamaForCausalLM:
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, num_key_value_heads=2, pad_token_id=0, eos_token_id=3, **sizes))
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


def main() -> None:
    base = pretrained()
    print(f"{'method':36} {'trained':>8} {'seconds':>8} {'exact match':>12}")
    for name, (config, rate) in METHODS.items():
        torch.manual_seed(1)
        GENERATOR.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer, start = torch.optim.AdamW(trainable, rate), time.perf_counter()
        for _ in range(300):
            loss_of(model, *unhinted(32)).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds, match = time.perf_counter() - start, accuracy(model.eval(), *unhinted(256))
        print(f"{name:36} {sum(p.numel() for p in trainable):8} {seconds:8.1f} {match:12.3f}", flush=True)


if __name__ == "__main__":
    main()
