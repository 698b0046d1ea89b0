"""The tour: train the head alone and LoRA, compare, save, reload in a new process, classify, draw."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from peft.quickstart import data, train
from peft.quickstart.data import LABELS, Message, QuickstartError
from peft.quickstart.picture import draw

EXAMPLES = (
    "@HondaCustSvc Your customer service has been horrible during the recall process. I will never purchase a Honda again.",
    "The parcel came a day early and the vase is even prettier than in the photo.",
    "Where can I download the manual for the coffee grinder?",
    "Third week without a washing machine, and all I get from you is music on the hotline.",
    "Thanks for the new charger. It melted.",
)


@dataclass
class Outcome:
    """One trained model, measured.

    Attributes:
        history: The losses, accuracies and seconds of its training.
        correct: For each test message, whether it was classified rightly.
        trainable: Number of parameters that trained.
        total: Number of parameters there are.
    """

    history: train.History
    correct: list[bool]
    trainable: int
    total: int

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    def by_kind(self, test: list[Message]) -> dict[str, float]:
        """Accuracy for each kind of message."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for message, right in zip(test, self.correct, strict=True):
            groups[message.kind].append(right)
        return {kind: statistics.mean(rights) for kind, rights in groups.items()}


def run(out: Path, seeds: int = 1, console: Console | None = None) -> dict[str, Any]:
    """Run the whole tour and write the adapter, the picture and `results.json` under `out`.

    Args:
        out: Folder to write to; made if it isn't there.
        seeds: How often to train, from seed 0 on. The adapter of the first seed is the one that is saved.
        console: Where to print.

    Returns:
        What `results.json` holds: accuracies per seed, parameters, seconds, sizes.

    Raises:
        QuickstartError: The encoder is missing, or the reloaded adapter predicts something else.
    """
    started = time.perf_counter()
    console = console or Console(highlight=False)
    _hush()
    out.mkdir(parents=True, exist_ok=True)
    encoder = data.encoder_path()
    encode = train.load_tokenizer(encoder)
    training, test = data.messages("train"), data.messages("test")
    console.print("\n[bold]Complaint detection with LoRA[/]")
    console.print(f"{len(training)} messages to learn from, {len(test)} others to test, MiniLM as the encoder.\n")

    heads, loras = [], []
    with _progress(console) as progress:
        for seed in range(seeds):
            suffix = f", seed {seed}" if seeds > 1 else ""
            watch = _watcher(progress, f"head alone{suffix}", train.HEAD_ALONE, encode, test)
            heads.append(_train(train.head_alone, encoder, encode, seed, train.HEAD_ALONE, training, test, watch)[1])
            watch = _watcher(progress, f"LoRA{suffix}", train.WITH_LORA, encode, test)
            model, outcome = _train(train.with_lora, encoder, encode, seed, train.WITH_LORA, training, test, watch)
            loras.append(outcome)
            if seed == 0:
                tuned = model
    console.print(_comparison(heads, loras))

    saved = _save(tuned, out / "adapter", encoder)
    texts = [m.text for m in test] + list(EXAMPLES)
    difference = _same_in_a_new_process(out / "adapter", train.logits_of(tuned, encode, texts), texts)
    _report_files(console, out / "adapter", saved, len(texts), difference)
    _classify(console, train.logits_of(tuned, encode, list(EXAMPLES)))
    draw(out / "quickstart.png", heads, loras, test)

    results = {
        "accuracy": {"head alone": [o.accuracy for o in heads], "LoRA": [o.accuracy for o in loras]},
        "trainable": {"head alone": heads[0].trainable, "LoRA": loras[0].trainable, "of": loras[0].total},
        "training_seconds": {"head alone": heads[0].history.seconds, "LoRA": loras[0].history.seconds},
        "bytes": saved,
        "peak_memory_bytes": peak_memory(),
        "seconds": time.perf_counter() - started,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"\nPicture  {out / 'quickstart.png'}")
    console.print(f"Numbers  {out / 'results.json'}")
    console.print(
        f"[dim]{results['seconds']:.0f} s in all, {results['peak_memory_bytes'] / 2**20:.0f} MiB at most.[/]\n"
    )
    return results


def _train(
    build: Callable[[str], nn.Module],
    encoder: str,
    encode: train.Encode,
    seed: int,
    recipe: train.Recipe,
    training: list[Message],
    test: list[Message],
    watch: Callable[[int, train.History], None],
) -> tuple[nn.Module, Outcome]:
    torch.manual_seed(seed)
    model = build(encoder)
    history = train.train(model, encode, training, recipe, lambda epoch, h: watch(model, epoch, h))
    predicted = train.logits_of(model, encode, [m.text for m in test]).argmax(-1).tolist()
    correct = [p == m.label for p, m in zip(predicted, test, strict=True)]
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return model, Outcome(history, correct, sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))
