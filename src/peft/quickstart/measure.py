"""What the quickstart measures: one trained model, the files of an adapter, a reload in a new process, memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from peft.quickstart.data import LABELS, Message, QuickstartError, messages
from peft.quickstart.train import Contestant, Encode, History, logits_of, train

CURVE_EVERY = 4  # epochs; testing takes longer than an epoch


@dataclass(frozen=True)
class Outcome:
    """One trained model, measured.

    Attributes:
        history: The losses, accuracies and seconds of its training.
        correct: For each test message, whether it got its label.
        trainable: Number of parameters that trained.
        total: Number of parameters there are.
    """

    history: History
    correct: list[bool]
    trainable: int
    total: int

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.correct)

    def by_kind(self, test: list[Message]) -> dict[str, float]:
        """Accuracy for each kind of message."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for message, right in zip(test, self.correct, strict=True):
            groups[message.kind].append(right)
        return {kind: statistics.mean(rights) for kind, rights in groups.items()}


def contest(
    contestant: Contestant, encoder: str, encode: Encode, seed: int, after_epoch: Callable[[History], None]
) -> tuple[nn.Module, Outcome]:
    """Train one contestant on the 50 messages and test it on the others, now and then on the way, too."""
    training, test = messages("train"), messages("test")
    torch.manual_seed(seed)
    model = contestant.build(encoder)

    correct: list[bool] = []

    def watch(epoch: int, history: History) -> None:
        if epoch % CURVE_EVERY == 0 or epoch == contestant.recipe.epochs:
            correct[:] = _correct(model, encode, test)
            history.epochs.append(epoch)
            history.accuracies.append(statistics.mean(correct))
        after_epoch(history)

    history = train(model, encode, training, contestant.recipe, watch)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    return model, Outcome(history, correct, trainable, sum(size for size, _ in sizes))


def _correct(model: nn.Module, encode: Encode, test: list[Message]) -> list[bool]:
    predicted = logits_of(model, encode, [m.text for m in test]).argmax(-1).tolist()
    return [p == m.label for p, m in zip(predicted, test, strict=True)]


def difference_after_reload(adapter: Path, expected: Tensor, texts: list[str]) -> float:
    """Load the adapter in a new Python process and classify there; returns the largest difference of a logit.

    Raises:
        QuickstartError: The process failed, or a text got another label.
    """
    command = [sys.executable, "-m", "peft.quickstart.predict", str(adapter)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    if done.returncode:
        raise QuickstartError(f"A new process could not use the adapter in {adapter}:\n{done.stderr}")
    reloaded = torch.tensor(json.loads(done.stdout))
    changed = (reloaded.argmax(-1) != expected.argmax(-1)).nonzero().flatten().tolist()
    if changed:
        raise QuickstartError(
            f"The adapter in {adapter} classifies {len(changed)} texts differently after reloading, "
            f"for one {texts[changed[0]]!r} ({LABELS[int(expected[changed[0]].argmax())]} before)."
        )
    return (reloaded - expected).abs().max().item()


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder, by name."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def peak_memory() -> int:
    """The most memory, in bytes, that this process has held so far, Python and PyTorch themselves included."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
