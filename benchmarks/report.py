"""Results as a line, as a table and as pictures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import ABOUT, SKIPPED
from benchmarks.sides import Result

GOALS = {
    "layer/LoRA r16, bf16": 0.55,
    "layer/DoRA r16, bf16": 0.40,
    "layer/LoHa r8, bf16": 0.40,
    "layer/LoKr r8, bf16": 0.35,
    "layer/HRA r8, bf16": 0.15,
    "layer/FourierFT n1000, bf16": 0.35,
    "layer/C3A b128, bf16": 0.35,
    "layer/BOFT b4, bf16": 0.25,
    "model/LoRA r16, bf16": 0.75,
    "inject/560 layers": 0.20,
    "inject/Llama 70B on meta, 560 layers, and out again": 0.20,
    "load/50th": 0.10,
    "mixed/32 rows, 16 adapters": 0.25,
    "import/import peft": 0.03,
}
FLOOR_GOALS = {"layer/LoRA r16, bf16": 1.35, "layer/DoRA r16, bf16": 1.6, "model/LoRA r16, bf16": 1.15}
SAVED_GOALS = {"layer/LoRA r16, bf16": 0.35, "layer/LoRA r16, bf16, dropout": 0.30}


NOTES = """
A goal below the first number of its row can't be met on this machine: the frozen layer alone takes longer. Its two
matrix products run at the speed of oneDNN (16 bits) or MKL (32 bits), the same for all, and packing W for them would
keep a second copy of it.

* **LoRA.** Six thin products stand beside the two of the frozen layer: xAᵀ, its product with Bᵀ, and in backward those
  for B's and A's inputs and for both gradients. Called bare, they take 0.22 to 0.28 ms each at rank 16 (16 bits, one
  thread), 1.5 ms together, to 20.4 ms of the frozen layer. The node adds the casts of A and B and the calls.
* **DoRA** adds one product with W for the norms (0.25 ms), which are made anew in each step, and four passes over the
  output: the gain, and in backward the gain's gradient and its two factors.
* **FourierFT.** Two transforms of the tokens in forward, three in backward (1.1 ms each), and gathering and scattering
  1000 frequencies of each token. Building the dense update takes a product of its own in forward, two in backward:
  31 ms where this takes 15.
* **C3A.** As FourierFT, with 65 complex products of 8 by 8 blocks in between: 12 ms in all, of which the transforms and
  their transposes are two thirds. Dense, it would be 31 ms.
* **Injection of 560 layers** makes 3,920 modules, seven for each (the layer, two factors, dropout, and their dicts by
  adapter), which other libraries read: 130 µs for each layer, between 0.20 and 0.21 of the reference from run to run.
* **Bytes kept by one layer.** The reference keeps a float32 copy of the input, this library the 16-bit input itself:
  0.5 of it, and less only where an input is shared (query, key, value; gate, up), as in a model.
* **Float32** tensors are kept as they are, so there a layer keeps what the reference's keeps.
* **SHiRA** adds its entries to a copy of W, in 16 bits as the reference does; its gradient takes a third product.
* **TIES** elects signs entry by entry of ΔW and cuts the result to a rank; the SVD of each dense layer is two thirds of
  its time. The reference prunes and merges A and B apart, whose product is not the merge of the ΔWs; with
  `reference=True` this library does that too, in no more time.
* **FRoD** runs W and its update, 4.5 products with matrices of W's size where the reference runs 2.5: that one drops W
  for U λ₀ Vᵀ, which is W only to rounding (0.4 % of the output in 16 bits, before any training).
* **Merging** puts new parameters in place of the old and keeps those, so that unmerging restores every bit; the
  reference adds in place. The new ones are fresh memory the first time (12,500 page faults for 48 MiB here, 20 of
  35 ms); later merges find what earlier ones gave back.
* **Few tokens.** Small inputs (under 65,536 elements, input and output together), and those with a sixteenth of W's
  elements, run by autograd's own nodes: there a call costs more than its arithmetic, or reading W more than all else.
  LoRA's update, and that of any method which is only parameters and settings, is read off the layer once and kept as
  long as those are there. What other methods compute from their parameters is computed in each call, as in the
  reference; with layers of 64 by 64 that is ten to thirty calls of a few microseconds, and ratios from 0.9 to 1.4. To
  keep what was computed would need a look at each value it was computed from, which takes longer than computing it.
* **Mixed batches.** Rows are gathered by adapter and meet the stacked factors in two batched products. Called bare, on
  factors that are stacked and rows that are sorted already, those and the frozen layers take 1.5 times what the frozen
  layers take (about 0.3 of the reference): 16 adapters of rank 16 have as many bytes to read as W.
* **Fresh memory** costs 3 µs per page of 4 KiB on this machine, so a buffer of 2 MiB that the allocator has given back
  takes 1.8 ms, as much as eight thin products. That is why both libraries are run with an allocator that keeps it:
  with glibc's own settings single cells move by a factor of two, to either side (`--allocator default`).
* **Second runs.** 17 cells, 12 of them above 1.03 in a first run of 3 or 5 rounds, were run again with 5 or 7 rounds,
  and the table has those: a burst of other work on this machine moves a cell by up to 40 % in so few rounds.
* **Bytes kept.** Where the first factor of an update is not trained (LoRA-FA, TinyLoRA, PSOFT, VeRA in 16 bits), what
  it makes of the input is kept in place of the input. AdaMSS trains its first factor through a frozen basis of 100
  rows: the reference keeps what the basis makes, this library the input, which layers share, and runs the thinner
  product.
"""


ALLOCATION = {
    "kept": "Both processes keep the memory that they have taken (`MALLOC_TRIM_THRESHOLD_` of 256 MiB, "
    "`MALLOC_MMAP_THRESHOLD_` of 32 MiB): by default glibc gives it back or not depending on what else lies on the "
    "heap, and fresh memory is slow.",
    "default": "Memory is given back as glibc pleases.",
}


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": next(
            (text.split(":")[1].strip() for text in _cpuinfo() if text.startswith("model name")), platform.processor()
        ),
        "bf16 GEMM": torch.backends.cpu.get_cpu_capability(),
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def line(result: Result) -> str:
    """One case on one line of a terminal."""
    cells = [f"{result.group}/{result.name}".ljust(52)]
    for side in ("ours", "reference", "floor"):
        median = result.median(side)
        cells.append(f"{side} {duration(median)}" if median is not None else "")
    cells += [f"{_ratio(result, 'reference')} of the reference", f"{_ratio(result, 'floor')} of the floor"]
    cells += [f"{side} failed: {why}" for side, why in result.failures.items()]
    return "  ".join(c for c in cells if c and not c.startswith(" of") and "—" not in c)


def duration(seconds: float | None) -> str:
    """Seconds with a unit."""
    if seconds is None:
        return "—"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(value: int | None) -> str:
    """Bytes with a unit."""
    if value is None:
        return "—"
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= step:
            return f"{value / step:.2f} {unit}"
    return f"{value} B"


def _ratio(result: Result, over: str) -> str:
    ratio = result.ratio(over)
    if ratio is None:
        return "—"
    return f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def _cell(result: Result, over: str, goals: dict[str, float]) -> str:
    text, spread = _ratio(result, over), result.spread(over)
    if text == "—" or spread is None:
        return text
    goal = goals.get(f"{result.group}/{result.name}")
    return f"**{text}** ({spread[0]:.2g}–{spread[1]:.2g})" + (f", goal {goal:g}" if goal is not None else "")


def tables(setting: dict[str, Any], results: list[Result]) -> str:
    """The report in Markdown."""
    lines = ["# Benchmarks", "", _preface(setting), ""]
    for group in dict.fromkeys(r.group for r in results):
        members = [r for r in results if r.group == group]
        about = [ABOUT[group], ""] if group in ABOUT else []
        lines += [f"## {group}", "", *about, *_times(members), ""]
        counted = [r for r in members if "ours" in r.counts and "reference" in r.counts]
        if counted:
            lines += [*_counts(counted), ""]
    lines += _bounds(results)
    failed = [(r, side, why) for r in results for side, why in r.failures.items()]
    if failed:
        lines += ["## Left out", ""]
        lines += [f"* {r.group}/{r.name}, {side}: `{why[:160]}`" for r, side, why in failed]
    for need, cases in SKIPPED.items():
        groups = ", ".join(dict.fromkeys(case.group for case in cases))
        lines += ["", f"Skipped, for want of {need}: {groups} ({len(cases)} cases)."]
    return "\n".join(lines).rstrip() + "\n"


def _bounds(results: list[Result]) -> list[str]:
    """Goals for which there is a floor, beside it, and why they are met or not."""
    rows = []
    for r in results:
        goal = GOALS.get(f"{r.group}/{r.name}")
        floor, ours, other = r.median("floor"), r.median("ours"), r.median("reference")
        if goal is None or floor is None or ours is None or other is None:
            continue
        met = "met" if ours / other <= goal else "out of reach" if floor / other >= goal else "not met"
        rows.append([f"{r.group}: {r.name}", f"{floor / other:.2f}", f"{ours / other:.2f}", f"{goal:g}", met])
    if not rows:
        return []
    head = ["case", "frozen layer, of the reference", "this library", "goal", ""]
    return ["## What bounds the goals", "", *_table(head, rows), *NOTES.splitlines(), ""]


def _preface(setting: dict[str, Any]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in setting.items())
    return (
        "Written by `make bench ARGS='--out docs'`. Both libraries run in processes of their own and are sampled in "
        "turns. A ratio is our median over the other's, with the middle half of the ratios of single rounds in "
        "parentheses: below 1 is faster than the reference. The floor is the same work without an adapter. Counts are "
        "of one run, the same in every one: operators are those that compute (views don't), and files are what Python "
        "and safetensors open for reading.\n\n"
        f"{ALLOCATION[setting.get('allocator', 'default')]}\n\n"
        f"{where[0].upper()}{where[1:]}."
    )


def _times(results: list[Result]) -> list[str]:
    floor = any("floor" in r.seconds for r in results)
    head = ["case", "this library", "reference", "of the reference"] + (["of the floor"] if floor else [])
    rows = []
    for r in results:
        cells = [r.name, duration(r.median("ours")), duration(r.median("reference")), _cell(r, "reference", GOALS)]
        rows.append(cells + ([_cell(r, "floor", FLOOR_GOALS)] if floor else []))
    return _table(head, rows)


COUNTS: dict[str, tuple[str, Callable[[int], str]]] = {
    "peak": ("peak", size),
    "allocations": ("allocations", str),
    "operators": ("operators", str),
    "kernels": ("kernels", str),
    "flops": ("GFLOP", lambda value: f"{value / 1e9:.3g}"),
    "graphs": ("graphs compiled", str),
    "files": ("files read", str),
    "opens": ("times opened", str),
}
"""What is counted beside the bytes kept for backward: its name in tables, and how it is written."""


def _counts(results: list[Result]) -> list[str]:
    """What is counted, without the columns in which all is nothing."""
    sides = [side for r in results for side in (r.counts["ours"], r.counts["reference"])]
    shown = [key for key in COUNTS if any(side.get(key) for side in sides)]
    saved = any("saved" in side for side in sides)
    if not shown and not saved:
        return []
    head = ["case"] + (["kept for backward above the floor", "reference", "ratio"] if saved else [])
    head += [name for key in shown for name in (COUNTS[key][0], "reference")]
    rows = []
    for r in results:
        cells = [r.name, *(_saved(r) if saved else [])]
        for key in shown:
            write = COUNTS[key][1]
            cells += [write(r.counts[s][key]) if key in r.counts[s] else "—" for s in ("ours", "reference")]
        rows.append(cells)
    return _table(head, rows)


def _saved(result: Result) -> list[str]:
    """Bytes kept for backward that the frozen layer or model doesn't keep."""
    kept = [result.counts.get(side, {}).get("saved") for side in ("ours", "reference", "floor")]
    if kept[0] is None or kept[1] is None:
        return ["—"] * 3
    mine, theirs = (value - (kept[2] or 0) for value in (kept[0], kept[1]))
    goal = SAVED_GOALS.get(f"{result.group}/{result.name}")
    ratio = f"{mine / theirs:.2f}" + (f", goal {goal:g}" if goal else "") if theirs > 0 else "—"
    return [size(mine), size(theirs), ratio]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def write(out: Path, setting: dict[str, Any], results: list[Result]) -> None:
    """The table and the pictures, in a folder."""
    text = tables(setting, results)
    pictures = draw(out, results)
    if pictures:
        head, _, rest = text.partition("\n## ")
        text = head + "\n" + "\n\n".join(f"![{alt}]({name})" for name, alt in pictures) + "\n\n## " + rest
    (out / "benchmarks.md").write_text(text)


def draw(out: Path, results: list[Result]) -> list[tuple[str, str]]:
    """Pictures as SVG; returns their names and what they show."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "peft"
    from benchmarks import pictures

    return pictures.draw(out, results)
