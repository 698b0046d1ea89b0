"""The documents tell the truth: their Python runs, top to bottom, and their tables name every method."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft import registry
from tests.documents import local_hub

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_of(document: Path) -> str:
    """The Python blocks of a document as one program, each line where it stands in the document."""
    program, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        if fence:
            inside = line == "```python"
        program.append(line if inside and not fence else "")
    return "\n".join(program)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_of(d).strip()], ids=lambda d: d.name)
def test_python_in_documents_runs(document, tmp_path):
    local_hub.gpt2(tmp_path, "Hello, PEFT!")
    program = tmp_path / f"{document.stem}.py"
    program.write_text(python_of(document), encoding="utf-8")
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in registry.names() if not registry.is_third_party(n)])
def test_readme_names_every_method(name):
    table = re.search(r"<!-- generated: methods -->(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table is not None
    assert f"`{registry.config_class(name).__name__}`" in table[1], "run `make docs` and commit README.md"


def test_links_in_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(
            r"\]\((?!https?://|#|mailto:|\.\./\.\./)([^)#]+)", document.read_text(encoding="utf-8")
        ):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"
