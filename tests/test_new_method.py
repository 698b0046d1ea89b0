"""The worked example of a third-party method, as it lies in an environment once it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")

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
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the example in it, as pip puts it there: the module, and what its metadata says of entry points."""
    folder = tmp_path_factory.mktemp("site")
    about = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    for source in (EXAMPLE / "src").glob("*.py"):
        shutil.copy(source, folder)
    info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    points = about["entry-points"]["peft.methods"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[peft.methods]", *lines, ""]))
    return folder


def test_installed_it_is_found_and_keeps_the_contract(site):
    import peft

    paths = [str(site), str(Path(peft.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
