"""The cases, by group. They use the common API only, so either library can run them."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from benchmarks.cases import cuda, layers, serving, starting, training

ABOUT = {
    "layer": "Forward and backward of one linear layer of 1024 × 1024, 1024 tokens, the input's gradient included.",
    "shapes": "One linear layer: forward and backward, or in inference forward alone.",
    "model": "Forward, backward and AdamW on a Llama of 4 layers, 512 wide, 4 × 256 tokens. The floor has no AdamW.",
    "small model": "Forward, backward and AdamW on a Llama of 2 layers, 256 wide, 4 × 128 tokens, for every method.",
    "inference": "Forward of the model of the group model, unmerged, one row.",
    "mixed": "One forward of 7 linear layers, 512 wide, whose rows belong to several adapters.",
    "cuda layer": "Forward and backward of one linear layer of 2048 × 2048, 8192 tokens. Time of the wall.",
    "cuda model": "Forward, backward and AdamW on a Llama of 4 layers, 2048 wide, 8 × 1024 tokens. Time of the wall.",
    "cuda inference": "Forward of that model, unmerged, one row. With few tokens it is the time of launching kernels.",
    "cuda mixed": "One forward of 7 linear layers, 2048 wide, whose rows belong to several adapters.",
    "cuda merge": "The model of the group cuda model, in bf16.",
}
"""What a group measures, where its name and those of its cases don't say so."""
SKIPPED = {
    **({} if find_spec("bitsandbytes") else {"bitsandbytes": layers.quantised()}),
    **({} if torch.cuda.is_available() else {"a GPU": cuda.cases()}),
}
"""Cases that can't run here, by what they need."""
CASES = {
    case.key: case
    for need, cases in (
        ("", [*starting.cases(), *layers.cases(), *training.cases(), *serving.cases()]),
        ("bitsandbytes", layers.quantised()),
        ("a GPU", cuda.cases()),
    )
    for case in cases
    if need not in SKIPPED
}
