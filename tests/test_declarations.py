"""A method whose declaration contradicts itself is refused with the reason, at its definition or its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
from dataclasses import dataclass
import torch
import peft
from peft.config import TargetedConfig
from peft.errors import MethodError
from peft.method import WeightMethod
from peft.operators import LowRank
from peft.slots import Slot
from peft.updates import Add

@dataclass
class XConfig(TargetedConfig):
    r: int = 2
    x_dropout: float = 0.0

class Plain(TargetedConfig):
    r: int = 2

A, B = Slot("x_A", "r in"), Slot("x_B", "out r")

def use(**body):
    if "config" not in body:
        body["config"] = XConfig
    config = body.pop("config")
    body.setdefault("slots", (A, B))
    body.setdefault("resolve", lambda self, config, host, site: {"r": config.r})
    body.setdefault("reset", lambda self, p, host: (p.x_A.normal_(), p.x_B.zero_()))
    body.setdefault("update", lambda self, p, host: Add(LowRank(p.x_A, p.x_B)))
    type("X", (WeightMethod,), body, peft_type="X", config=config)
    base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    return peft.get_peft_model(base, config(target_modules=["0"]))(torch.ones(1, 4))

def said(make):
    try:
        make()
    except (MethodError, AttributeError) as error:
        print(str(error).replace("\\n", " "))
    else:
        print("nothing")
"""
CASES = {
    "a method that is right": ("use()", "nothing"),
    "kind": ('Slot("x_A", "r in", kind="param")', "no kind 'param'. Did you mean 'parameter'?"),
    "shape": ('Slot("x_A", ("r", "in"))', "a shape is a string of dims"),
    "size": ('use(slots=(Slot("x_A", "rank in"), B))', "no size 'rank'; known: "),
    "twice": ("use(slots=(A, B, A))", "two slots named 'x_A'"),
    "prefix": ('use(slots=(Slot("y_A", "r in"), B))', "names of slots begin with 'x_'"),
    "dataclass": ("use(config=Plain)", "needs @dataclass"),
    "dropout": ('use(dropout="x_droput")', "Did you mean 'x_dropout'?"),
    "settings": ('use(settings=("r", "alpha"))', "('alpha',) that resolve() does not return"),
    "update": ("use(update=lambda self, p, host: LowRank(p.x_A, p.x_B))", "must return an Update"),
    "part": ("use(update=lambda self, p, host: Add(LowRank(p.x_a, p.x_B)))", "Did you mean 'x_A'?"),
}


@pytest.fixture(scope="module")
def output() -> dict[str, str]:
    lines = [*(f"said(lambda: {code})" for code, _ in CASES.values())]
    # One process for all: each definition replaces the one before, as in a notebook.
    run = subprocess.run([sys.executable, "-c", START + "\n".join(lines)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(zip(CASES, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_declaration_that_contradicts_itself_says_so(output, name):
    assert CASES[name][1] in output[name]
