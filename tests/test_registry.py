"""A file in `methods/` is a method: as CONTRIBUTING shows it, and with the mistakes that are easily made."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = next(
    code
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    if 'peft_type="ROWSCALE"' in code
)
START = """
import sys, torch, peft.methods
peft.methods.__path__.append(sys.argv[1])
import peft
from peft import registry
from peft.errors import ConfigError
"""


def run(folder: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + code, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_file_in_the_folder_is_a_method(tmp_path):
    (tmp_path / "rowscale.py").write_text(SNIPPET, encoding="utf-8")
    run(
        tmp_path,
        """
base = torch.nn.Sequential(torch.nn.Linear(4, 3))
model = peft.get_peft_model(base, peft.RowScaleConfig(target_modules=["0"]))
assert model.peft_config["default"].peft_type == peft.PeftType("ROWSCALE") == "ROWSCALE"
assert type(model.base_model).__name__ == "RowScaleModel"
model.save_pretrained(sys.argv[1] + "/saved")
base = torch.nn.Sequential(torch.nn.Linear(4, 3))
again = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/saved", check_base=False)
assert "rowscale_s" in "".join(peft.get_peft_model_state_dict(again))
""",
    )


@pytest.mark.parametrize(
    ("file", "type_"), [("row_scale", "ROWSCALE"), ("rowscale", "ROWSCALER")], ids=["file", "type"]
)
def test_a_file_with_another_name_than_its_method_says_so(tmp_path, file, type_):
    text = SNIPPET.replace('"ROWSCALE"', f'"{type_}"').replace("rowscale_s", f"{type_.lower()}_s")
    (tmp_path / f"{file}.py").write_text(text, encoding="utf-8")
    assert f"defines the method {type_}" in run(
        tmp_path,
        f"""
try:
    registry.method("{file.upper()}")
except ConfigError as error:
    print(error)
""",
    )


def test_two_classes_do_not_share_a_type_and_one_may_come_again(tmp_path):
    (tmp_path / "rowscale.py").write_text(SNIPPET, encoding="utf-8")
    printed = run(
        tmp_path,
        """
import importlib
module = importlib.import_module(registry.module_of("ROWSCALE"))
importlib.reload(module)
try:
    registry.register("ROWSCALE", type("Other", (), {}), object())
except ConfigError as error:
    print(error)
""",
    )
    assert "can't be the method 'ROWSCALE'" in printed
    assert "RowScaleConfig is already" in printed
