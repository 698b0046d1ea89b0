"""Imports go one way: up the list of rooms in ARCHITECTURE.md. And importing costs nothing until something is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# From the bottom up: a module may import from its own rank and from those above it in this list. The longest prefix of
# a module's name decides its rank.
RANKS = [
    ["peft.errors", "peft.version", "peft.bulk"],
    ["peft.registry", "peft.typecheck", "peft.routing", "peft.patterns", "peft._names"],
    ["peft.checkpoint.files", "peft.checkpoint.hub", "peft.checkpoint.header", "peft.checkpoint.strict_json"],
    ["peft.checkpoint.tensors", "peft.checkpoint.fingerprint", "peft.checkpoint.report", "peft.checkpoint"],
    ["peft.operators"],
    ["peft.updates"],
    ["peft.autograd.dropout", "peft.autograd.guards", "peft.autograd.costs"],
    ["peft.autograd.products"],
    ["peft.autograd.nodes"],
    ["peft.autograd.over"],
    ["peft.autograd.forms"],
    ["peft.autograd.overlay", "peft.autograd.batches"],
    ["peft.autograd"],
    ["peft.hosts"],
    ["peft.config"],
    ["peft.slots"],
    ["peft.method"],
    ["peft.parts"],
    ["peft.holder"],
    ["peft.rows", "peft.plans"],
    ["peft.layer"],
    ["peft.auxiliary"],
    ["peft.targets"],
    ["peft.whole"],
    ["peft.inject"],
    ["peft.status", "peft.serving", "peft.card"],
    ["peft.checkpoint.keys", "peft.checkpoint.renames"],
    ["peft.checkpoint.fused"],
    ["peft.integrations"],
    ["peft.checkpoint.layouts"],
    ["peft.methods", "peft.insertions", "peft.prompts"],
    ["peft.checkpoint.state"],
    ["peft.combine"],
    ["peft.checkpoint.hotswap"],
    ["peft.tuner"],
    ["peft.integrations.callbacks"],
    ["peft.persistence"],
    ["peft.model"],
    ["peft.tasks"],
    ["peft.mixed_model", "peft.mapping_func", "peft.planning", "peft.verify", "peft.training_state", "peft.auto"],
    ["peft.optimizers", "peft.helpers", "peft.functional", "peft.mapping", "peft.peft_model", "peft.import_utils"],
    ["peft.tuners", "peft.utils"],
    ["peft.testing", "peft.quickstart", "peft.cli"],
]


def rank(module: str) -> int:
    if module == "peft":  # the public names, whichever room they come from
        return rank("peft.mapping_func")
    best = max(
        (
            (len(prefix), position)
            for position, row in enumerate(RANKS)
            for prefix in row
            if (module + ".").startswith(prefix + ".")
        ),
        default=None,
    )
    assert best is not None, f"{module} has no place in the list of rooms: add it where it belongs"
    return best[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of ours that are imported when the file is: not in functions, not for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == "peft")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peft":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = SOURCE.joinpath(*inner.split("."))
                found.add(inner if place.with_suffix(".py").exists() or place.is_dir() else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = [p for p in sorted(SOURCE.glob("peft/**/*.py")) if name_of(p) not in ("peft", "peft._names")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_up(path: Path) -> None:
    here = name_of(path)
    for target in imports(path):
        assert rank(target) <= rank(here), f"{here} imports {target}, which lies in a room below it"


def test_import_is_free() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import peft; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules); "
        "from peft import LoraConfig; LoraConfig(r=4); assert 'transformers' not in sys.modules; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
