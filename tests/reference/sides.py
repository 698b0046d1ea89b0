"""The two libraries under comparison, behind one method: `side.ask("write", case, directory)`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.reference.actions import Case, perform
from tests.reference.install import ROOT, ensure_reference


class ReferenceError(AssertionError):
    """The reference failed to do what it was asked, with its traceback."""


class Ours:
    """The library under test, in this process."""

    name = "ours"

    def ask(self, action: str, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return perform(action, *args, **kwargs)


class Reference:
    """The reference, in one subprocess for the whole session."""

    name = "reference"

    def __init__(self) -> None:
        added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        others = [path for path in added if not Path(path, "peft").is_dir()]  # but not what is under test
        paths = [str(ensure_reference()), str(ROOT), *others]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reference.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
        )
        assert self.ask("call", "peft.__file__").startswith(paths[0]), "the worker imported another peft"

    def ask(self, action: str, *args: Any, **kwargs: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((action, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        ok, value = pickle.load(self._process.stdout)
        if not ok:
            raise ReferenceError(value)
        return value

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Pair:
    """Both sides, and a memory of what each has written: a case is adapted and saved once, whoever reads it."""

    def __init__(self, ours: Ours, reference: Reference, directory: Path) -> None:
        self.ours, self.reference, self._directory = ours, reference, directory
        self._written: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def birth(self, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        """The freshly adapted model as each side describes it: (ours, reference)."""
        return self.ours.ask("birth", case), self.reference.ask("birth", case)

    def written(self, side: Ours | Reference, case: Case) -> tuple[Path, dict[str, Any]]:
        """Where that side saved the (disturbed) adapter of the case, and its outputs then."""
        key = (side.name, case.name)
        if key not in self._written:
            place = self._directory / side.name / case.name
            self._written[key] = place, side.ask("write", case, str(place))
        return self._written[key]
