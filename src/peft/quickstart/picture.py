"""One picture: how test accuracy grew, and what LoRA gained on each kind of message."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from peft.quickstart.data import Message
from peft.quickstart.measure import Outcome
from peft.quickstart.train import HEAD_ALONE, LORA

COLOURS = {HEAD_ALONE.name: "#8a94a6", LORA.name: "#d9480f"}
INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(file: Path, outcomes: dict[str, list[Outcome]], test: list[Message]) -> None:
    """Draw the picture as a PNG.

    Args:
        file: Where to.
        outcomes: By contestant, one outcome per seed; several seeds become a mean and a band.
        test: The messages that the outcomes are about, in order.
    """
    head, lora = (statistics.mean(o.accuracy for o in outcomes[c.name]) for c in (HEAD_ALONE, LORA))
    share = outcomes[LORA.name][0].trainable / outcomes[LORA.name][0].total
    seeds = len(outcomes[LORA.name])
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 5.2), width_ratios=(1.1, 1), dpi=160)
        figure.subplots_adjust(left=0.06, right=0.955, top=0.74, bottom=0.12, wspace=0.78)
        title = f"Training {share:.1%} of the parameters: from {head:.0%} to {lora:.0%} of messages right"
        figure.text(0.025, 0.93, title, fontsize=15, fontweight="bold")
        runs = "one run" if seeds == 1 else f"mean of {seeds} runs"
        subtitle = f"Complaint detection, 50 messages to learn from, {len(test)} others to test, {runs}"
        figure.text(0.025, 0.875, subtitle, color=FAINT, fontsize=10.5)
        _learning_curves(left, outcomes)
        _gain_by_kind(right, outcomes, test)
        figure.savefig(file)
        plt.close(figure)


def _learning_curves(axes: Axes, outcomes: dict[str, list[Outcome]]) -> None:
    epochs = outcomes[LORA.name][0].history.epochs
    for name, some in outcomes.items():
        runs = list(zip(*(o.history.accuracies for o in some), strict=True))
        means = [statistics.mean(run) for run in runs]
        if len(some) > 1:
            axes.fill_between(
                epochs, [min(r) for r in runs], [max(r) for r in runs], color=COLOURS[name], alpha=0.15, lw=0
            )
        axes.plot(epochs, means, color=COLOURS[name], lw=2.4, solid_capstyle="round")
        axes.plot(epochs[-1], means[-1], "o", color=COLOURS[name], ms=6, clip_on=False)
        axes.annotate(
            f"{name}\n{means[-1]:.1%}",
            (epochs[-1], means[-1]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
            fontweight="bold",
            annotation_clip=False,
        )
    axes.axhline(0.5, color=FAINT, lw=1, ls=(0, (2, 3)))
    axes.text(epochs[-1], 0.5, "coin toss ", va="bottom", ha="right", color=FAINT, fontsize=8.5)
    axes.set_title("Accuracy on the test messages", loc="left", fontsize=10.5, color=INK, pad=12)
    axes.set_xlabel("passes over the 50 messages")
    axes.set_xticks([0, *epochs])
    axes.set_xlim(0, epochs[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _gain_by_kind(axes: Axes, outcomes: dict[str, list[Outcome]], test: list[Message]) -> None:
    def mean_by_kind(name: str) -> dict[str, float]:
        tables = [o.by_kind(test) for o in outcomes[name]]
        return {kind: statistics.mean(t[kind] for t in tables) for kind in tables[0]}

    head, lora = mean_by_kind(HEAD_ALONE.name), mean_by_kind(LORA.name)
    kinds = sorted(head, key=lambda kind: lora[kind])
    for row, kind in enumerate(kinds):
        axes.plot([head[kind], lora[kind]], [row, row], color=GRID, lw=5, solid_capstyle="round", zorder=1)
        axes.plot(head[kind], row, "o", color=COLOURS[HEAD_ALONE.name], ms=8, zorder=2)
        axes.plot(lora[kind], row, "o", color=COLOURS[LORA.name], ms=8, zorder=3)
        axes.text(
            1.08, row, _points(lora[kind] - head[kind]), color=INK, va="center", ha="right",
            fontweight="bold", transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    counts = {kind: sum(m.kind == kind for m in test) for kind in kinds}
    axes.set_yticks(range(len(kinds)), [f"{kind}  ({counts[kind]})" for kind in kinds])
    axes.set_title("By kind of message, and the gain in points", loc="left", fontsize=10.5, color=INK, pad=12)
    axes.set_xlim(min(0.25, *head.values(), *lora.values()) - 0.03, 1.06)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _points(difference: float) -> str:
    points = round(100 * difference)
    return f"{points:+d}".replace("-", "\N{MINUS SIGN}") if points else "0"
