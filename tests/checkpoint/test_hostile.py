"""Whatever stands in an adapter's files: it loads, or one of our errors says why not. Soon, and without much memory."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, registry
from peft.checkpoint import files, tensors
from peft.errors import AdapterNameError, ConfigError, PeftError
from peft.method import WeightMethod
from peft.testing import samples
from peft.typecheck import fitted

EXAMPLES = int(os.environ.get("PEFT_EXAMPLES", "60"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([0, -1, 2**31, 2**53, 10**18, 10**400, 1e308, 0.5, -0.0, "", "x", "../../etc/passwd", "(a+)+$"])
    | st.sampled_from(["all-linear", "layer", ".*", "__import__('os')", "lora_only", "0", "\u0000", "q" * 300])
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
METHODS = registry.names()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x):
        return self.layer(x)


def fields_of(kind: str) -> list[str]:
    return [f.name for f in dataclasses.fields(registry.config_class(kind)) if f.name != "peft_type"]


@st.composite
def configs(draw, methods=tuple(METHODS)):
    """A config file: a method, and anything at all in some of its fields."""
    kind = draw(st.sampled_from(methods))
    known = draw(st.dictionaries(st.sampled_from(fields_of(kind)), JSON, max_size=4))
    return {
        "peft_type": kind,
        "target_modules": ["layer"],
        **known,
        **draw(st.dictionaries(st.text(max_size=4), JSON, max_size=1)),
    }


def written(folder: str, config: dict, state: dict[str, torch.Tensor]) -> Path:
    contents = {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": tensors.encode(state)}
    files.save(folder, contents)
    return Path(folder)


@fuzz
@given(config=configs() | JSON)
def test_any_config_is_read_or_refused(config):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        try:
            found = PeftConfig.from_pretrained(folder)
        except PeftError:
            return
        assert isinstance(found, PeftConfig)
        found.to_json_string()


WEIGHT_METHODS = [n for n in METHODS if isinstance(registry.method(n), WeightMethod) and registry.method(n).samples]


@fuzz
@given(config=configs(tuple(WEIGHT_METHODS)), names=st.lists(st.text("ab.lor_AB0", max_size=12), max_size=2))
def test_any_config_is_applied_or_refused(config, names):
    """With a file of the method's usual tensors, or of others."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"base_model.model.layer.lora_A.weight": torch.ones(2, 8)}
        state |= {name: torch.ones(2) for name in names if name.strip(".") == name and ".." not in name and name}
        written(folder, config, state)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        base = Holder()
        try:
            model = PeftModel.from_pretrained(base, folder)
        except PeftError:
            assert [n for n, _ in base.named_modules()] == ["", "layer"], (
                "a refused adapter left something in the model"
            )
        else:
            assert isinstance(model, PeftModel)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 500_000, f"{grown} KiB for {config}"


@pytest.mark.parametrize("kind", WEIGHT_METHODS)
@pytest.mark.parametrize("value", [10**6, 2**53])
def test_huge_sizes_take_no_memory(kind, value):
    """The file is small, so nothing large may be made for it, whatever its config says."""
    config = samples(kind)[0]
    plain = {**config.to_file_dict(), "target_modules": ["layer"]}
    whole = [k for k, v in plain.items() if isinstance(v, int) and not isinstance(v, bool)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in whole:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written(folder, {**plain, name: value}, {"base_model.model.layer.x": torch.ones(1)})
            with pytest.raises(PeftError):
                PeftModel.from_pretrained(Holder(), folder)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 300_000, f"{grown} KiB for {name} = {value}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"r": "8"}, r"LoraConfig\.r is '8'; it must be int"),
        ({"r": True}, r"LoraConfig\.r is True"),
        ({"r": 2.5}, r"LoraConfig\.r is 2\.5"),
        ({"target_modules": [1]}, r"LoraConfig\.target_modules is \[1\]; it must be list\[str\] or set\[str\]"),
        ({"rank_pattern": 3}, r"LoraConfig\.rank_pattern is 3; it must be dict"),
        ({"lora_dropout": "0.1"}, r"LoraConfig\.lora_dropout"),
        ({"r": 10**30}, "beyond all sizes"),
        ({"peft_type": 3}, "peft_type is 3"),
    ],
)
def test_fields_of_other_types_are_named(values, says):
    with pytest.raises(ConfigError, match=says):
        PeftConfig.from_peft_type(**{"peft_type": "LORA", **values})


def test_what_json_spells_otherwise_fits():
    values = {"r": 8.0, "lora_alpha": 0.5, "lora_dropout": 0, "init_lora_weights": None, "target_modules": ["q"]}
    found = fitted(LoraConfig, values)
    assert found == {"r": 8, "lora_alpha": 0.5, "lora_dropout": 0, "target_modules": ["q"]}
    assert fitted(PromptTuningConfig, {"num_virtual_tokens": None}) == {"num_virtual_tokens": None}


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", " ", "a.b", "..", "x\0y", "default\n", "\u202e"])
def test_names_that_are_paths_or_hide_something_name_no_adapter(name):
    with pytest.raises(AdapterNameError, match="can't name an adapter"):
        PeftModel(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), name)
