"""One library in a process of its own: pickled (action, case, ...) on stdin, pickled (ok, value) on stdout.

Pickle is safe here because both ends are this program.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
import warnings
from typing import Any

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Worker:
    """Holds the jobs that were set up, by case and side."""

    def __init__(self, clock: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.clock = CLOCKS[clock]
        self.jobs: dict[tuple[str, str], Any] = {}

    def origin(self) -> str:
        """Where the library was imported from."""
        import peft

        return os.path.dirname(peft.__file__)

    def setup(self, key: str, side: str) -> None:
        """Set a case up and warm it up."""
        from benchmarks.cases import CASES

        job = CASES[key].make(side)
        job.sample(self.clock)
        self.jobs[key, side] = job

    def sample(self, key: str, side: str) -> float:
        """Seconds of one run."""
        return self.jobs[key, side].sample(self.clock)

    def count(self, key: str, side: str) -> dict[str, int]:
        """Counts of one run."""
        from benchmarks.counts import count

        return count(self.jobs[key, side])

    def drop(self, key: str) -> None:
        """Forget a case."""
        self.jobs = {k: v for k, v in self.jobs.items() if k[0] != key}
        gc.collect()


def main(clock: str, threads: str) -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not land among the replies
    warnings.simplefilter("ignore")
    worker = Worker(clock, int(threads))
    while True:
        try:
            action, *args = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = True, getattr(worker, action)(*args)
        except Exception:
            reply = False, traceback.format_exc()
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
