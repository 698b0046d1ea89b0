"""The contract suite finds what is broken: methods that break one promise each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from peft import registry
from peft.config import TargetedConfig
from peft.errors import ConfigError, TargetError
from peft.method import WeightMethod
from peft.operators import Diagonal, LowRank
from peft.slots import Slot
from peft.testing import PLACES, Cell, Report, check_method, samples
from peft.updates import Add, After


@dataclass
class OddConfig(TargetedConfig):
    pass


@pytest.fixture
def method():
    """Registers a method of rank one with given replacements, and takes it out again."""

    def make(**changes):
        body = {
            "slots": (Slot("odd_a", "1 in"), Slot("odd_b", "out 1")),
            "reset": lambda self, p, host: (p.odd_a.fill_(0.5), p.odd_b.zero_()),
            "update": lambda self, p, host: Add(LowRank(p.odd_a, p.odd_b)),
            **changes,
        }
        type("Odd", (WeightMethod,), body, peft_type="ODD", config=OddConfig)
        return OddConfig()

    yield make
    registry._METHODS.pop("ODD", None)
    registry._CONFIGS.pop("ODD", None)


class Lossy(Add):
    """Merges something else than it runs."""

    def weight(self, weight, base):
        return weight + 1.01 * self.op.dense()


def test_a_sound_method_passes(method):
    report = check_method(method(), hosts=["Linear", "Embedding"])
    assert report.supported == ["Linear", "Embedding"]
    assert not report.failures


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("law", {"update": lambda self, p, host: Lossy(LowRank(p.odd_a, p.odd_b))}),
        ("law", {"update": lambda self, p, host: Add(LowRank(0 * p.odd_a, p.odd_b))}),
        ("stacks", {"update": lambda self, p, host: Lossy(LowRank(p.odd_a, p.odd_b))}),
        ("gradients", {"update": lambda self, p, host: Add(LowRank(p.odd_a.detach(), p.odd_b))}),
        ("start", {"reset": lambda self, p, host: (p.odd_a.fill_(0.5), p.odd_b.fill_(1.0))}),
        ("save and load", {"slots": (Slot("odd_a", "1 in", saved=False), Slot("odd_b", "out 1"))}),
        ("several adapters", {"update": lambda self, p, host: Add(LowRank(*_of_first(p)))}),
        ("fake tensors", {"reset": lambda self, p, host: p.odd_a.fill_(float(p.odd_b.sum()))}),
    ],
)
def test_a_broken_promise_is_found(method, check, changes):
    with pytest.raises(AssertionError, match=f"ODD .*× Linear × {check}: "):
        check_method(method(**changes), hosts=["Linear"], checks=[check])


def _of_first(p):
    name = next(iter(p.layer.odd_a))
    return p.layer.odd_a[name], p.layer.odd_b[name]


def test_refusals_are_recorded(method):
    def resolve(self, config, host, site):
        if host.out_features != host.in_features:
            raise TargetError("needs a square weight; pad it")
        return {}

    report = check_method(
        method(resolve=resolve, slots=(Slot("odd_a", "1 in"), Slot("odd_b", "out 1"))),
        hosts=["Linear", "Linear, square, no bias"],
        checks=["law"],
    )
    assert report.supported == ["Linear, square, no bias"]
    assert "Linear                     refused: needs a square weight; pad it" in str(report)


def test_a_method_of_another_family_is_found_too(method):
    config = method(
        slots=(Slot("odd_a", "out"),),
        reset=lambda self, p, host: p.odd_a.fill_(1.0),
        update=lambda self, p, host: After(Diagonal(p.odd_a)),
    )
    assert check_method(config, hosts=["Conv2d"], checks=["law", "stacks", "gradients"]).supported


def test_samples_are_as_many_as_the_method_names(method):
    method(samples=({}, {"modules_to_save": ["head"]}))
    assert [c.modules_to_save for c in samples("ODD")] == [None, ["head"]]


def test_unknown_names_are_errors(method):
    config = method()
    with pytest.raises(ConfigError, match="no kind of layer 'Lineal'"):
        check_method(config, hosts=["Lineal"])
    with pytest.raises(ConfigError, match="no check 'lore'"):
        check_method(config, checks=["lore"])


def test_places_give_the_same_batch_each_time():
    for place in PLACES.values():
        assert torch.equal(place.input(), place.input())


def test_a_report_reads_as_text():
    report = Report("X", {"r": 2}, [Cell("Linear", ["law"], left_out={"start": "starts elsewhere"})])
    assert str(report) == "X {'r': 2}\n  Linear                     1 passed, without start (starts elsewhere)"
