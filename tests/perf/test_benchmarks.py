"""The benchmark itself: its cases run, its counts are right, and what needs a GPU is tried without one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.utils.backend_registration
from benchmarks import cases, counts, job, report, sides
from benchmarks.cases import methods
from benchmarks.job import Job
from benchmarks.reads import reads
from torch import nn
from torch.autograd import DeviceType

import peft
from tests.perf import benched

# cases


def test_no_two_cases_have_one_name():
    every = [*cases.starting.cases(), *cases.layers.cases(), *cases.layers.quantised(), *cases.training.cases()]
    every += [*cases.serving.cases(), *cases.cuda.cases()]
    assert len({case.key for case in every}) == len(every)
    assert set(cases.ABOUT) <= {case.group for case in every}
    goals = {*report.GOALS, *report.FLOOR_GOALS, *report.SAVED_GOALS}
    assert goals <= {case.key for case in every}, "a goal of a case that is gone"


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_dropout_on_the_input_is_measured(method):
    name, options = methods.METHODS[method]
    found = {f.name for f in dataclasses.fields(getattr(peft, name)) if f.name.endswith("dropout")}
    if name in ("LoHaConfig", "LoKrConfig", "BOFTConfig", "OFTConfig", "SupertuningConfig"):
        assert method not in methods.INPUT_DROPOUT
    else:
        assert found == ({methods.INPUT_DROPOUT[method]} if method in methods.INPUT_DROPOUT else set())
    assert options.keys().isdisjoint(found)


@pytest.mark.parametrize("key", benched.CASES)
def test_cuda_cases_run(key):
    case = benched.CASES[key]
    for side in ("ours", "floor") if benched.KINDS[case.make.func] is case and case.floor else ("ours",):
        made = benched.small(case, "cpu")(side)
        assert made.sample(lambda: 0.0) == 0
        if made.forward is not None:
            assert counts.saved_bytes(made.forward, made.frozen) >= 0


def test_cuda_cases_put_everything_on_their_device():
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    done = subprocess.run([sys.executable, "-m", "tests.perf.benched"], capture_output=True, text=True, cwd=sides.ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


# counts


def test_operators_are_those_that_compute():
    x, into = torch.randn(4, 6), torch.zeros(4, 4)

    def run(_: object) -> None:
        y = x.view(6, 4).mT.detach().t()[:4]  # views
        torch.empty(5).reshape(5, 1)  # nothing is written
        torch.mm(x, x.mT, out=into)
        into.add_(1)
        torch.nn.functional.linear(y.mT, x.view(4, 6)[:, :4])

    found = counts.count(Job(run))
    assert found["operators"] == 3
    assert found["flops"] == 2 * (4 * 6 * 4 + 4 * 4 * 4)


def test_what_is_counted_is_what_is_timed():
    fused = benched.small(benched.CASES["cuda layer/LoHa r8, bf16"], "cpu")("ours")
    run, calls = peft.autograd.Form.run, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.autograd.Form, "run", lambda *args: calls.append(run(*args)) or calls[-1])
        counts.count(fused)
    assert len(calls) == 4, "a forward to fill caches, and one for each of three counts"
    assert all(y is not None for y in calls), "fused forms step aside for what counts"


def test_memory_of_the_profiled_device():
    def event(size: int, time: int, device: DeviceType = DeviceType.CPU, name: str = "[memory]") -> object:
        values = {"nbytes": size, "start_ns": time, "device_type": device, "name": name}
        return types.SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})

    events = [event(-8, 3), event(8, 1), event(99, 2, DeviceType.CUDA), event(7, 2, name="aten::mm"), event(4, 4)]
    assert counts.memory(events) == {"peak": 8, "allocated": 12, "allocations": 2}
    found = counts.count(Job(lambda _: torch.zeros(1000)))
    assert (found["peak"], found["allocations"]) == (4000, 1)


def test_saved_bytes_count_each_storage_once_and_no_weights():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    assert counts.saved_bytes(lambda: layer(x), list(layer.parameters())) == 4 * 8 * 4
    assert counts.saved_bytes(lambda: (layer(x), layer(x)), list(layer.parameters())) == 4 * 8 * 4


def test_files_read(tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "a").write_text("a")
    save_file({"x": torch.ones(2)}, tmp_path / "b")
    with reads() as found:
        for _ in range(2):
            (tmp_path / "a").read_text()
        (tmp_path / "c").write_text("c")
        os.listdir(tmp_path)
        load_file(tmp_path / "b")
    assert found == [str(tmp_path / "a")] * 2 + [str(tmp_path / "b")]
    assert found.counts() == {"files": 2, "opens": 3}
    (tmp_path / "a").read_text()
    assert len(found) == 3, "what comes after is not counted"


def test_imports_count_in_their_own_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(sides.ROOT / "src"), str(sides.ROOT)]))
    made = cases.starting.imports("ours", "import this")
    found = counts.count(made)
    assert found["opens"] >= found["files"] >= 1
    assert made.sample(lambda: 0.0) > 0


# a GPU that is not there


class Gpu:
    """What the benchmark asks of `torch.cuda` and of the profiler, with each call in a list."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.number = 0

    def __getattr__(self, name: str):
        values = {"memory_allocated": 1000, "max_memory_allocated": 1700}
        return lambda *_: (self.calls.append(name), values.get(name))[1]

    def memory_stats(self) -> dict[str, int]:
        self.number += 1
        return {"allocation.all.allocated": 7 * self.number, "allocated_bytes.all.allocated": 900 * self.number}


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "memory_stats"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_counts_on_a_gpu(gpu, monkeypatch):
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync", "ampere_gemm", "[memory]"]
    monkeypatch.setattr(counts, "profile", lambda **_: Profile(names))
    found = counts.count(Job(lambda _: gpu.calls.append("run"), device="cuda"))
    assert (found["peak"], found["allocated"], found["allocations"], found["kernels"]) == (700, 900, 7, 3)
    start = gpu.calls.index("reset_peak_memory_stats")
    measured = gpu.calls[start : gpu.calls.index("max_memory_allocated") + 1]
    assert measured == ["reset_peak_memory_stats", "memory_allocated", "run", "synchronize", "max_memory_allocated"]
    assert gpu.calls[start - 1] == "synchronize", "work from before must not count"


def test_no_launches_seen_is_no_count():
    assert counts.launches(Profile(["aten::mm"]).events()) == {}


class Profile:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.profiler = types.SimpleNamespace(kineto_results=self)

    def events(self) -> list[object]:
        return [types.SimpleNamespace(name=lambda name=name: name) for name in self.names]

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_samples_on_a_gpu_wait_for_it_and_take_the_time_of_the_wall(gpu, monkeypatch):
    monkeypatch.setattr(job.time, "perf_counter", lambda: gpu.calls.append("clock") or len(gpu.calls))
    made = Job(lambda _: gpu.calls.append("run"), repeats=2, device="cuda")
    made.sample(lambda: pytest.fail("the processor's clock stands still while a GPU works"))
    assert gpu.calls == ["synchronize", "clock", "run", "run", "synchronize", "clock"]


# reports


def result(group: str, name: str, **counted: int) -> sides.Result:
    both = {"ours": counted, "reference": {key: 2 * value for key, value in counted.items()}}
    return sides.Result(group, name, seconds={"ours": [1.0, 1.0], "reference": [2.0, 2.0]}, counts=both)


def test_tables_show_what_was_counted():
    results = [
        result("load", "first", files=2, opens=3, peak=0),
        result("cuda layer", "LoRA r16, bf16", saved=10, peak=1024, kernels=30, flops=0),
        result("cuda layer", "DoRA r16, bf16", saved=10, peak=2048),
    ]
    text = report.tables({"allocator": "kept", "rounds": 2}, results)
    assert "| case | files read | reference | times opened | reference |" in text
    assert "| first | 2 | 4 | 3 | 6 |" in text
    assert "| LoRA r16, bf16 | 10 B | 20 B | 0.50 | 1.00 KiB | 2.00 KiB | 30 | 60 |" in text
    assert "| DoRA r16, bf16 | 10 B | 20 B | 0.50 | 2.00 KiB | 4.00 KiB | — | — |" in text
    assert "MALLOC_TRIM_THRESHOLD_" in text
    assert cases.ABOUT["cuda layer"] in text


def test_groups_that_can_not_run_are_named():
    if "a GPU" in cases.SKIPPED:
        text = report.tables({"rounds": 1}, [result("load", "first")])
        assert "Skipped, for want of a GPU: cuda layer, cuda model, cuda inference, cuda mixed, cuda merge" in text


@pytest.mark.parametrize("allocator", sides.ALLOCATORS)
def test_both_processes_get_the_same_allocator(allocator, monkeypatch):
    seen = []

    def popen(*args: object, env: dict[str, str], **kwargs: object) -> None:
        seen.append({key: value for key, value in env.items() if key.startswith("MALLOC_")})
        raise sides.SideError

    monkeypatch.setattr(sides.subprocess, "Popen", popen)
    for name in [key for key in os.environ if key.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for folder in ("ours", "reference"):
        with pytest.raises(sides.SideError):
            sides.Side(sides.ROOT / folder, sides.Setting("cpu", 1, allocator))
    assert seen == [sides.ALLOCATORS[allocator]] * 2
