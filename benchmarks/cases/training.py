"""One model: training steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases.methods import DTYPES, METHODS, config
from benchmarks.cases.models import Size, llama
from benchmarks.job import Case, Job

MODEL = Size(layers=4, hidden=512, inner=1408, vocab=4096, rows=4, tokens=256)
SMALL = Size(layers=2, hidden=256, inner=704, vocab=1024, rows=4, tokens=128)
FITTING: dict[str, tuple[str, dict[str, Any]]] = {"C3A b128": ("C3A b64", {"block_size": 64})}
"""Methods whose options don't go with the widths of `SMALL`: what they are called there, and with which options."""


def training_step(
    side: str,
    method: str,
    dtype: str,
    checkpointing: bool,
    size: Size = MODEL,
    device: str = "cpu",
    repeats: int = 1,
    compiled: bool = False,
    **options: Any,
) -> Job:
    """Forward, backward and AdamW on a Llama, all linear layers adapted; the floor has no AdamW."""
    import peft

    model = llama(size, DTYPES[dtype], device)
    frozen = list(model.parameters())
    optimizer = None
    if side != "floor":
        model = peft.get_peft_model(model, config(method, target_modules="all-linear", **options))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    inner = model if side == "floor" else model.get_base_model()
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, size.vocab, (size.rows, size.tokens), device=device)
    embedded = inner.get_input_embeddings()(ids).detach().requires_grad_(True)

    def loss() -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=ids).loss

    run = torch.compile(loss) if compiled else loss

    def step(_: Any) -> None:
        embedded.grad = None
        if optimizer is not None:
            optimizer.zero_grad()
        run().backward()
        if optimizer is not None:
            optimizer.step()

    weights = [*frozen, *model.parameters(), *model.buffers()]
    job = Job(step, repeats=repeats, forward=loss, frozen=weights, device=device)
    if compiled:
        before = _graphs()
        step(None)
        step(None)
        made = _graphs() - before
        job.counts = lambda: {"graphs": made}
    return job


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def steps(group: str, runs: Any, **more: Any) -> list[Case]:
    """Training steps by method, dtype and whether activations are computed anew in backward."""
    found = []
    for method, dtype, checkpointing in runs:
        name = f"{method}, {dtype}" + (", checkpointing" if checkpointing else "")
        make = partial(training_step, method=method, dtype=dtype, checkpointing=checkpointing, **more)
        found.append(Case(group, name, make, floor=True))
    return found


RUNS = (
    ("LoRA r16", "bf16", False),
    ("LoRA r16", "bf16", True),
    ("LoRA r16", "fp32", False),
    ("DoRA r16", "bf16", False),
    ("LoHa r8", "bf16", False),
    ("OFT b32", "bf16", False),
)
WAYS = (("bf16", False), ("fp32", False), ("bf16", True))


def small() -> list[Case]:
    """Every method on the smaller model."""
    found = []
    for method in METHODS:
        name, options = FITTING.get(method, (method, {}))
        for case in steps("small model", [(method, *way) for way in WAYS], size=SMALL, **options):
            found.append(replace(case, name=case.name.replace(method, name)))
    return found


def cases() -> list[Case]:
    """A few methods on a small model, and all on a smaller one; and compiled."""
    compiled = [(method, "bf16", False) for method in ("LoRA r16", "DoRA r16")]
    return [*steps("model", RUNS), *small(), *steps("compiled", compiled, size=SMALL, compiled=True)]
