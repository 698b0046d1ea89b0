"""What does not depend on the machine's mood: bytes kept for backward, bytes allocated, operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.job import Job


def count(job: Job) -> dict[str, int]:
    """Counts of one run of a job.

    Returns:
        `saved`: bytes kept for backward (each storage once, weights left out); `peak`: bytes allocated at the highest
        point above the start; `allocated`: bytes allocated in all; `allocations`: their number; `flops`: operations of
        matrix products.
    """
    job.run(job.prepare())  # caches are filled before anything is counted
    found = {} if job.forward is None else {"saved": saved_bytes(job.forward, job.frozen)}
    prepared = job.prepare()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job.run(prepared)
    found.update(_memory(profile))
    prepared = job.prepare()
    with FlopCounterMode(display=False) as flops:
        job.run(prepared)
    found["flops"] = flops.get_total_flops()
    return found


def saved_bytes(forward: Any, frozen: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward beyond `frozen`, each storage counted once."""
    weights = {t.untyped_storage().data_ptr() for t in frozen}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(size for size, _ in kept.values())


def _memory(profile: Any) -> dict[str, int]:
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = allocated = number = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
        if event.nbytes() > 0:
            allocated += event.nbytes()
            number += 1
    return {"peak": peak, "allocated": allocated, "allocations": number}
