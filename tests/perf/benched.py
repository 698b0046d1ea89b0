"""The benchmark's CUDA cases, small and on other devices. As a program: on one that stands in for a GPU.

The stand-in is a device of its own on which tensors have no values, so whatever is made on the CPU by mistake fails to
meet what is there. It is told to torch once and for all, hence a program; it prints what fails, as JSON.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.cases import cuda
from benchmarks.cases.models import Size
from benchmarks.job import Case, Job

LLAMA = Size(layers=1, hidden=128, inner=256, vocab=64, rows=2, tokens=8)
SMALL: dict[str, dict[str, Any]] = {
    "layer": {"tokens": 16, "inner": 256, "out": 256, "repeats": 1},
    "training_step": {"size": LLAMA, "repeats": 1},
    "inference": {"size": LLAMA, "repeats": 1},
    "mixed": {"width": 64, "adapters": 4, "repeats": 1},
    "merge": {"size": LLAMA},
}
CASES = {case.key: case for case in cuda.cases()}
KINDS = {case.make.func: case for case in reversed(CASES.values())}  # type: ignore[attr-defined]
"""The first case of each function that makes one; the others' floors are the same."""


def small(case: Case, device: str) -> Callable[[str], Job]:
    """A case of few and small tensors, on another device."""
    make: Any = case.make
    return partial(make, **SMALL[make.func.__name__], device=device)


def main() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up

    class Mode(FakeTensorMode):
        avoid_device_init = True  # as torch has it for CUDA where there is none

    warnings.simplefilter("ignore")
    set_up("standin")
    failures = {}
    # of one kind the one that does most; torch aborts where backward runs forward again on a device written in Python
    done = ("fp32", "checkpointing")
    some = [c for c in CASES.values() if f"{c.key}, dropout" not in CASES and not any(word in c.name for word in done)]
    for case, side in [*((c, "ours") for c in some), *((c, "floor") for c in KINDS.values() if c.floor)]:
        try:
            with Mode():
                job = small(case, "standin")(side)
                job.run(job.prepare())
                found = [] if job.forward is None else [job.forward()]
                assert all(tensor.device.type == "standin" for tensor in [*job.frozen, *found])
        except Exception as error:
            failures[f"{case.key}, {side}"] = f"{type(error).__name__}: {error}"[:300]
    try:
        with Mode():
            torch.randn(2, 2, device="standin") @ torch.randn(2, 2)
        failures["stand-in"] = "a tensor on the CPU met one on the stand-in, and nothing was said"
    except RuntimeError:
        pass
    print(json.dumps(failures), flush=True)


if __name__ == "__main__":
    main()
