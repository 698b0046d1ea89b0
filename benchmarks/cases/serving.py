"""Serving: inference unmerged, adapters together, merging."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.cases.methods import DTYPES, PROJECTIONS, config
from benchmarks.cases.models import Size, llama, stack
from benchmarks.cases.training import MODEL
from benchmarks.job import Case, Job


def inference(side: str, method: str, tokens: int, size: Size = MODEL, device: str = "cpu", repeats: int = 3) -> Job:
    """Forward of a Llama, unmerged."""
    import peft

    model = llama(size, torch.bfloat16, device)
    if side != "floor":
        model = peft.get_peft_model(model, config(method, target_modules="all-linear", inference_mode=True))
    model.eval()
    ids = torch.randint(0, size.vocab, (1, tokens), device=device)

    def run(_: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return Job(run, repeats=repeats, device=device)


def mixed(
    side: str,
    adapters: int,
    rows: int = 32,
    tokens: int = 1,
    width: int = 512,
    device: str = "cpu",
    repeats: int = 2,
) -> Job:
    """A batch of rows over several adapters, unmerged, on 7 linear layers."""
    import peft

    model, x = stack(1, width, device), torch.randn(rows, tokens, width, device=device)
    given: dict[str, Any] = {}
    if side != "floor":
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=PROJECTIONS), adapter_name="a0")
        for index in range(1, adapters):
            model.add_adapter(f"a{index}", peft.LoraConfig(r=16, target_modules=PROJECTIONS))
        given["adapter_names"] = [f"a{row % adapters}" for row in range(rows)]
    model.eval()

    def run(_: Any) -> None:
        with torch.no_grad():
            model(x, **given)

    return Job(run, repeats=repeats, device=device)


def weighted(side: str, combination: str) -> Job:
    """`add_weighted_adapter` of three adapters on 56 layers."""
    import peft

    options = {"r": 8, "target_modules": PROJECTIONS, "init_lora_weights": False}
    model = peft.get_peft_model(stack(8, 128), peft.LoraConfig(**options), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**options))
    model.add_adapter("c", peft.LoraConfig(**options))
    density = {"density": 0.5} if combination in ("ties", "dare_linear") else {}

    def forget() -> None:
        if "new" in model.peft_config:
            model.delete_adapter("new")

    def run(_: Any) -> None:
        model.add_weighted_adapter(["a", "b", "c"], [0.5, 0.3, 0.2], "new", combination_type=combination, **density)

    return Job(run, prepare=forget)


def merge(side: str, method: str, back: bool, dtype: str = "fp32", size: Size = MODEL, device: str = "cpu") -> Job:
    """Merging (or merging and unmerging) on a Llama."""
    import peft

    model = peft.get_peft_model(llama(size, DTYPES[dtype], device), config(method, target_modules="all-linear"))

    def run(_: Any) -> None:
        model.merge_adapter()
        if back:
            model.unmerge_adapter()

    def restore() -> None:
        if not back and any(getattr(m, "merged", False) for m in model.modules()):
            model.unmerge_adapter()

    return Job(run, prepare=restore, device=device)


def merging(group: str, **more: Any) -> list[Case]:
    """Merging, and back again."""
    return [
        *(Case(group, m, partial(merge, method=m, back=False, **more)) for m in ("LoRA r16", "DoRA r16", "LoHa r8")),
        *(Case(group, f"{m}, and back", partial(merge, method=m, back=True, **more)) for m in ("LoRA r16", "LoHa r8")),
    ]


def unmerged(group: str, **more: Any) -> list[Case]:
    """Inference beside the bare model."""
    runs = (("LoRA r16", 256), ("LoRA r16", 1), ("DoRA r16", 1))
    return [
        Case(group, f"{m}, {n} token" + "s" * (n > 1), partial(inference, method=m, tokens=n, **more), floor=True)
        for m, n in runs
    ]


def batches(group: str, **more: Any) -> list[Case]:
    """Mixed batches."""
    return [
        *(Case(group, f"32 rows, {n} adapters", partial(mixed, adapters=n, **more), floor=True) for n in (1, 8, 16)),
        Case(group, "64 rows, 64 adapters", partial(mixed, adapters=64, rows=64, **more), floor=True),
        Case(group, "32 rows of 16 tokens, 16 adapters", partial(mixed, adapters=16, tokens=16, **more), floor=True),
    ]


def cases() -> list[Case]:
    """All groups of serving that run on a CPU."""
    combinations = ("linear", "cat", "svd", "ties")
    return [
        *unmerged("inference"),
        *batches("mixed"),
        *(Case("weighted", c, partial(weighted, combination=c)) for c in combinations),
        *merging("merge"),
    ]
