"""The worker processes of one measurement, and the sampling that alternates between them."""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.reference.install import ROOT, ensure_reference

from benchmarks.job import Case

ALLOCATORS = {
    "kept": {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)},
    "default": {},
}
"""Settings of glibc's allocator: "kept" gives no buffer of up to 32 MiB back while less than 256 MiB are free.

By default it gives buffers back or keeps them depending on what else lies on the heap, and fresh memory is slow.
"""


@dataclass(frozen=True)
class Setting:
    """How both libraries are run: the clock, torch's threads, the allocator."""

    clock: str
    threads: int
    allocator: str


class SideError(RuntimeError):
    """A library could not do a case; the last line says why."""


class Side:
    """One library in a worker process."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        others = [path for path in added if not Path(path, "peft").is_dir()]  # but neither library
        paths = os.pathsep.join([str(folder), str(ROOT), *others])
        threads = str(setting.threads)
        environment = {**os.environ, **ALLOCATORS[setting.allocator], "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", setting.clock, threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
        )
        origin = self.ask("origin")
        if not Path(origin).resolve().is_relative_to(folder.resolve()):
            raise SideError(f"the worker for {folder} imported {origin}")

    def ask(self, action: str, *args: Any) -> Any:
        """The worker's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((action, *args), self._process.stdin)
        self._process.stdin.flush()
        try:
            ok, value = pickle.load(self._process.stdout)
        except EOFError:
            raise SideError(f"the worker for {self.folder} ended with code {self._process.wait()}") from None
        if not ok:
            raise SideError(value.strip().splitlines()[-1])
        return value

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Result:
    """Samples and counts of one case, by side."""

    group: str
    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, side: str) -> float | None:
        """Median seconds of a side."""
        samples = self.seconds.get(side)
        return statistics.median(samples) if samples else None

    def ratio(self, over: str) -> float | None:
        """Our median over that of another side."""
        ours, other = self.median("ours"), self.median(over)
        return ours / other if ours and other else None

    def spread(self, over: str) -> tuple[float, float] | None:
        """The middle half of the ratios of single rounds."""
        if self.ratio(over) is None or len(self.seconds["ours"]) < 2:
            return None
        ratios = [a / b for a, b in zip(self.seconds["ours"], self.seconds[over], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(case: Case, rounds: int, sides: dict[str, Side]) -> Result:
    """Sample a case in turns; what a side can't do is noted and left out."""
    result = Result(case.group, case.name)
    wanted = {"ours": "ours", "reference": "reference", **({"floor": "ours"} if case.floor else {})}
    for side, process in wanted.items():
        try:
            sides[process].ask("setup", case.key, side)
        except SideError as error:
            result.failures[side] = str(error)
    ready = [side for side in wanted if side not in result.failures]
    for turn in range(min(rounds, case.rounds or rounds)):
        for side in ready if turn % 2 else reversed(ready):
            result.seconds.setdefault(side, []).append(sides[wanted[side]].ask("sample", case.key, side))
    for side in ready:
        try:
            result.counts[side] = sides[wanted[side]].ask("count", case.key, side)
        except SideError as error:
            result.failures[f"{side}, counts"] = str(error)
    for process in sides.values():
        process.ask("drop", case.key)
    return result


def open_sides(setting: Setting) -> dict[str, Side]:
    """Both libraries, each in a process of its own."""
    return {"ours": Side(ROOT / "src", setting), "reference": Side(ensure_reference(), setting)}
