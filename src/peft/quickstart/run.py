"""The tour: train the head alone and LoRA, compare, save, reload in a new process, classify, draw."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from peft.quickstart.data import LABELS, Message, encoder_path, messages
from peft.quickstart.measure import Outcome, contest, difference_after_reload, file_sizes, peak_memory
from peft.quickstart.picture import draw
from peft.quickstart.train import HEAD_ALONE, LORA, Contestant, Encode, History, load_tokenizer, logits_of

EXAMPLES = (
    Message(
        "@HondaCustSvc Your customer service has been horrible during the recall process. "
        "I will never purchase a Honda again.",
        label=1,
    ),
    Message("Where can I download the manual for the coffee grinder?", label=0),
    Message("My kettle leaks and nobody at your shop wants to hear about it.", label=1),
    Message("What a lovely evening, the soup alone was worth the trip.", label=0),
    Message("Third week without a washing machine, and all I get from you is music on the hotline.", label=1),
    Message("Thanks for the new charger. It melted.", label=1),
)


def run(out: Path, seeds: int = 1, console: Console | None = None) -> dict[str, Any]:
    """Run the whole tour and write the adapter, the picture and `results.json` to a folder.

    Args:
        out: The folder; made if it isn't there.
        seeds: How often to train, from seed 0 on. The adapter of seed 0 is saved.
        console: Where to print.

    Returns:
        What `results.json` holds: accuracies by seed and kind of message, parameters, seconds, sizes in bytes.

    Raises:
        QuickstartError: The encoder is missing, or the reloaded adapter classifies differently.
    """
    started = time.perf_counter()
    console = console or Console(highlight=False)
    _hush()
    encoder = encoder_path()
    encode = load_tokenizer(encoder)
    test = messages("test")
    console.print("\n[bold]Complaint detection in customer messages[/]")
    console.print(
        f"{len(messages('train'))} messages to learn from, {len(test)} others to test, MiniLM to read them.\n"
    )

    tuned, outcomes = _train_all(console, encoder, encode, seeds)
    console.print(_comparison(outcomes))

    adapter = out / "adapter"
    tuned.save_pretrained(str(adapter))
    texts = [m.text for m in (*test, *EXAMPLES)]
    logits = logits_of(tuned, encode, texts)
    difference = difference_after_reload(adapter, logits, texts)
    sizes = file_sizes(adapter)
    base = (Path(encoder) / "model.safetensors").stat().st_size
    _report_files(console, adapter, sizes, base)
    equal = f"within {difference:.0e}" if difference else "equal to the last bit"
    console.print(f"[bold]Loaded[/] in a new process: the same label for all {len(texts)} texts, logits {equal}.\n")
    console.print(_examples(logits[-len(EXAMPLES) :]))
    draw(out / "quickstart.png", outcomes, test)

    results = {
        "accuracy": {name: [o.accuracy for o in some] for name, some in outcomes.items()},
        "by_kind": {name: [o.by_kind(test) for o in some] for name, some in outcomes.items()},
        "trainable": {name: some[0].trainable for name, some in outcomes.items()},
        "parameters": {name: some[0].total for name, some in outcomes.items()},
        "training_seconds": {name: [o.history.seconds for o in some] for name, some in outcomes.items()},
        "bytes": {**sizes, "base model": base},
        "peak_memory_bytes": peak_memory(),
        "seconds": time.perf_counter() - started,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"\n[bold]Picture[/] {out / 'quickstart.png'}, [bold]numbers[/] {out / 'results.json'}")
    console.print(
        f"[dim]{results['seconds']:.0f} s in all, {_size(results['peak_memory_bytes'])} of memory at most.[/]\n"
    )
    return results


def _hush() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _train_all(console: Console, encoder: str, encode: Encode, seeds: int) -> tuple[Any, dict[str, list[Outcome]]]:
    """All contestants with all seeds; returns the model of LoRA with seed 0, and the outcomes by name."""
    models: list[nn.Module] = []
    outcomes: dict[str, list[Outcome]] = {HEAD_ALONE.name: [], LORA.name: []}
    with _progress(console) as progress:
        for seed in range(seeds):
            for contestant in (HEAD_ALONE, LORA):
                watch = _bar(progress, contestant, f", seed {seed}" if seeds > 1 else "")
                model, outcome = contest(contestant, encoder, encode, seed, watch)
                outcomes[contestant.name].append(outcome)
                if seed == 0 and contestant is LORA:
                    models.append(model)
    return models[0], outcomes


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("epochs  loss {task.fields[loss]}  test accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _bar(progress: Progress, contestant: Contestant, suffix: str) -> Any:
    """A bar for one training; returns what moves it after an epoch."""
    label = f"{contestant.name}{suffix}".ljust(18)
    bar = progress.add_task(label, total=contestant.recipe.epochs, loss="-", accuracy="-")

    def after_epoch(history: History) -> None:
        accuracy = f"{history.accuracies[-1]:.1%}" if history.accuracies else "-"
        progress.update(bar, advance=1, loss=f"{history.losses[-1]:.2f}", accuracy=accuracy)

    return after_epoch


def _comparison(outcomes: dict[str, list[Outcome]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("", "test accuracy", "parameters trained", "of all", "seconds"):
        table.add_column(title, justify="left" if title == "" else "right")
    for name, some in outcomes.items():
        accuracies = [o.accuracy for o in some]
        spread = f" ± {statistics.stdev(accuracies):.1%}" if len(some) > 1 else ""
        first = some[0]
        table.add_row(
            name,
            f"{statistics.mean(accuracies):.1%}{spread}",
            f"{first.trainable:,}",
            f"{first.trainable / first.total:.3%}",
            f"{statistics.mean(o.history.seconds for o in some):.0f}",
            style="bold" if name == LORA.name else None,
        )
    return table


def _report_files(console: Console, adapter: Path, sizes: dict[str, int], base: int) -> None:
    files = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    total = sum(sizes.values())
    console.print(f"\n[bold]Saved[/] {adapter}: {files}.")
    console.print(f"Together {_size(total)}, {total / base:.1%} of the base model's {_size(base)}.")


def _examples(logits: Tensor) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for message, probabilities in zip(EXAMPLES, logits.softmax(-1).tolist(), strict=True):
        label = max(range(len(LABELS)), key=probabilities.__getitem__)
        mark = "[green]right[/]" if label == message.label else "[red]wrong[/]"
        table.add_row(LABELS[label], f"{probabilities[label]:.0%}", mark, message.text)
    return table


def _size(size: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
