"""The algebra of methods other than LoRA: linear ones add, and every mergeable one becomes LoRA."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import registry
from peft.combine.changes import adapted, change
from peft.combine.factored import Factors
from peft.errors import ConfigError, UnsupportedError
from tests import models
from tests.interop.method_cases import METHODS
from tests.reference.actions import perturb

LINEAR = {name for name, method in registry.all_methods().items() if getattr(method, "linear", False)}
CONVERTIBLE = [
    name
    for name, method in sorted(METHODS.items())
    if name in registry.names() and method.mergeable and "mlp" in method.models and name != "LN_TUNING"
]


def config(name, **options):
    method = METHODS[name]
    known = {"feedforward_modules": []} if name == "IA3" else {}  # no default for an architecture without a name
    return getattr(peft, method.config)(target_modules=["lin0", "lin1"], **{**known, **method.options, **options})


def model_of(name, *adapters, **options):
    torch.manual_seed(0)
    first, *others = adapters
    model = peft.get_peft_model(models.build("mlp").double(), config(name, **options), adapter_name=first)
    for other in others:
        model.add_adapter(other, config(name, **options))
    for adapter in adapters:
        model.set_adapter(adapter)
        perturb(model, 0.2)
    return model.eval()


def changes(model, adapter):
    found = {}
    for _, key, layer in adapted(model.base_model.model):
        delta, shift = change(layer, adapter)
        dense = delta.dense() if isinstance(delta, Factors) else delta
        found[key] = torch.cat([dense.flatten(), *([] if shift is None else [shift.flatten()])])
    return found


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_linear_methods_add_their_tensors(name):
    model = model_of(name, "one", "two")
    first, second = (1.5, -0.5) if name == "IA3" else (1.5, -0.3)  # multipliers are sums of changes if these sum to 1
    model.add_weighted_adapter(["one", "two"], [first, second], "sum")
    one, two, new = (changes(model, adapter) for adapter in ("one", "two", "sum"))
    for key, delta in new.items():
        assert delta.norm() > 0
        assert torch.allclose(delta, first * one[key] + second * two[key], atol=1e-10), key


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_files_of_linear_methods_add_too(name, tmp_path):
    model = model_of(name, "one", "two")
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["one", "two"], [1.5, -0.5], "sum")
    peft.combine_files([tmp_path / "one", tmp_path / "two"], [1.5, -0.5], tmp_path / "sum")
    again = peft.PeftModel.from_pretrained(models.build("mlp").double(), tmp_path / "sum").eval()
    model.set_adapter("sum")
    x = models.example("mlp")
    assert torch.allclose(models.run(again.float(), x), models.run(model.float(), x), atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(CONVERTIBLE) - LINEAR))
def test_other_methods_say_that_they_do_not_add(name):
    model = model_of(name, "one", "two")
    with pytest.raises((UnsupportedError, ConfigError), match="convert"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["one", "two"]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_mergeable_adapter_becomes_lora(name, tmp_path):
    model = model_of(name, "one").float()
    x = models.example("mlp")
    output = models.run(model, x)
    report = peft.save_as_lora(tmp_path, model, None, "one")
    assert report.error < 1e-5
    again = peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path).eval()
    assert torch.allclose(models.run(again, x), output, atol=1e-4, rtol=1e-4)
