"""What is measured: one repeatable piece of work, prepared outside the clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], float]


def _nothing() -> None:
    """Nothing is used up, and so no model is thrown away: what is left is young, and looking for it takes no time."""


@dataclass
class Job:
    """A piece of work.

    Args:
        run: What is timed; it gets what `prepare` returns.
        prepare: Makes what one run uses up; not timed.
        repeats: Runs per sample, for work too short for the clock.
        frozen: Tensors that are there anyway (weights): they don't count as kept for backward.
        forward: For steps that have a backward: the part before it, so that what it keeps can be counted.
        device: Where it runs. On an accelerator the time is that of the wall, until all work there is done.
        seconds: For work in a process of its own: does it, and says how long it took.
        counts: Likewise: does it, and says what is counted.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing
    repeats: int = 1
    frozen: list[Any] = field(default_factory=list)
    forward: Callable[[], Any] | None = None
    device: str = "cpu"
    seconds: Callable[[], float] | None = None
    counts: Callable[[], dict[str, int]] | None = None

    def sample(self, clock: Clock) -> float:
        """Seconds of one run."""
        if self.seconds is not None:
            return self.seconds()
        prepared = [self.prepare() for _ in range(self.repeats)]
        gc.collect(1 if self.prepare is _nothing else 2)  # or a sample pays for what the one before left
        wait, clock = _waiting(self.device, clock)
        wait()
        start = clock()
        for item in prepared:
            self.run(item)
        wait()
        return (clock() - start) / self.repeats


def _waiting(device: str, clock: Clock) -> tuple[Callable[[], Any], Clock]:
    """What waits for all work on a device, and the clock to time it with."""
    if device == "cpu":
        return lambda: None, clock
    import torch

    return torch.cuda.synchronize, time.perf_counter


@dataclass
class Case:
    """A job that either library can do: `make(side)` sets it up in a process that imports one of them.

    `side` is "ours", "reference", or "floor": the same work without any adapter.
    """

    group: str
    name: str
    make: Callable[[str], Job]
    floor: bool = False
    rounds: int | None = None
    """At most so many samples, for what takes long."""

    @property
    def key(self) -> str:
        """Name among all cases."""
        return f"{self.group}/{self.name}"
