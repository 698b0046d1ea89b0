"""The worked example of a third-party method, installed by pip and found through its entry point."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="what the example is built with; the extra `test` has it")
pytest.importorskip("pip", reason="what the example is installed with")

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "new_method"

CHECK = """
import peft, torch
from peft import registry
from peft.testing import CHECKS, check_method, samples

assert "LORAXS" in registry.names()
checks = [name for name in CHECKS if name != "compile"]
for config in samples("LORAXS"):
    report = check_method(config, checks=checks)
    assert len(report.supported) == len(report.cells), str(report)

model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 12)), peft.LoraXsConfig(r=2, target_modules=["0"]))
assert type(model.base_model).__name__ == "LoraXsModel"
assert model.get_nb_trainable_parameters()[0] == 4
assert [tuple(t.shape) for t in peft.get_peft_model_state_dict(model).values()] == [(2, 2)]
try:
    peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 12)), peft.LoraXsConfig(r=9, target_modules=["0"]))
except peft.errors.TargetError as error:
    assert "at most 8" in str(error)
else:
    raise AssertionError("a rank above the smaller side")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the example: built here, from a copy, without a network."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "example")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_installed_it_is_found_and_keeps_the_contract(site):
    import peft

    paths = [str(site), str(Path(peft.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
