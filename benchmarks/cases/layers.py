"""One layer: of every method, of other shapes, of other types, quantised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cases.methods import DTYPES, INPUT_DROPOUT, METHODS, config
from benchmarks.cases.models import Experts, Single, making, packed, transposed
from benchmarks.job import Case, Job

TOKENS, WIDTH = 1024, 1024
SHAPES = {
    "1 token, 2048 × 2048": (1, 2048, 2048),
    "32 tokens, 2048 × 2048": (32, 2048, 2048),
    "8192 tokens, 256 × 256": (8192, 256, 256),
}
"""Tokens, inputs and outputs of layers beside the square ones of 1024."""
SHAPED = ("LoRA r16", "DoRA r16", "LoHa r8", "OFT b32", "VeRA r256")
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Conv2d 64 -> 128, 3 × 3": (lambda: nn.Conv2d(64, 128, 3, padding=1), lambda: torch.randn(4, 64, 32, 32)),
    "Conv2d 256 -> 256, 1 × 1": (lambda: nn.Conv2d(256, 256, 1), lambda: torch.randn(4, 256, 16, 16)),
    "Conv1D 1024 -> 1024": (transposed, lambda: torch.randn(1024, 1024)),
    "Embedding 8192 × 512": (lambda: nn.Embedding(8192, 512), lambda: torch.randint(8192, (4, 256))),
    "8 experts 512 × 256": (Experts, lambda: torch.randn(8, 128, 512)),
}
"""Layers that are no `nn.Linear`, and what they are given."""
MADE_FOR = {
    "LoRA r16": tuple(KINDS),
    "DoRA r16": tuple(kind for kind in KINDS if "experts" not in kind),
    "LoHa r8": tuple(kind for kind in KINDS if "Conv2d" in kind),
    "HiRA r16": ("Conv1D 1024 -> 1024", "Embedding 8192 × 512"),
}
"""Those on which the reference has a method."""


def layer(
    side: str,
    method: str,
    dtype: str,
    dropout: float = 0.0,
    inner: int = WIDTH,
    out: int = WIDTH,
    tokens: int = TOKENS,
    train: bool = True,
    device: str = "cpu",
    bits: int = 16,
    repeats: int | None = None,
) -> Job:
    """One adapted linear layer; with 8 or 4 bits it is one of bitsandbytes'."""
    with making(DTYPES[dtype], device):
        model, x = Single(nn.Linear(inner, out, bias=False)), torch.randn(tokens, inner)
    if bits < 16:
        model.lin = packed(model.lin, bits)
        setattr(model, f"is_loaded_in_{bits}bit", True)  # as transformers' loaders do
    repeats = repeats or min(40, max(2, 4 * WIDTH**3 // (inner * out * max(tokens, 32))))
    adapter = None if side == "floor" else config(method, dropout, target_modules=["lin"])
    return _job(model, adapter, x, train, device, repeats)


def other_layer(side: str, kind: str, method: str, dtype: str, train: bool) -> Job:
    """One adapted layer of another type."""
    make, inputs = KINDS[kind]
    with making(DTYPES[dtype], "cpu"):
        model, x = Single(make()), inputs()
    where = {"target_parameters": ["lin.stack"], "target_modules": []} if "experts" in kind else {}
    adapter = None if side == "floor" else config(method, **{"target_modules": ["lin"], **where})
    return _job(model, adapter, x, train)


def _job(model: Single, adapter: Any, x: torch.Tensor, train: bool, device: str = "cpu", repeats: int = 8) -> Job:
    """Forward and backward, the input's gradient included if it has one; or in inference forward alone."""
    import peft

    weights, module = list(model.parameters()), model.lin
    if adapter is not None:
        adapted = peft.get_peft_model(model, adapter).train(train)
        weights += [*adapted.parameters(), *adapted.buffers()]
        module = adapted.get_base_model().lin
    parameters = [p for p in module.parameters() if p.requires_grad]
    x.requires_grad_(train and x.is_floating_point())
    with torch.no_grad():
        grad = torch.randn_like(module(x))

    def step(_: Any) -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        y = module(x)
        if y.requires_grad:
            y.backward(grad)

    def run(_: Any) -> None:
        with torch.no_grad():
            module(x)

    if not train:
        return Job(run, repeats=repeats, device=device)
    return Job(step, repeats=repeats, forward=lambda: module(x), frozen=weights, device=device)


def of_methods(group: str, methods: Any = METHODS, dtypes: Any = DTYPES, **more: Any) -> list[Case]:
    """A linear layer of each method, with and without dropout where the method has one on its input."""
    return [
        Case(
            group,
            f"{method}, {dtype}" + (", dropout" if dropout else ""),
            partial(layer, method=method, dtype=dtype, dropout=dropout, **more),
            floor=True,
        )
        for method in methods
        for dtype in dtypes
        for dropout in ((0.0, 0.1) if method in INPUT_DROPOUT else (0.0,))
    ]


def oblong() -> list[Case]:
    """Layers with more outputs than inputs, and the other way round."""
    found = []
    for shape, (inner, out) in {"1024 -> 4096": (1024, 4096), "4096 -> 1024": (4096, 1024)}.items():
        make = partial(layer, method="LoRA r16", dtype="bf16", inner=inner, out=out)
        found.append(Case("layer", f"LoRA r16, bf16, {shape}", make, floor=True))
    return found


def shapes() -> list[Case]:
    """Few tokens, and many on a small layer."""
    found = []
    for name, (tokens, inner, out) in SHAPES.items():
        for method in SHAPED:
            for dtype in DTYPES:
                make = partial(layer, method=method, dtype=dtype, inner=inner, out=out, tokens=tokens)
                found.append(Case("shapes", f"{method}, {dtype}, {name}", make, floor=True))
                make = partial(make, train=False)
                found.append(Case("shapes", f"{method}, {dtype}, {name}, inference", make, floor=True))
    return found


def quantised() -> list[Case]:
    """Layers of bitsandbytes'."""
    found = []
    for bits in (8, 4):
        for dropout in (0.0, 0.1):
            name = f"LoRA r16, bf16, {bits} bits" + (", dropout" if dropout else "")
            make = partial(layer, method="LoRA r16", dtype="bf16", dropout=dropout, bits=bits)
            found.append(Case("quantised", name, make, floor=True))
    return found


def kinds() -> list[Case]:
    """Layers of other types."""
    found = []
    for method, those in MADE_FOR.items():
        for kind in those:
            for dtype in DTYPES:
                for train in (True, False) if method == "LoRA r16" else (True,):
                    name = f"{method}, {dtype}, {kind}" + ("" if train else ", inference")
                    make = partial(other_layer, kind=kind, method=method, dtype=dtype, train=train)
                    found.append(Case("other layers", name, make, floor="Embedding" not in kind))
    return found


def cases() -> list[Case]:
    """All groups of single layers that need neither a GPU nor another library."""
    return [*of_methods("layer"), *oblong(), *shapes(), *kinds()]
