"""The pictures of the report."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.sides import Result

OURS, REFERENCE, INK = "#0b6e99", "#c9ccd1", "#333333"


def draw(out: Path, results: list[Result]) -> list[tuple[str, str]]:
    """Draw what the results allow; returns file names and what they show."""
    made = []
    layers = [r for r in results if r.group == "layer" and r.ratio("reference") and r.name.endswith("bf16")]
    if layers:
        _save(out / "benchmarks-layer.svg", lambda: _layers(layers))
        made.append(("benchmarks-layer.svg", "Forward and backward of one layer, as multiples of the frozen layer"))
    detailed = ("layer", "shapes", "other layers", "quantised", "model", "small model")
    rest = [r for r in results if r.group not in detailed and "cuda" not in r.group and r.ratio("reference")]
    if rest:
        _save(out / "benchmarks-rest.svg", lambda: _speedups(rest))
        made.append(
            ("benchmarks-rest.svg", "How many times faster than the reference: starting, loading, switching, mixing")
        )
    return made


def _save(path: Path, plot) -> None:
    figure = plot()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _bare(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(colors=INK)


def _layers(results: list[Result]):
    results = sorted(results, key=lambda r: r.ratio("floor") or 0, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(results) + 1.3))
    names = [r.name.removesuffix(", bf16") for r in results]
    ours = [(r.median("ours") or 0) / (r.median("floor") or 1) for r in results]
    theirs = [(r.median("reference") or 0) / (r.median("floor") or 1) for r in results]
    place = range(len(results))
    axes.barh([p + 0.19 for p in place], ours, 0.36, color=OURS, label="this library")
    axes.barh([p - 0.19 for p in place], theirs, 0.36, color=REFERENCE, label="reference")
    for p, mine, other in zip(place, ours, theirs, strict=True):
        axes.annotate(f"{mine:.2f}", (mine, p + 0.19), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.annotate(f"{other:.1f}", (other, p - 0.19), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(0.8, max(theirs) * 1.5)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t < max(theirs) * 1.5]
    axes.set_xticks(ticks, [f"{t}×" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(list(place), names)
    axes.set_title(
        "Forward + backward of one bf16 layer, 1024 tokens, 1024 × 1024\nas multiples of the frozen layer (dotted)",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper right")
    _bare(axes)
    return figure


def _speedups(results: list[Result]):
    results = sorted(results, key=lambda r: r.ratio("reference") or 0, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.27 * len(results) + 1.2))
    times = [1 / (r.ratio("reference") or 1) for r in results]
    colors = [OURS if value >= 1 else REFERENCE for value in times]
    axes.barh(range(len(results)), [value - 1 for value in times], 0.62, left=1, color=colors)
    for p, value in enumerate(times):
        label = f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"
        axes.annotate(label, (max(value, 1), p), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *times) * 0.9, max(times) * 1.8)
    ticks = [10**n for n in range(6) if 10**n < max(times) * 1.8]
    axes.set_xticks(ticks, [f"{t:,}×" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(results)), [f"{r.group}: {r.name}" for r in results])
    axes.set_title("Times faster than the reference (dotted: equal; gray: slower)", loc="left", fontsize=10, color=INK)
    _bare(axes)
    return figure
