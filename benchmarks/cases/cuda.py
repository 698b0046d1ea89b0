"""On a GPU: sizes at which it computes for longer than the CPU takes to launch what it computes.

Where it does not (few tokens, small batches), the time is that of the launches, and so is a server's. Samples are of
many runs in a row, so that launches run ahead of the work as they do in training.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cases.layers import of_methods
from benchmarks.cases.models import Size
from benchmarks.cases.serving import batches, merging, unmerged
from benchmarks.cases.training import steps
from benchmarks.job import Case

LAYER: dict[str, Any] = {"tokens": 8192, "inner": 2048, "out": 2048, "device": "cuda", "repeats": 20}
MODEL = Size(layers=4, hidden=2048, inner=5504, vocab=4096, rows=8, tokens=1024)
RUNS = tuple(
    (method, "bf16", checkpointing)
    for method in ("LoRA r16", "DoRA r16", "LoHa r8", "OFT b32")
    for checkpointing in (False, True)
)


def cases() -> list[Case]:
    """All groups of a GPU."""
    return [
        *of_methods("cuda layer", **LAYER),
        *steps("cuda model", RUNS, size=MODEL, device="cuda", repeats=5),
        *unmerged("cuda inference", size=MODEL, device="cuda", repeats=50),
        *batches("cuda mixed", width=2048, device="cuda", repeats=50),
        *merging("cuda merge", dtype="bf16", size=MODEL, device="cuda"),
    ]
