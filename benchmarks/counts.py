"""What does not depend on the machine's mood: bytes kept for backward, bytes allocated, operations, files read."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.job import Job
from benchmarks.reads import reads


def count(job: Job) -> dict[str, int]:
    """Counts of one run of a job.

    Returns:
        `saved`: bytes kept for backward (each storage once, weights left out); `peak`: bytes allocated at the highest
        point above the start; `allocated`: bytes allocated in all; `allocations`: their number; `operators`: those that
        compute; `kernels`: those launched on a GPU; `flops`: operations of matrix products; `files`, `opens`: files
        opened for reading, and how often. Memory is that of the job's device.
    """
    if job.counts is not None:
        return job.counts()
    job.run(job.prepare())  # caches are filled before anything is counted
    found = {} if job.forward is None else {"saved": saved_bytes(job.forward, job.frozen)}
    found.update(_on_cpu(job) if job.device == "cpu" else _on_cuda(job))
    prepared = job.prepare()
    with reads() as read, Operators() as operators:
        job.run(prepared)
    return {**found, "operators": operators.number, "flops": operators.flops, **read.counts()}


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


class Operators(TorchDispatchMode):
    """Counts the operators that give a tensor and write to memory: the same in every run, on every machine.

    Views, operators that only reserve memory, and reading a size or a number don't count. What torch makes of several
    operators (`linear`, `einsum`) counts as these. On a GPU most launch one kernel, products of matrices sometimes two.

    Their `flops` are added up here because `FlopCounterMode` hooks into all modules: fused forms step aside for hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.number += _computes(func)
        formula = flop_registry.get(func.overloadpacket)
        self.flops += formula(*args, **kwargs, out_val=result) if formula else 0
        return result


@cache
def _computes(func: Any) -> bool:
    schema = func._schema
    kind = schema.name.removeprefix("aten::")
    views = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    if views or torch.Tag.inplace_view in func.tags or kind in ("_unsafe_view", "set_"):
        return False
    return not kind.startswith(("empty", "new_empty")) and any("Tensor" in str(r.type) for r in schema.returns)


def _on_cpu(job: Job) -> dict[str, int]:
    prepared = job.prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job.run(prepared)
    return memory(profiler.profiler.kineto_results.events())


def memory(events: Any) -> dict[str, int]:
    """Peak, bytes and number of what was allocated on the CPU, read off a profile."""
    level = peak = allocated = number = 0
    own = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    for event in sorted(own, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
        if event.nbytes() > 0:
            allocated += event.nbytes()
            number += 1
    return {"peak": peak, "allocated": allocated, "allocations": number}


def _on_cuda(job: Job) -> dict[str, int]:
    prepared = job.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()
    job.run(prepared)
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_stats()
    more = {key: after[key] - before[key] for key in ("allocation.all.allocated", "allocated_bytes.all.allocated")}
    prepared = job.prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        job.run(prepared)
        torch.cuda.synchronize()
    return {
        "peak": peak,
        "allocated": more["allocated_bytes.all.allocated"],
        "allocations": more["allocation.all.allocated"],
        **launches(profiler.profiler.kineto_results.events()),
    }


def launches(events: Any) -> dict[str, int]:
    """Kernels launched, by torch and cuBLAS (`cudaLaunchKernel…`) or Triton (`cuLaunchKernel…`), read off a profile.

    Nothing, rather than 0, where the machine does not let launches be seen.
    """
    number = sum(e.name().startswith(("cudaLaunchKernel", "cuLaunchKernel")) for e in events)
    return {"kernels": number} if number else {}
